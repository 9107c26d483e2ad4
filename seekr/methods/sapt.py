"""SAPT: a low-rank block per task beside a frozen model, and one attention over them for all layers.

What attends is shared by all tasks and would forget which block an earlier task needs. So prompts of
earlier tasks are replayed (attentive reflection): their weights are held to those they had when their
task had been learnt, with nothing for blocks that came later (Zhao et al., ACL 2024).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from seekr.losses import own_block_nll, weights_kl
from seekr.methods.contract import Method, Needs, Outputs, Term, Terms
from seekr.shared_attention import Pooling, SharedAttention


class SAPT(Method):
    """L = L_task + selection_weight * mean over new rows of -log a_own
    + reflection_weight * mean over replayed prompts of KL(recorded || current)."""

    needs: ClassVar[Needs] = Needs(replay=True, weights=True, addition=True)
    replay_sees: ClassVar[Literal["rows", "prompts"]] = "prompts"
    preparation_fields: ClassVar[frozenset[str]] = frozenset({"reflection"})

    name: Literal["sapt"] = "sapt"
    rank: int = Field(default=4, ge=1)
    """Of a task's block."""
    alpha: float = Field(default=32.0, gt=0)
    """A block adds alpha / rank times its product."""
    targets: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    """Linear layers that have blocks."""
    query_width: int = Field(default=100, ge=1)
    """Of the query network between its two matrices."""
    temperature: float | None = Field(default=None, gt=0)
    """Tau of the softmax; null is the square root of the model's width."""
    pooling: Pooling = "max"
    """Of a prompt's embeddings, as published; `mean` is the other choice."""
    reflection_weight: float = Field(default=1.0, gt=0)
    """Lambda. A mean over prompts, so it does not grow with the number of tasks."""
    reflection: Literal["mean", "row"] = "mean"
    """What is recorded: the mean weights of a task's training rows, as published, or each kept row's."""
    selection_weight: float = Field(default=1.0, ge=0)
    """Of -log of what a new row gives to its own task's block; 0 is as published, where nothing but
    the task's loss says which block is whose."""

    @property
    def addition(self) -> SharedAttention:
        return SharedAttention(
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            width=self.query_width,
            temperature=self.temperature,
            pooling=self.pooling,
        )

    def first_task_settings(self) -> dict[str, Any]:
        later = {"reflection", "reflection_weight", "selection_weight"}
        return self.model_dump(mode="json", exclude=later)

    def task_terms(self, outputs: Outputs) -> Terms:
        assert outputs.added is not None and outputs.added.weights_BS is not None
        terms, weights_BS = super().task_terms(outputs), outputs.added.weights_BS
        if self.selection_weight and weights_BS.shape[1] > 1:
            total = own_block_nll(weights_BS).sum()
            terms["selection"] = Term(weight=self.selection_weight, total=total, per="task_rows")
        return terms

    def replay_terms(self, outputs: Outputs) -> Terms:
        assert outputs.targets is not None and outputs.targets.weights_BS is not None
        assert outputs.added is not None and outputs.added.weights_BS is not None
        kl_B = weights_kl(outputs.targets.weights_BS, outputs.added.weights_BS)
        term = Term(weight=self.reflection_weight, total=kl_B.sum(), per="replay_rows")
        return {"reflection": term}
