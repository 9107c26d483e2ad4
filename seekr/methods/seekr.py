"""SEEKR: replay, logit distillation, and the attention rows of the most valuable heads (eq 13)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from seekr.attention_kl import Reduction, reduce_attention_kl
from seekr.batch_targets import BatchTargets
from seekr.distillation import DistillationProbe
from seekr.importance import Definition, Rule
from seekr.losses import AnswerNLL, LogitKL
from seekr.methods.contract import Method, Needs, Outputs, Term, Terms

_PREPARATION = frozenset(
    {"logit_shift", "query_budget", "layer_budget", "head_budget", "heads"}
    | {"definition", "combine", "scope"}
)


class SEEKR(Method):
    """L = L_task + l1 * L_replay + (1 - l1) * L_logits + l2 * L_attention."""

    needs: ClassVar[Needs] = Needs(replay=True, logits=True, heads=True)
    preparation_fields: ClassVar[frozenset[str]] = _PREPARATION

    name: Literal["seekr"] = "seekr"
    replay_weight: float = Field(default=0.5, ge=0, le=1)
    """l1: weight of the replayed rows' next-token loss."""
    logit_weight: float | None = Field(default=None, ge=0)
    """Weight of logit distillation; 1 - replay_weight unless given."""
    logit_shift: bool = True
    """False distils the official code's positions, one token too late."""
    attention_weight: float = Field(default=1000.0, gt=0)
    """l2: 1e3 at 1 % replay and 1e2 at 10 % in the paper, which belong to `mean`."""
    attention_reduction: Reduction = "mean"
    """Over a row's attention KLs: the official code's mean, or equation 12's sum."""
    attention_epsilon: float = Field(default=0.0, ge=0)
    """Added to the student's probabilities inside the logarithm; the official code has 1e-8."""
    layer_budget: int = Field(default=24, ge=1)
    """B_L: layers that heads are chosen from."""
    head_budget: int = Field(default=128, ge=1)
    """B_H: heads distilled, in all layers together."""
    query_budget: int | None = Field(default=100, ge=1)
    """B_T: query rows distilled per head and replay row; null takes all."""
    heads: Literal["importance", "sensitivity", "forgettability", "random"] = "importance"
    """What ranks the heads; the others are Table 4's ablations."""
    definition: Definition = "paper"
    """Of task sensitivity and forgettability: Frobenius norms, or the official mean squares."""
    combine: Rule = "product_of_sums"
    """Over tasks: (sum S)(sum F) as in equation 10, or the official sum of S F."""
    scope: Literal["global", "frozen"] = "global"
    """`global` selects anew for all replay rows after each task (paper), `frozen` keeps each
    task's heads as they were when it was learnt (official code)."""

    def loss_settings(self) -> dict[str, Any]:
        return super().loss_settings() | {"logit_weight": self._logit_weight}

    def distillation(self, targets: BatchTargets) -> DistillationProbe:
        return DistillationProbe(
            targets.heads_by_layer,
            targets.positions_BQ,
            targets.attention,
            epsilon=self.attention_epsilon,
        )

    def replay_terms(self, outputs: Outputs) -> Terms:
        targets, kl_by_layer = outputs.targets, outputs.attention_kl
        assert targets is not None and kl_by_layer is not None
        nll_B, logits_B = outputs.answers.sums(AnswerNLL.of(outputs.batch), LogitKL(targets))
        attention_B = reduce_attention_kl(kl_by_layer, targets.valid, self.attention_reduction)
        return {
            "replay": Term(weight=self.replay_weight, total=nll_B.sum(), per="replay_tokens"),
            "logits": Term(weight=self._logit_weight, total=logits_B.sum(), per="replay_tokens"),
            "attention": Term(
                weight=self.attention_weight, total=attention_B.sum(), per="replay_rows"
            ),
        }

    @property
    def _logit_weight(self) -> float:
        return 1.0 - self.replay_weight if self.logit_weight is None else self.logit_weight
