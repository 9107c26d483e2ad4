"""LwF, learning without forgetting: the previous model's answers to the new task's rows are kept up.

No old row is stored. Before a task is learnt the model that knows the earlier ones is asked for its
next-token distributions on the new rows, once, and they are distilled while the gold answers are
learnt (Li and Hoiem, arXiv 1606.09282). The temperature is 1, as in the other methods: targets keep
probabilities, whose tail cannot be tempered afterwards.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from seekr.losses import AnswerNLL, LogitKL
from seekr.methods.contract import Method, Needs, Outputs, Term, Terms


class LwF(Method):
    """L = L_task + logit_weight * KL(previous model || model) on the new task's answers."""

    needs: ClassVar[Needs] = Needs(task_logits=True)

    name: Literal["lwf"] = "lwf"
    logit_weight: float = Field(default=1.0, gt=0)
    """Weight of the divergence from the previous model's answers."""

    def task_terms(self, outputs: Outputs) -> Terms:
        if outputs.targets is None:  # the first task: nothing was learnt before it
            return super().task_terms(outputs)
        nll_B, logits_B = outputs.answers.sums(
            AnswerNLL.of(outputs.batch), LogitKL(outputs.targets)
        )
        return {
            "task": Term(weight=1.0, total=nll_B.sum(), per="task_tokens"),
            "logits": Term(weight=self.logit_weight, total=logits_B.sum(), per="task_tokens"),
        }
