"""DER++: replay with gold answers, and the logits that the model had when it learnt the rows."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from seekr.losses import AnswerNLL, LogitKL, LogitMSE
from seekr.methods.contract import Method, Needs, Outputs, Term, Terms


class DERpp(Method):
    """L = L_task + replay_weight * L_replay + logit_weight * L_logits."""

    needs: ClassVar[Needs] = Needs(replay=True, logits=True)
    preparation_fields: ClassVar[frozenset[str]] = frozenset({"logit_shift"})

    name: Literal["derpp"] = "derpp"
    replay_weight: float = Field(default=0.5, ge=0)
    """Weight of the replayed rows' next-token loss (beta)."""
    logit_weight: float = Field(default=0.5, gt=0)
    """Weight of the distance to the teacher's logits (alpha)."""
    logit_loss: Literal["kl", "mse"] = "kl"
    """`kl` as SEEKR compares with, `mse` as DER++ was published."""
    logit_shift: bool = True
    """False distils the official SEEKR code's positions, one token too late."""

    @property
    def whole_logits(self) -> bool:
        return self.logit_loss == "mse"

    def replay_terms(self, outputs: Outputs) -> Terms:
        assert outputs.targets is not None
        distance = LogitKL if self.logit_loss == "kl" else LogitMSE
        nll_B, logits_B = outputs.answers.sums(
            AnswerNLL.of(outputs.batch), distance(outputs.targets)
        )
        return {
            "replay": Term(weight=self.replay_weight, total=nll_B.sum(), per="replay_tokens"),
            "logits": Term(weight=self.logit_weight, total=logits_B.sum(), per="replay_tokens"),
        }
