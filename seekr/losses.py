"""Losses on logits: answer NLL, logit KL and logit MSE, each one number per answer position; at the
end, two losses on what rows give to blocks.

Each is an object that knows its positions and turns the logits of any part of them into values, so
it does not matter where logits come from, or how many exist at a time (`answers`). Values become
sums per batch row, not means: a mean over a global batch can then be formed exactly whatever way the
batch was split over devices. Only answer positions are ever turned into float32.

A position here is where logits are read. With the shift, the one that predicts an answer token (the
token before it); without, the answer token itself, which is what the official code distils.

Shape suffixes: B batch, T tokens, A answer positions of the whole batch, C those of one part, V
vocab, N kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from seekr.answers import PositionLoss, WholeLogits
from seekr.collation import IGNORE_LABEL, Batch
from seekr.errors import DataError
from seekr.sparse_rows import SparseRows

if TYPE_CHECKING:
    from seekr.batch_targets import BatchTargets


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


@dataclass(frozen=True, slots=True, eq=False)
class AnswerNLL:
    """Negative log-likelihood of the answer tokens, each times its weight if there are weights.

    Attributes:
        labels_BT: Token ids, -100 where no loss is taken.
        weights_BT: What tokens count, or None where all count 1.
        row_A: Batch row of each answer token.
        position_A: Padded position of the logits that predict it.
    """

    labels_BT: Tensor
    weights_BT: Tensor | None = None
    row_A: Tensor = field(init=False)
    position_A: Tensor = field(init=False)
    _label_A: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        row_A, position_A = answer_positions(self.labels_BT)
        object.__setattr__(self, "row_A", row_A)
        object.__setattr__(self, "position_A", position_A)
        object.__setattr__(self, "_label_A", self.labels_BT[row_A, position_A + 1])

    @classmethod
    def of(cls, batch: Batch) -> AnswerNLL:
        """Return the loss on a batch's gold answers, with the weights that its rows carry."""
        return cls(batch.labels_BT, batch.weights_BT)

    def __call__(self, logits_CV: Tensor, part: slice) -> Tensor:
        nll_C = functional.cross_entropy(logits_CV, self._label_A[part], reduction="none")
        if self.weights_BT is None:
            return nll_C
        return nll_C * self.weights_BT[self.row_A[part], self.position_A[part] + 1].to(nll_C)


@dataclass(frozen=True, slots=True, eq=False)
class LogitKL:
    """KL(teacher || student) over the vocabulary at the targets' positions, equation (3).

    Where the teacher kept only its largest probabilities, all others count as one outcome.

    Raises:
        ValueError: the targets have no logits.
        DataError: when called, teacher and student have vocabularies of different size.
    """

    targets: BatchTargets
    _teacher: Tensor | SparseRows = field(init=False, repr=False)
    _last_token: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        teacher = _logits_of(self.targets)
        object.__setattr__(self, "_teacher", teacher)
        object.__setattr__(self, "_last_token", _last_kept(teacher))

    @property
    def row_A(self) -> Tensor:
        return self.targets.logit_row_A

    @property
    def position_A(self) -> Tensor:
        return self.targets.logit_position_A

    def __call__(self, logits_CV: Tensor, part: slice) -> Tensor:
        vocab_size, teacher = logits_CV.shape[-1], self._teacher
        if isinstance(teacher, SparseRows):
            if self._last_token >= vocab_size:
                raise DataError(
                    f"a teacher kept token {self._last_token} and the student has tokens "
                    f"0..{vocab_size - 1}; they must share a vocabulary: teach again with the "
                    "model that is trained"
                )
            return _sparse_kl(teacher.cut(part.start, part.stop), logits_CV.log_softmax(dim=-1))
        _check_width(teacher, vocab_size)
        log_student_CV = logits_CV.log_softmax(dim=-1)
        log_teacher_CV = teacher[part].to(log_student_CV.dtype).log_softmax(dim=-1)
        kl_CV = functional.kl_div(log_student_CV, log_teacher_CV, reduction="none", log_target=True)
        return kl_CV.sum(dim=-1)


def _sparse_kl(teacher: SparseRows, log_student_CV: Tensor) -> Tensor:
    """KL [C] with the teacher's tail, and the student's, as one outcome."""
    row_N, value_N = teacher.rows_N(), teacher.values_N.to(log_student_CV.dtype)
    part_N = torch.xlogy(value_N, value_N) - value_N * log_student_CV[row_N, teacher.columns_N]
    kl_C = part_N.new_zeros(len(teacher)).index_add(0, row_N, part_N)
    tail_C = teacher.tail_R.to(log_student_CV.dtype)
    kept_CV = torch.zeros_like(log_student_CV, dtype=torch.bool)
    kept_CV[row_N, teacher.columns_N] = True
    # Rows without a tail keep an entry here, or their empty sum would have no gradient.
    rest_CV = log_student_CV.masked_fill(kept_CV & (tail_C > 0)[:, None], -torch.inf)
    log_rest_C = rest_CV.logsumexp(dim=-1)
    return kl_C + torch.xlogy(tail_C, tail_C) - tail_C * log_rest_C


@dataclass(frozen=True, slots=True, eq=False)
class LogitMSE:
    """Squared difference of logits, averaged over the vocabulary (DER++).

    Raises:
        ValueError: the targets have no logits.
        DataError: the teacher kept only its largest probabilities; or, when called, teacher and
            student have vocabularies of different size.
    """

    targets: BatchTargets
    _teacher_AV: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        teacher = _logits_of(self.targets)
        if isinstance(teacher, SparseRows):
            raise DataError(
                "the targets hold the teacher's largest probabilities only; whole logits are "
                "needed for a distance of logits: teach with logits_kept null"
            )
        object.__setattr__(self, "_teacher_AV", teacher)

    @property
    def row_A(self) -> Tensor:
        return self.targets.logit_row_A

    @property
    def position_A(self) -> Tensor:
        return self.targets.logit_position_A

    def __call__(self, logits_CV: Tensor, part: slice) -> Tensor:
        _check_width(self._teacher_AV, logits_CV.shape[-1])
        teacher_CV = self._teacher_AV[part].to(logits_CV.dtype)
        return (logits_CV - teacher_CV).square().mean(dim=-1)


def _logits_of(targets: BatchTargets) -> Tensor | SparseRows:
    if targets.logits is None:
        raise ValueError("the batch carries no logit targets; teach with logits=True")
    return targets.logits


def _last_kept(teacher: Tensor | SparseRows) -> int:
    """Return the largest token that was kept. Once per batch: a GPU is waited for here."""
    if isinstance(teacher, Tensor) or not teacher.columns_N.numel():
        return 0
    return int(teacher.columns_N.max())


def _check_width(teacher_AV: Tensor, vocab_size: int) -> None:
    if teacher_AV.shape[-1] != vocab_size:
        raise DataError(
            f"teacher logits have {teacher_AV.shape[-1]} entries and the student {vocab_size}; they "
            "must share a vocabulary: teach again with the model that is trained"
        )


def answer_nll(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return `AnswerNLL` on whole logits of any float dtype, at least as wide as the labels.

    Returns:
        Sum per batch row [B] in float32 (float64 for float64 logits), and number of tokens [B].
    """
    return _sum_and_count(AnswerNLL(labels_BT), logits_BTV)


def logit_kl(logits_BTV: Tensor, targets: BatchTargets) -> tuple[Tensor, Tensor]:
    """Return `LogitKL` on whole logits: sum per batch row [B], and number of positions [B]."""
    return _sum_and_count(LogitKL(targets), logits_BTV)


def logit_mse(logits_BTV: Tensor, targets: BatchTargets) -> tuple[Tensor, Tensor]:
    """Return `LogitMSE` on whole logits: sum per batch row [B], and number of positions [B]."""
    return _sum_and_count(LogitMSE(targets), logits_BTV)


def _sum_and_count(loss: PositionLoss, logits_BTV: Tensor) -> tuple[Tensor, Tensor]:
    answers = WholeLogits(logits_BTV)
    (sums_B,) = answers.sums(loss)
    return sums_B, torch.bincount(loss.row_A, minlength=answers.num_rows)


def weights_kl(recorded_BS: Tensor, weights_BS: Tensor) -> Tensor:
    """Return KL(recorded || current) of weights over blocks, per row.

    Args:
        recorded_BS: Of the blocks there were; later ones count as zero.
        weights_BS: Of all blocks, each above 0.
    """
    missing = weights_BS.shape[1] - recorded_BS.shape[1]
    recorded_BS = functional.pad(recorded_BS, (0, missing)).to(weights_BS)
    return (torch.xlogy(recorded_BS, recorded_BS) - torch.xlogy(recorded_BS, weights_BS)).sum(-1)


def own_block_nll(weights_BS: Tensor) -> Tensor:
    """Return KL(newest block alone || current) of weights over blocks, per row: -log a_own.

    Args:
        weights_BS: Of all blocks, the newest last, each above 0.
    """
    return -weights_BS[:, -1].log()
