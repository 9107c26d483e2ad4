"""L2P, learning to prompt: a pool of prompts, of which each input takes those whose keys are nearest.

The model is frozen; prompts and keys are trained by all tasks. A query is the mean of the embeddings of
the input's tokens, and chosen keys are pulled towards it (Wang et al., arXiv 2112.08654).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from seekr.methods.contract import Method, Needs, Outputs, Term, Terms
from seekr.soft_prompts import SoftPrompts


class L2P(Method):
    """L = L_task + pull_weight * sum over chosen prompts of (1 - cosine(key, query))."""

    needs: ClassVar[Needs] = Needs(addition=True)

    name: Literal["l2p"] = "l2p"
    pool: int = Field(default=10, ge=1)
    """Prompts there are."""
    selected: int = Field(default=5, ge=1)
    """Prompts that an input takes."""
    prompt_length: int = Field(default=5, ge=1)
    """Vectors of a prompt. They want a larger learning rate than weights do."""
    pull_weight: float = Field(default=0.5, ge=0)
    """Of the distance between chosen keys and their inputs."""

    @model_validator(mode="after")
    def _enough_prompts(self) -> L2P:
        if self.selected > self.pool:
            raise ValueError(
                f"selected is {self.selected} and the pool has {self.pool}; lower selected"
            )
        return self

    @property
    def addition(self) -> SoftPrompts:
        return SoftPrompts(
            kind="pool", length=self.prompt_length, pool=self.pool, selected=self.selected
        )

    def first_task_settings(self) -> dict[str, Any]:
        return self.loss_settings()

    def task_terms(self, outputs: Outputs) -> Terms:
        assert outputs.added is not None and outputs.added.pull_B is not None
        pull = Term(weight=self.pull_weight, total=outputs.added.pull_B.sum(), per="task_rows")
        return super().task_terms(outputs) | {"pull": pull}
