"""Losses on logits: answer NLL, logit KL and logit MSE, each as a per-row sum and a count.

Sums and counts instead of means: a mean over a global batch can then be formed exactly whatever way
the batch was split over devices. Only answer positions are ever turned into float32.

A position here is where logits are read. With the shift, the one that predicts an answer token (the
token before it); without, the answer token itself, which is what the official code distils.

Shape suffixes: B batch, T tokens, A answer positions of the whole batch, V vocab.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from seekr.errors import DataError
from seekr.softmax import exact_dtype
from seekr.sparse_rows import SparseRows

if TYPE_CHECKING:
    from seekr.batch_targets import BatchTargets

IGNORE_LABEL = -100


def answer_positions(labels_BT: Tensor, *, shift: bool = True) -> tuple[Tensor, Tensor]:
    """Return (batch row [A], padded position [A]) of the logits that belong to answer tokens.

    Ordered by batch row, then position. A label on a batch row's very first column has no position
    with the shift: nothing predicts it. Prompts are never empty, so this does not occur in a Batch.
    """
    answers = labels_BT != IGNORE_LABEL
    if shift:
        answers = answers[:, 1:]
    row_A, position_A = answers.nonzero(as_tuple=True)
    return row_A, position_A


class AnswerLogits:
    """Logits [B,T,V], read at few positions, in float32 or better.

    Losses that read the same positions share one reading. Backward makes a [B,T,V] gradient of each
    reading, which is most of the memory that a second loss would take.
    """

    def __init__(self, logits_BTV: Tensor) -> None:
        self.logits_BTV = logits_BTV
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def at(self, row_A: Tensor, position_A: Tensor) -> Tensor:
        """Return the logits [A,V] of batch rows `row_A` at padded positions `position_A`."""
        if self._last is not None:
            row, position, known_AV = self._last
            if torch.equal(row, row_A) and torch.equal(position, position_A):
                return known_AV
        logits_AV = self.logits_BTV[row_A, position_A].to(exact_dtype(self.logits_BTV.dtype))
        self._last = (row_A, position_A, logits_AV)
        return logits_AV


def _reader(logits: Tensor | AnswerLogits) -> AnswerLogits:
    return logits if isinstance(logits, AnswerLogits) else AnswerLogits(logits)


def answer_nll(logits: Tensor | AnswerLogits, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the answer tokens.

    Args:
        logits: [B,T,V], at least as wide as the labels; any float dtype.
        labels_BT: Token ids, -100 where no loss is taken.

    Returns:
        Sum per batch row [B] in float32 (float64 for float64 logits), and number of tokens [B].
    """
    row_A, position_A = answer_positions(labels_BT)
    logits_AV = _reader(logits).at(row_A, position_A)
    nll_A = functional.cross_entropy(logits_AV, labels_BT[row_A, position_A + 1], reduction="none")
    return _per_row(nll_A, row_A, len(labels_BT))


def logit_kl(logits: Tensor | AnswerLogits, targets: BatchTargets) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) over the vocabulary at the targets' positions, equation (3).

    Where the teacher kept only its largest probabilities, all others count as one outcome.

    Returns:
        Sum per batch row [B], and number of positions [B] (0 for rows without a logit target).

    Raises:
        DataError: teacher and student have vocabularies of different size.
    """
    log_student_AV = _student(_reader(logits), targets).log_softmax(dim=-1)
    if isinstance(targets.logits, SparseRows):
        kl_A = _sparse_kl(targets.logits, log_student_AV)
    else:
        log_teacher_AV = _whole(targets).to(log_student_AV.dtype).log_softmax(dim=-1)
        kl_AV = functional.kl_div(log_student_AV, log_teacher_AV, reduction="none", log_target=True)
        kl_A = kl_AV.sum(dim=-1)
    return _per_row(kl_A, targets.logit_row_A, len(_reader(logits).logits_BTV))


def _sparse_kl(teacher: SparseRows, log_student_AV: Tensor) -> Tensor:
    """KL [A] with the teacher's tail, and the student's, as one outcome."""
    vocab_size = log_student_AV.shape[-1]
    last = int(teacher.columns_N.max()) if teacher.columns_N.numel() else 0
    if last >= vocab_size:
        raise DataError(
            f"a teacher kept token {last} and the student has tokens 0..{vocab_size - 1}; they must "
            "share a vocabulary: teach again with the model that is trained"
        )
    row_N, value_N = teacher.rows_N(), teacher.values_N.to(log_student_AV.dtype)
    part_N = torch.xlogy(value_N, value_N) - value_N * log_student_AV[row_N, teacher.columns_N]
    kl_A = part_N.new_zeros(len(teacher)).index_add(0, row_N, part_N)
    tail_A = teacher.tail_R.to(log_student_AV.dtype)
    kept_AV = torch.zeros_like(log_student_AV, dtype=torch.bool)
    kept_AV[row_N, teacher.columns_N] = True
    # Rows without a tail keep an entry here, or their empty sum would have no gradient.
    rest_AV = log_student_AV.masked_fill(kept_AV & (tail_A > 0)[:, None], -torch.inf)
    log_rest_A = rest_AV.logsumexp(dim=-1)
    return kl_A + torch.xlogy(tail_A, tail_A) - tail_A * log_rest_A


def logit_mse(logits: Tensor | AnswerLogits, targets: BatchTargets) -> tuple[Tensor, Tensor]:
    """Squared difference of logits, averaged over the vocabulary (DER++).

    Returns:
        Sum over positions per batch row [B], and number of positions [B].

    Raises:
        DataError: teacher and student have vocabularies of different size, or the teacher kept only
            its largest probabilities.
    """
    student_AV = _student(_reader(logits), targets)
    mse_A = (student_AV - _whole(targets).to(student_AV.dtype)).square().mean(dim=-1)
    return _per_row(mse_A, targets.logit_row_A, len(_reader(logits).logits_BTV))


def _student(student: AnswerLogits, targets: BatchTargets) -> Tensor:
    """Return the student's logits [A,V] at the targets' positions."""
    logits, vocab_size = targets.logits, student.logits_BTV.shape[-1]
    if logits is None:
        raise ValueError("the batch carries no logit targets; teach with logits=True")
    if isinstance(logits, Tensor) and logits.shape[-1] != vocab_size:
        raise DataError(
            f"teacher logits have {logits.shape[-1]} entries and the student {vocab_size}; they "
            "must share a vocabulary: teach again with the model that is trained"
        )
    return student.at(targets.logit_row_A, targets.logit_position_A)


def _whole(targets: BatchTargets) -> Tensor:
    if not isinstance(targets.logits, Tensor):
        raise DataError(
            "the targets hold the teacher's largest probabilities only; whole logits are needed for "
            "a distance of logits: teach with logits_kept null"
        )
    return targets.logits


def _per_row(values_A: Tensor, row_A: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    sums_B = values_A.new_zeros(num_rows).index_add(0, row_A, values_A)
    return sums_B, torch.bincount(row_A, minlength=num_rows)
