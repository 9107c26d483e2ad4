"""Losses against sums over single tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seekr.answers import WholeLogits
from seekr.batch_targets import BatchTargets, collate_targets
from seekr.errors import DataError
from seekr.losses import (
    AnswerNLL,
    LogitKL,
    LogitMSE,
    answer_nll,
    answer_positions,
    logit_kl,
    logit_mse,
)
from seekr.sparse_rows import SparseRows, keep_largest
from seekr.teacher import Keep, teach_batch
from tests.seekr import reference, tiny

SIDES = ["left", "right"]


def logits_of(batch, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.input_ids_BT.shape, tiny.VOCAB)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def targets_of(batch, shift: bool = True, keep: int | None = None) -> BatchTargets:
    model = tiny.build("llama2-gqa", seed=1)
    taught = teach_batch(model, batch, None, [], logits=True, shift=shift, keep=Keep(logits=keep))
    return collate_targets(taught, batch)


def sparse_targets(rows: SparseRows, num_positions: int) -> BatchTargets:
    """Targets of one batch row whose positions are 0, 1, 2 ..."""
    index = torch.arange(num_positions)
    return BatchTargets(
        heads_by_layer={},
        positions_BQ=torch.zeros(1, 0, dtype=torch.int64),
        attention={},
        valid={},
        logits=rows,
        logit_row_A=torch.zeros_like(index),
        logit_position_A=index,
    )


def draw_teacher(
    positions: int, vocab: int, keep: int, seed: int
) -> tuple[BatchTargets, torch.Tensor]:
    """Return targets of `keep` entries per position on average, and the whole distributions."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(positions, vocab, generator=generator, dtype=torch.float64) * 3
    whole = scores.softmax(dim=-1)
    rows = keep_largest(whole, torch.full((positions,), vocab), keep)
    return sparse_targets(rows, positions), whole


def student_of(positions: int, vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(1, positions, vocab, generator=generator, dtype=torch.float64) * 2


def merged_kl(teacher: SparseRows, at: int, student_V: torch.Tensor) -> float:
    """KL of one position, all tokens that the teacher did not keep being one outcome."""
    row = teacher.cut(at, at + 1)
    kept = row.columns_N.tolist()
    p = [*row.values_N.tolist(), float(row.tail_R[0])]
    q = student_V.softmax(dim=-1).tolist()
    rest = [q[token] for token in range(len(q)) if token not in kept]
    return reference.kl(np.array(p), np.array([*(q[token] for token in kept), sum(rest)]))


@pytest.mark.parametrize("side", SIDES)
def test_answer_nll_sums_minus_log_p_of_each_answer_token(side) -> None:
    batch = tiny.batch(side, multiple_of=4)
    logits = logits_of(batch)
    nll_B, count_B = answer_nll(logits, batch.labels_BT)
    for index, row in enumerate(tiny.rows()):
        start = int(batch.start_B[index])
        own = logits[index, start : start + len(row.input_ids)]
        expected, count = reference.answer_loss(own, row)
        assert math.isclose(nll_B[index], expected, rel_tol=1e-9)
        assert count_B[index] == count


def test_answer_nll_equals_the_mean_loss_of_transformers() -> None:
    batch = tiny.batch("right")
    model = tiny.build("llama2-gqa", exact=False)
    out = model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT)
    nll_B, count_B = answer_nll(out.logits, batch.labels_BT)
    torch.testing.assert_close(nll_B.sum() / count_B.sum(), out.loss, rtol=1e-6, atol=0)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    batch = tiny.batch()
    logits = logits_of(batch, dtype=torch.bfloat16)
    found, _ = answer_nll(logits, batch.labels_BT)
    assert found.dtype == torch.float32
    expected, _ = answer_nll(logits.double(), batch.labels_BT)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_rows_without_answers_count_zero() -> None:
    batch = tiny.batch()
    labels_BT = batch.labels_BT.clone()
    labels_BT[1] = -100
    nll_B, count_B = answer_nll(logits_of(batch), labels_BT)
    assert nll_B[1] == 0 and count_B.tolist() == [2, 0, 2]


def test_shifted_positions_lie_one_before_the_answer_tokens() -> None:
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]])
    shifted, unshifted = answer_positions(labels), answer_positions(labels, shift=False)
    assert [part.tolist() for part in shifted] == [[0, 0, 1], [1, 2, 0]]
    assert [part.tolist() for part in unshifted] == [[0, 0, 1], [2, 3, 1]]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_logit_kl_and_mse_equal_sums_over_positions(side, shift: bool) -> None:
    batch = tiny.batch(side, multiple_of=4)
    logits = logits_of(batch)
    slow = tiny.build("llama2-gqa", attention="reference", seed=1)
    targets = targets_of(batch, shift)
    kl_B, count_B = logit_kl(logits, targets)
    mse_B, mse_count_B = logit_mse(logits, targets)
    for index, row in enumerate(tiny.rows()):
        start = int(batch.start_B[index])
        teacher = reference.forward(slow, row)[0].detach()
        kl = mse = 0.0
        for position in range(row.prompt_length, len(row.input_ids)):
            at = position - 1 if shift else position
            student = logits[index, start + at]
            p, q = teacher[at].softmax(dim=-1), student.softmax(dim=-1)
            kl += reference.kl(p.numpy(), q.numpy())
            mse += float(((teacher[at] - student) ** 2).sum()) / tiny.VOCAB
        assert math.isclose(kl_B[index], kl, rel_tol=1e-6)
        assert math.isclose(mse_B[index], mse, rel_tol=1e-6)
        assert count_B[index] == mse_count_B[index] == 2


def test_a_student_equal_to_its_teacher_has_no_logit_loss_under_either_padding() -> None:
    left, right = tiny.batch("left"), tiny.batch("right")
    taught = teach_batch(tiny.build("llama2-gqa"), left, None, [], logits=True)
    model = tiny.build("llama2-gqa")
    logits = model(right.input_ids_BT, attention_mask=right.attention_mask_BT).logits
    targets = collate_targets(taught, right)
    for loss in (logit_kl, logit_mse):
        torch.testing.assert_close(
            loss(logits, targets)[0], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_gradient_of_logit_kl_is_the_difference_of_probabilities() -> None:
    batch = tiny.batch()
    logits = logits_of(batch).requires_grad_()
    targets = targets_of(batch)
    logit_kl(logits, targets)[0].sum().backward()
    expected = torch.zeros_like(logits)
    at = (targets.logit_row_A, targets.logit_position_A)
    expected[at] = (logits[at].softmax(dim=-1) - targets.logits.softmax(dim=-1)).detach()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    positions=st.integers(1, 4),
    vocab=st.integers(2, 12),
    keep=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_logit_kl_with_a_tail_merges_what_was_not_kept_into_one_outcome(
    positions: int, vocab: int, keep: int, seed: int
) -> None:
    targets, whole = draw_teacher(positions, vocab, keep, seed)
    student = student_of(positions, vocab, seed)
    total_B, count_B = logit_kl(student, targets)
    expected = sum(merged_kl(targets.logits, at, student[0, at]) for at in range(positions))
    assert math.isclose(total_B[0], expected, rel_tol=1e-9, abs_tol=1e-12)
    assert count_B.tolist() == [positions]
    full = sum(
        reference.kl(whole[at].numpy(), student[0, at].softmax(dim=-1).numpy())
        for at in range(positions)
    )
    assert -1e-12 <= float(total_B[0]) <= full + 1e-9
    if keep >= vocab:
        assert math.isclose(total_B[0], full, rel_tol=1e-9, abs_tol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    positions=st.integers(1, 3),
    vocab=st.integers(2, 7),
    keep=st.integers(1, 7),
    seed=st.integers(0, 10**6),
)
def test_the_gradient_of_logit_kl_with_a_tail_is_that_of_its_values(
    positions: int, vocab: int, keep: int, seed: int
) -> None:
    targets, _ = draw_teacher(positions, vocab, keep, seed)
    student = student_of(positions, vocab, seed).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: logit_kl(logits, targets)[0], (student,))


def test_the_gradient_under_a_tail_asks_nothing_of_how_the_student_spreads_its_own() -> None:
    targets, _ = draw_teacher(3, 9, 2, 0)
    student = student_of(3, 9, 0).requires_grad_()
    logit_kl(student, targets)[0].sum().backward()
    kept = targets.logits.dense_RC(9) > 0
    probabilities = student.detach()[0].softmax(dim=-1)
    assert targets.logits.tail_R.all()
    for at in range(3):
        rest = probabilities[at][~kept[at]]
        wanted = rest - targets.logits.tail_R[at] * rest / rest.sum()
        torch.testing.assert_close(student.grad[0, at][~kept[at]], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keep", [1, 3, tiny.VOCAB])
def test_a_student_with_its_teachers_probabilities_has_no_loss_and_no_gradient(keep: int) -> None:
    targets, whole = draw_teacher(5, tiny.VOCAB, keep, 3)
    student = whole.log()[None].requires_grad_()
    total_B, _ = logit_kl(student, targets)
    total_B.sum().backward()
    assert abs(total_B.item()) < 1e-12 and float(student.grad.abs().max()) < 1e-12


def test_a_position_may_keep_nothing_everything_or_all_but_a_hair() -> None:
    rows = SparseRows(
        columns_N=torch.tensor([0, 1, 2, 0, 1]),
        values_N=torch.tensor([0.5, 0.25, 0.25, 0.5, 0.5 - 1e-13], dtype=torch.float64),
        offsets=torch.tensor([0, 0, 3, 5]),
        tail_R=torch.tensor([1.0, 0.0, 1e-13], dtype=torch.float64),
    )
    targets = sparse_targets(rows, 3)
    student = student_of(3, 3, 7).requires_grad_()
    total_B, _ = logit_kl(student, targets)
    expected = sum(merged_kl(rows, at, student[0, at]) for at in range(3))
    assert math.isclose(total_B.item(), expected, rel_tol=1e-9)
    total_B.sum().backward()
    assert bool(torch.isfinite(student.grad).all())
    assert float(student.grad[0, 0].abs().max()) < 1e-15  # one outcome of mass 1 says nothing
    with torch.no_grad():
        student[0, :, 2] = -800.0  # outside the kept ones nothing is left in float64
    far = student.detach().requires_grad_()
    logit_kl(far, targets)[0].sum().backward()
    assert bool(torch.isfinite(far.grad).all())


@pytest.mark.parametrize("side", SIDES)
def test_kept_logits_of_a_batch_are_compared_row_by_row(side) -> None:
    batch = tiny.batch(side, multiple_of=4)
    logits, targets = logits_of(batch), targets_of(batch, keep=4)
    kl_B, count_B = logit_kl(logits, targets)
    expected = [0.0] * 3
    both = zip(targets.logit_row_A.tolist(), targets.logit_position_A.tolist(), strict=True)
    for at, (row, position) in enumerate(both):
        expected[row] += merged_kl(targets.logits, at, logits[row, position])
    np.testing.assert_allclose(kl_B, expected, rtol=1e-9)
    assert count_B.tolist() == [2, 2, 2]


def test_bfloat16_students_are_compared_in_float32() -> None:
    batch = tiny.batch()
    logits = logits_of(batch, dtype=torch.bfloat16)
    for keep in (None, 4):
        targets = targets_of(batch, keep=keep)
        found, _ = logit_kl(logits, targets)
        assert found.dtype == torch.float32
        expected, _ = logit_kl(logits.double(), targets)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_other_vocabularies_and_missing_targets_are_refused() -> None:
    batch = tiny.batch()
    with pytest.raises(DataError, match="29 entries and the student 28"):
        logit_kl(logits_of(batch)[..., :28], targets_of(batch))
    with pytest.raises(ValueError, match="no logit targets"):
        logit_mse(logits_of(batch), collate_targets([None] * 3, batch))


def test_a_kept_token_outside_the_students_vocabulary_is_refused() -> None:
    targets, _ = draw_teacher(4, 12, 12, 0)
    with pytest.raises(DataError, match=r"kept token 11 and the student has tokens 0\.\.10"):
        logit_kl(student_of(4, 11, 0), targets)


def test_a_distance_of_logits_needs_whole_ones() -> None:
    batch = tiny.batch()
    with pytest.raises(DataError, match=r"whole logits are needed.*logits_kept null"):
        logit_mse(logits_of(batch), targets_of(batch, keep=4))


def test_a_batch_row_without_a_target_counts_nothing() -> None:
    batch = tiny.batch()
    model = tiny.build("llama2-gqa", seed=1)
    taught: list[Any] = teach_batch(model, batch, None, [], logits=True, keep=Keep(logits=4))
    every = collate_targets(taught, batch)
    two = collate_targets([taught[0], None, taught[2]], batch)
    logits = logits_of(batch)
    (all_B, _), (two_B, count_B) = logit_kl(logits, every), logit_kl(logits, two)
    assert count_B.tolist() == [2, 0, 2] and two_B[1] == 0
    assert torch.equal(two_B[[0, 2]], all_B[[0, 2]])


def test_losses_that_share_a_reading_of_the_logits_are_the_same_with_the_same_gradient() -> None:
    batch = tiny.batch()
    apart = logits_of(batch).requires_grad_()
    shared = apart.detach().clone().requires_grad_()
    targets, late = targets_of(batch), targets_of(batch, shift=False)
    nll_B, _ = answer_nll(apart, batch.labels_BT)
    kl_B, _ = logit_kl(apart, targets)
    mse_B, _ = logit_mse(apart, late)
    losses = (AnswerNLL(batch.labels_BT), LogitMSE(late), LogitKL(targets))
    together = WholeLogits(shared).sums(*losses)
    for found_B, expected_B in zip(together, (nll_B, mse_B, kl_B), strict=True):
        assert torch.equal(found_B, expected_B)
    (nll_B + 2 * kl_B + 3 * mse_B).sum().backward()
    (together[0] + 2 * together[2] + 3 * together[1]).sum().backward()
    torch.testing.assert_close(apart.grad, shared.grad)


class Reads:
    """Logits that count how often they are read."""

    def __init__(self, logits_BTV: torch.Tensor) -> None:
        self.logits_BTV, self.shape, self.times = logits_BTV, logits_BTV.shape, 0

    def __getitem__(self, at: Any) -> torch.Tensor:
        self.times += 1
        return self.logits_BTV[at]


def test_losses_at_the_same_positions_read_the_logits_once() -> None:
    batch = tiny.batch()
    for shift, times in ((True, 1), (False, 2)):
        reads: Any = Reads(logits_of(batch))
        losses = AnswerNLL(batch.labels_BT), LogitKL(targets_of(batch, shift))
        WholeLogits(reads).sums(*losses)
        assert reads.times == times


@pytest.mark.parametrize("keep", [None, 4])
def test_a_part_of_the_positions_gives_that_part_of_the_values(keep: int | None) -> None:
    batch = tiny.batch()
    targets = targets_of(batch, keep=keep)
    losses = [AnswerNLL(batch.labels_BT), LogitKL(targets)]
    losses += [LogitMSE(targets)] if keep is None else []
    for loss in losses:
        logits_AV = logits_of(batch)[loss.row_A, loss.position_A]
        whole_A = loss(logits_AV, slice(0, 6))
        parts = [loss(logits_AV[i:j], slice(i, j)) for i, j in ((0, 1), (1, 1), (1, 4), (4, 6))]
        torch.testing.assert_close(torch.cat(parts), whole_A, rtol=1e-13, atol=1e-15)
