"""Experience replay: stored rows of earlier tasks are trained on beside the new ones."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from seekr.losses import AnswerNLL
from seekr.methods.contract import Method, Needs, Outputs, Term, Terms


class Replay(Method):
    """L = L_task + replay_weight * L_replay."""

    needs: ClassVar[Needs] = Needs(replay=True)

    name: Literal["replay"] = "replay"
    replay_weight: float = Field(default=1.0, gt=0)
    """Weight of the replayed rows' next-token loss."""

    def replay_terms(self, outputs: Outputs) -> Terms:
        (nll_B,) = outputs.answers.sums(AnswerNLL.of(outputs.batch))
        return {"replay": Term(weight=self.replay_weight, total=nll_B.sum(), per="replay_tokens")}
