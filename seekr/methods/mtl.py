"""Multi-task learning: all tasks at once from the base model. The ceiling, not a stream."""

from __future__ import annotations

from typing import ClassVar, Literal

from seekr.methods.contract import Method, Needs


class MTL(Method):
    """One training on the union of all tasks' rows."""

    needs: ClassVar[Needs] = Needs(all_tasks=True)

    name: Literal["mtl"] = "mtl"
