"""KL of attention rows against numbers added up one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seekr.attention import probing, token_positions
from seekr.attention_kl import attention_kl, reduce_attention_kl
from seekr.batch_targets import collate_targets
from seekr.probes import RowProbe, masked_log_softmax
from seekr.teacher import teach_batch
from tests.seekr import reference, tiny


def draw_rows(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (teacher probabilities, student scores, allowed) with entries masked at random."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(shape, generator=generator) < 0.7
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2)]
    return masked_log_softmax(draw[0], allowed).exp(), draw[1], allowed


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 6)),
    seed=st.integers(0, 1000),
    epsilon=st.sampled_from([0.0, 1e-8, 1e-3]),
    per_head=st.booleans(),
)
def test_kl_and_reductions_equal_the_reference_for_any_shape_and_mask(
    shape: tuple[int, int, int, int], seed: int, epsilon: float, per_head: bool
) -> None:
    batch, heads, queries, _ = shape
    teacher, scores, allowed = draw_rows(shape, seed)
    log_student = masked_log_softmax(scores, allowed)
    generator = torch.Generator().manual_seed(seed + 1)
    size = (batch, heads, queries) if per_head else (batch, queries)
    valid = torch.rand(size, generator=generator) < 0.7
    found = attention_kl(teacher, log_student, valid, epsilon=epsilon)
    expected = torch.zeros(batch, heads, queries, dtype=torch.float64)
    valid_BSQ = valid if per_head else valid[:, None].expand(-1, heads, -1)
    for b, s, q in valid_BSQ.nonzero().tolist():
        p, log_q = teacher[b, s, q].numpy(), log_student[b, s, q].numpy()
        expected[b, s, q] = reference.kl(p, np.exp(log_q), epsilon)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    for reduction in ("sum", "mean"):
        reduced = reduce_attention_kl({4: found}, {4: valid}, reduction)
        for b in range(batch):
            own = expected[b][valid_BSQ[b]]
            wanted = own.sum() if reduction == "sum" or not len(own) else own.mean()
            assert math.isclose(reduced[b], wanted, rel_tol=1e-9, abs_tol=1e-12)


def test_kl_is_from_teacher_to_student_and_zero_only_where_they_agree() -> None:
    teacher = torch.tensor([[[[0.5, 0.5]]]], dtype=torch.float64)
    student = torch.tensor([[[[0.9, 0.1]]]], dtype=torch.float64).log()
    valid = torch.ones(1, 1, dtype=torch.bool)
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert math.isclose(attention_kl(teacher, student, valid).item(), expected, rel_tol=1e-12)
    assert attention_kl(teacher, teacher.log(), valid).item() == 0.0


def test_a_key_the_student_cannot_see_costs_infinity_or_log_epsilon() -> None:
    teacher = torch.tensor([[[[0.25, 0.75]]]], dtype=torch.float64)
    student = torch.tensor([[[[-math.inf, 0.0]]]], dtype=torch.float64, requires_grad=True)
    valid = torch.ones(1, 1, dtype=torch.bool)
    assert attention_kl(teacher, student, valid).item() == math.inf
    bounded = attention_kl(teacher, student, valid, epsilon=1e-8)
    bounded.sum().backward()
    expected = reference.kl(np.array([0.25, 0.75]), np.array([0.0, 1.0]), 1e-8)
    assert math.isclose(bounded.item(), expected, rel_tol=1e-9)
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_gradient_equals_finite_differences_and_skips_masked_entries(epsilon: float) -> None:
    teacher, scores, allowed = draw_rows((2, 2, 3, 5), seed=7)
    allowed[0, 0, 0] = False
    teacher = teacher.masked_fill(~allowed, 0.0)
    valid = torch.tensor([[True, True, False], [True, True, True]])

    def loss(values: Tensor) -> Tensor:
        return attention_kl(teacher, masked_log_softmax(values, allowed), valid, epsilon=epsilon)

    scores.requires_grad_()
    assert torch.autograd.gradcheck(loss, scores, rtol=1e-6, atol=1e-8)
    loss(scores).sum().backward()
    assert scores.grad is not None
    assert (scores.grad[~allowed] == 0).all() and (scores.grad[0, :, 2] == 0).all()


def test_half_precision_students_are_compared_in_float32() -> None:
    teacher, scores, allowed = draw_rows((1, 1, 2, 4), seed=1)
    student = masked_log_softmax(scores, allowed)
    valid = torch.ones(1, 2, dtype=torch.bool)
    found = attention_kl(teacher.half(), student.half(), valid)
    assert found.dtype == torch.float32
    expected = attention_kl(teacher.half().double(), student.half().double(), valid)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_mean_weighs_a_layer_with_one_head_like_a_layer_with_many() -> None:
    kl = {0: torch.full((1, 1, 2), 3.0), 5: torch.full((1, 4, 2), 1.0)}
    valid = dict.fromkeys(kl, torch.ones(1, 2, dtype=torch.bool))
    assert reduce_attention_kl(kl, valid, "mean").tolist() == [2.0]
    assert reduce_attention_kl(kl, valid, "sum").tolist() == [14.0]


def test_a_row_without_targets_adds_nothing() -> None:
    kl = {0: torch.ones(2, 1, 3)}
    valid = {0: torch.tensor([[True, True, True], [False, False, False]])}
    assert reduce_attention_kl(kl, valid, "mean").tolist() == [1.0, 0.0]


def test_unknown_reductions_and_empty_selections_are_refused() -> None:
    with pytest.raises(ValueError, match="'median'"):
        reduce_attention_kl({0: torch.ones(1, 1, 1)}, {0: torch.ones(1, 1).bool()}, "median")
    with pytest.raises(ValueError, match="no attention layer"):
        reduce_attention_kl({}, {})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_distillation_equals_equation_12_row_by_row_with_heads_frozen_per_task(name, side) -> None:
    batch, rows = tiny.batch(side), tiny.rows()
    selections = [{0: (0, 3), 2: (1,)}, {2: (0, 1, 2)}, {0: (1,), 1: (2, 3)}]
    queries = [np.array([0, 4, 8]), np.array([1, 4]), np.arange(7)]
    teacher, student = tiny.build(name, seed=1), tiny.build(name)
    targets = [
        teach_batch(teacher, batch, heads, queries, logits=False)[index]
        for index, heads in enumerate(selections)
    ]
    joined = collate_targets(targets, batch)
    probe = RowProbe(joined.heads_by_layer, joined.positions_BQ)
    with probing(student, probe), torch.no_grad():
        student(
            batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=token_positions(batch.attention_mask_BT),
        )
    kl = {
        layer: attention_kl(joined.teacher_rows[layer], probe.log_rows[layer], joined.valid[layer])
        for layer in joined.heads_by_layer
    }
    slow = [tiny.build(name, attention="reference", seed=seed) for seed in (1, 0)]
    for index, row in enumerate(rows):
        expected = reference.attention_distillation(*slow, row, selections[index], queries[index])
        for reduction, wanted in zip(("sum", "mean"), expected, strict=True):
            found = reduce_attention_kl(kl, joined.valid, reduction)[index]
            assert math.isclose(found, wanted, rel_tol=1e-6)
