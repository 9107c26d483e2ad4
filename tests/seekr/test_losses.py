"""Losses against sums over single tokens."""

from __future__ import annotations

import math

import pytest
import torch

from seekr.batch_targets import BatchTargets, collate_targets
from seekr.errors import DataError
from seekr.losses import answer_nll, answer_positions, logit_kl, logit_mse
from seekr.teacher import teach_batch
from tests.seekr import reference, tiny

SIDES = ["left", "right"]


def logits_of(batch, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.input_ids_BT.shape, tiny.VOCAB)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def targets_of(batch, shift: bool = True) -> BatchTargets:
    model = tiny.build("llama-gqa", seed=1)
    taught = teach_batch(model, batch, None, [], logits=True, shift=shift)
    return collate_targets(taught, batch)


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
    model = tiny.build("llama-gqa", exact=False)
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
    slow = tiny.build("llama-gqa", attention="reference", seed=1)
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
    taught = teach_batch(tiny.build("llama-gqa"), left, None, [], logits=True)
    model = tiny.build("llama-gqa")
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
    expected[at] = (logits[at].softmax(dim=-1) - targets.logits_AV.softmax(dim=-1)).detach()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)


def test_other_vocabularies_and_missing_targets_are_refused() -> None:
    batch = tiny.batch()
    with pytest.raises(DataError, match="29 entries and the student 28"):
        logit_kl(logits_of(batch)[..., :28], targets_of(batch))
    with pytest.raises(ValueError, match="no logit targets"):
        logit_mse(logits_of(batch), collate_targets([None] * 3, batch))
