"""Progressive prompts: each task trains a prompt of its own, before those of earlier tasks.

The model is frozen, and so are earlier prompts; the newest one comes first and sees the others after it
(Razdaibiedina et al., arXiv 2301.12314, without the network through which prompts may be trained).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from seekr.methods.contract import Method, Needs
from seekr.soft_prompts import SoftPrompts


class ProgressivePrompts(Method):
    """L = L_task, of one prompt's vectors."""

    needs: ClassVar[Needs] = Needs(addition=True)
    preparation_fields: ClassVar[frozenset[str]] = frozenset({"inference"})

    name: Literal["pp"] = "pp"
    prompt_length: int = Field(default=10, ge=1)
    """Vectors of a task's prompt. They want a larger learning rate than weights do."""
    inference: Literal["newest", "task"] = "newest"
    """`newest` gives all prompts to every row, so no row has to say its task; `task` those there were
    when its task was learnt, which nothing learnt later can change."""

    @property
    def addition(self) -> SoftPrompts:
        return SoftPrompts(kind="progressive", length=self.prompt_length)

    def first_task_settings(self) -> dict[str, Any]:
        return self.loss_settings()
