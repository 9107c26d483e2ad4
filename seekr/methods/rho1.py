"""RHO-1: of each row only the tokens are trained on whose loss is highest above a reference's.

The reference is the model that the stream begins with; its losses are computed once per row. Which tokens
are kept follows from the model under way, in every step anew (`seekr.excess_loss`; Lin et al., arXiv
2404.07965). A row counts as much as it has tokens, however few of them are kept.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from seekr.excess_loss import excess_loss_mask
from seekr.losses import AnswerNLL
from seekr.methods.contract import Method, Needs, Outputs, Term, Terms
from seekr.token_weights import relative_weights_of

# Above any loss, and finite after a reference's is taken from it.
_MOST = 1e30


class RHO1(Method):
    """L = mean over the kept tokens of a row, rows weighed by their length."""

    needs: ClassVar[Needs] = Needs(reference=True)

    name: Literal["rho1"] = "rho1"
    share: float = Field(default=0.6, gt=0, le=1)
    """Of a row's answer tokens that are trained on."""

    def task_terms(self, outputs: Outputs) -> Terms:
        batch = outputs.batch
        assert batch.reference_nll_BT is not None
        plain = AnswerNLL(batch.labels_BT)
        where = plain.row_A, plain.position_A + 1
        nll_BT = batch.reference_nll_BT.new_zeros(batch.labels_BT.shape)
        # A loss that is no number goes first, so that the training sees that it has diverged.
        nll_BT[where] = outputs.answers.values(plain).to(nll_BT).nan_to_num(nan=_MOST, posinf=_MOST)
        labels_BT = nll_BT.new_zeros(nll_BT.shape).bool()
        labels_BT[where] = True
        kept_BT = excess_loss_mask(nll_BT, batch.reference_nll_BT, labels_BT, self.share)
        weights_BT = relative_weights_of(kept_BT, labels_BT)
        (nll_B,) = outputs.answers.sums(AnswerNLL(batch.labels_BT, weights_BT))
        return {"task": Term(weight=1.0, total=nll_B.sum(), per="task_tokens")}

    def first_task_settings(self) -> dict[str, object]:
        """The first task is learnt like any other, and not like by plain fine-tuning."""
        return self.loss_settings()
