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
from seekr.probes import exact_dtype

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


def answer_nll(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the answer tokens.

    Args:
        logits_BTV: At least as wide as the labels; any float dtype.
        labels_BT: Token ids, -100 where no loss is taken.

    Returns:
        Sum per batch row [B] in float32 (float64 for float64 logits), and number of tokens [B].
    """
    row_A, position_A = answer_positions(labels_BT)
    logits_AV = logits_BTV[row_A, position_A].to(exact_dtype(logits_BTV.dtype))
    nll_A = functional.cross_entropy(logits_AV, labels_BT[row_A, position_A + 1], reduction="none")
    return _per_row(nll_A, row_A, len(labels_BT))


def logit_kl(logits_BTV: Tensor, targets: BatchTargets) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) over the vocabulary at the targets' positions, equation (3).

    Returns:
        Sum per batch row [B], and number of positions [B] (0 for rows without a logit target).

    Raises:
        DataError: teacher and student have vocabularies of different size.
    """
    student_AV, teacher_AV = _pair(logits_BTV, targets)
    log_teacher_AV = teacher_AV.log_softmax(dim=-1)
    log_student_AV = student_AV.log_softmax(dim=-1)
    kl_A = functional.kl_div(log_student_AV, log_teacher_AV, reduction="none", log_target=True)
    return _per_row(kl_A.sum(dim=-1), targets.logit_row_A, len(logits_BTV))


def logit_mse(logits_BTV: Tensor, targets: BatchTargets) -> tuple[Tensor, Tensor]:
    """Squared difference of logits, averaged over the vocabulary (DER++).

    Returns:
        Sum over positions per batch row [B], and number of positions [B].

    Raises:
        DataError: teacher and student have vocabularies of different size.
    """
    student_AV, teacher_AV = _pair(logits_BTV, targets)
    mse_A = (student_AV - teacher_AV).square().mean(dim=-1)
    return _per_row(mse_A, targets.logit_row_A, len(logits_BTV))


def _pair(logits_BTV: Tensor, targets: BatchTargets) -> tuple[Tensor, Tensor]:
    """Return (student, teacher) logits [A,V] at the targets' positions."""
    if targets.logits_AV is None:
        raise ValueError("the batch carries no logit targets; teach with logits=True")
    vocab_size = logits_BTV.shape[-1]
    if targets.logits_AV.shape[-1] != vocab_size:
        raise DataError(
            f"teacher logits have {targets.logits_AV.shape[-1]} entries and the student "
            f"{vocab_size}; they must share a vocabulary: teach again with the model that is "
            "trained"
        )
    dtype = exact_dtype(logits_BTV.dtype)
    student_AV = logits_BTV[targets.logit_row_A, targets.logit_position_A].to(dtype)
    return student_AV, targets.logits_AV.to(dtype)


def _per_row(values_A: Tensor, row_A: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    sums_B = values_A.new_zeros(num_rows).index_add(0, row_A, values_A)
    return sums_B, torch.bincount(row_A, minlength=num_rows)
