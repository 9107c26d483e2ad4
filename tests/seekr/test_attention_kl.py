"""KL of attention rows, by every backend, against numbers added up one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seekr import attention_kl_tiled
from seekr.attention_kl import Backend, Geometry, Teacher, attention_kl, reduce_attention_kl
from seekr.errors import DataError
from seekr.spans import Spans
from tests.seekr import reference
from tests.seekr.kl_problems import MASKS, Problem, problem, teacher_pair, teacher_rows

BACKENDS: tuple[Backend, ...] = ("reference", "tiled")
KINDS = ("whole", "tail", "pair")
EPSILONS = (0.0, 1e-8, 1e-2)


def teacher_of(kind: str, given_problem: Problem) -> tuple[Teacher, Tensor]:
    """Return (teacher, its rows as probabilities [B,S,Q,T + 1], the last being the tail)."""
    if kind == "pair":
        return teacher_pair(given_problem)
    return teacher_rows(given_problem, keep=2 if kind == "tail" else None)


def slow_kl(given_problem: Problem, target_BSQC: Tensor, epsilon: float) -> Tensor:
    """Return [B,S,Q] by loops: the columns of a row's tail are one outcome of the student, too."""
    student_BSQT = given_problem.student_rows()
    expected = torch.zeros(student_BSQT.shape[:-1], dtype=torch.float64)
    for b, s, q in np.ndindex(*expected.shape):
        target = target_BSQC[b, s, q].detach().numpy()
        p = student_BSQT[b, s, q].detach().numpy()
        kept = target[:-1] > 0
        rest = p[~kept].sum() if target[-1] > 0 else 1.0
        theirs, ours = np.append(target[:-1][kept], target[-1]), np.append(p[kept], rest)
        expected[b, s, q] = reference.kl(theirs, ours, epsilon)
    return expected


@settings(max_examples=60, deadline=None)
@given(
    mask=st.sampled_from(MASKS),
    tokens=st.integers(1, 9),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    chosen=st.sets(st.integers(0, 3), min_size=1),
    all_queries=st.booleans(),
    kind=st.sampled_from(KINDS),
    epsilon=st.sampled_from(EPSILONS),
    seed=st.integers(0, 1000),
)
def test_every_backend_equals_the_loops_for_any_shape_mask_and_teacher(
    mask: str, tokens: int, heads: Any, chosen: Any, all_queries: bool, kind, epsilon, seed
) -> None:
    drawn = problem(mask, tokens, heads, tuple(sorted(chosen)), all_queries, seed)
    teacher, target = teacher_of(kind, drawn)
    expected = slow_kl(drawn, target, epsilon)
    for backend in BACKENDS:
        found = attention_kl(drawn.query, drawn.key, teacher, drawn.geometry(epsilon), backend)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_equal_finite_differences(mask: str, kind: str, epsilon: float) -> None:
    drawn = problem(mask, 6, (4, 2), (0, 2, 3), all_queries=False, seed=5)
    teacher, _ = teacher_of(kind, drawn)
    query, key = drawn.query.requires_grad_(), drawn.key.requires_grad_()
    weight = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(1)).double()
    for backend in BACKENDS:

        def loss(query: Tensor, key: Tensor, backend: Backend = backend) -> Tensor:
            kl = attention_kl(query, key, teacher, drawn.geometry(epsilon), backend)
            return (kl * weight).sum()

        assert torch.autograd.gradcheck(
            loss, (query, key), rtol=1e-6, atol=1e-8, fast_mode=mask != "window"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_size_of_tiles_does_not_matter(mask: str, kind: str, monkeypatch) -> None:
    drawn = problem(mask, 40, (4, 2), (0, 1, 3), all_queries=True, seed=2)
    teacher, _ = teacher_of(kind, drawn)
    expected = value_and_gradients(drawn, teacher, "reference")
    for elements, rows in ((1, 1), (100, 3), (1 << 18, 64), (1 << 18, 1000)):
        monkeypatch.setattr(attention_kl_tiled, "TILE_ELEMENTS", elements)
        monkeypatch.setattr(attention_kl_tiled, "_QUERY_ROWS", rows)
        for found, wanted in zip(
            value_and_gradients(drawn, teacher, "tiled"), expected, strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def value_and_gradients(
    given_problem: Problem, teacher: Teacher, backend: Backend, *, autocast: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    query = given_problem.query.detach().clone().requires_grad_()
    key = given_problem.key.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kl = attention_kl(query, key, teacher, given_problem.geometry(), backend)
    weight = torch.linspace(0.5, 1.5, kl.numel(), dtype=kl.dtype).view_as(kl)
    (kl * weight).sum().backward()
    assert query.grad is not None and key.grad is not None
    return kl.detach(), query.grad, key.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_numbers_are_compared_in_float32(dtype, kind: str, backend: Backend) -> None:
    drawn = problem("left", 33, (4, 2), (0, 2), all_queries=True, seed=4).to(dtype)
    wide = drawn.to(torch.float64)
    teacher, _ = teacher_of(kind, wide)
    kl, *gradients = value_and_gradients(drawn, teacher, backend)
    expected, *wanted = value_and_gradients(wide, teacher, "reference")
    assert kl.dtype == torch.float32 and {g.dtype for g in gradients} == {dtype}
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-5)
    step = 1e-4 if dtype == torch.float32 else 1e-2
    for found, slow in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(
            found.double(), slow, rtol=step, atol=step * float(slow.abs().max())
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_bit_of_bfloat16_input(kind: str, backend: Backend) -> None:
    drawn = problem("packed", 20, (4, 2), (1, 2), all_queries=True, seed=6).to(torch.bfloat16)
    teacher, _ = teacher_of(kind, drawn.to(torch.float64))
    expected = value_and_gradients(drawn, teacher, backend)
    found = value_and_gradients(drawn, teacher, backend, autocast=True)
    wide = value_and_gradients(drawn.to(torch.float32), teacher, backend)
    assert torch.equal(found[0], wide[0])
    for with_autocast, without in zip(found, expected, strict=True):
        assert torch.equal(with_autocast, without)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_teacher_that_equals_the_student_costs_nothing_and_pulls_nowhere(mask, backend) -> None:
    drawn = problem(mask, 12, (4, 2), (0, 3), all_queries=True, seed=8)
    for keep in (None, 3):
        teacher, _ = teacher_rows(drawn, keep, of_student=True)
        for part in value_and_gradients(drawn, teacher, backend):
            torch.testing.assert_close(part, torch.zeros_like(part), rtol=0, atol=1e-12)
    pair, _ = teacher_pair(drawn, of_student=True)
    for part in value_and_gradients(drawn, pair, backend):
        torch.testing.assert_close(part, torch.zeros_like(part), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(mask=st.sampled_from(MASKS), keep=st.integers(1, 9), seed=st.integers(0, 1000))
def test_a_tail_never_costs_more_than_what_it_stands_for(mask: str, keep: int, seed: int) -> None:
    drawn = problem(mask, 9, (4, 2), (0, 1), all_queries=True, seed=seed)
    whole, merged = (
        attention_kl(drawn.query, drawn.key, teacher_rows(drawn, some)[0], drawn.geometry())
        for some in (None, keep)
    )
    assert (merged <= whole + 1e-12).all() and (merged >= -1e-12).all()


def test_the_direction_is_from_teacher_to_student() -> None:
    drawn = problem("causal", 2, (1, 1), (0,), all_queries=True, seed=0)
    drawn.key[0, 0] = torch.tensor([[1.0, 0, 0], [0.0, 0, 0]])
    drawn.query[0, 0, 1] = (
        torch.tensor([math.log(9.0), 0, 0], dtype=torch.float64) / drawn.scaling
    )  # (0.9, 0.1)
    teacher, target = teacher_rows(drawn, None)
    t = target[0, 0, 1]
    expected = t[0] * math.log(t[0] / 0.9) + t[1] * math.log(t[1] / 0.1)
    for backend in BACKENDS:
        kl = attention_kl(drawn.query, drawn.key, teacher, drawn.geometry(), backend)
        assert kl[0, 0, 0] == 0.0
        assert math.isclose(kl[0, 0, 1], expected, rel_tol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_any_size_give_finite_numbers(kind: str) -> None:
    drawn = problem("window", 12, (4, 2), (0, 3), all_queries=True, seed=3).to(torch.float32)
    drawn.query.mul_(1000)
    teacher, _ = teacher_of(kind, drawn.to(torch.float64))
    for backend in BACKENDS:
        for part in value_and_gradients(drawn, teacher, backend):
            assert part.isfinite().all()


def test_a_key_that_the_student_may_not_look_at_costs_infinity() -> None:
    drawn = problem("causal", 6, (2, 2), (0, 1), all_queries=True, seed=1)
    drawn = replace(drawn, positions_BQ=drawn.positions_BQ[:, 1:])
    teacher, target = teacher_rows(drawn, None)
    everywhere = Spans(drawn.spans.first_BT.clamp(min=1), drawn.spans.last_BT)
    narrow = replace(drawn, spans=everywhere).geometry()
    kl = attention_kl(drawn.query, drawn.key, teacher, narrow, "reference")
    assert torch.equal(kl == math.inf, target[..., 0] > 0)
    # Where no row of a tile may look at it, the target is somebody else's.
    with pytest.raises(DataError, match=r"keeps a key outside 1\.\.5"):
        attention_kl(drawn.query, drawn.key, teacher, narrow, "tiled")
    first_BT = drawn.spans.first_BT.clone()
    first_BT[:, 3] = 2
    one = replace(drawn, spans=Spans(first_BT, drawn.spans.last_BT)).geometry()
    for backend in BACKENDS:
        kl = attention_kl(drawn.query, drawn.key, teacher, one, backend)
        assert (kl == math.inf).nonzero()[:, 2].unique().tolist() == [2]


def test_teacher_rows_of_queries_that_are_missing_or_see_nothing_are_refused() -> None:
    drawn = problem("causal", 6, (2, 2), (0, 1), all_queries=True, seed=1)
    teacher, _ = teacher_rows(drawn, None)
    last_BT, positions_BQ = drawn.spans.last_BT.clone(), drawn.positions_BQ.clone()
    last_BT[1, 2], positions_BQ[1, 5] = -1, -1
    blind = replace(drawn, spans=Spans(drawn.spans.first_BT, last_BT))
    for wrong in (blind, replace(drawn, positions_BQ=positions_BQ)):
        with pytest.raises(DataError, match=r"batch row 1 .* teach the row again"):
            attention_kl(drawn.query, drawn.key, teacher, wrong.geometry(), "tiled")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_beside_which_nothing_is_left_is_rounding_and_costs_nothing(backend) -> None:
    drawn = problem("window", 8, (4, 2), (0, 3), all_queries=True, seed=2)
    teacher, target = teacher_rows(drawn, None)
    present = target.sum(dim=-1).flatten() > 0
    rounded = replace(teacher, tail_R=teacher.tail_R.masked_fill(present, 1e-3))
    exact = value_and_gradients(drawn, teacher, backend)
    for found, wanted in zip(value_and_gradients(drawn, rounded, backend), exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_query_rows_at_all_cost_nothing(backend: Backend) -> None:
    drawn = problem("causal", 4, (4, 2), (0, 1), all_queries=True, seed=2)
    drawn = replace(drawn, positions_BQ=drawn.positions_BQ[:, :0])
    teacher, _ = teacher_rows(drawn, None)
    kl, *gradients = value_and_gradients(drawn, teacher, backend)
    assert kl.shape == (2, 2, 0) and not any(gradient.any() for gradient in gradients)


class LargestTensor(TorchDispatchMode):
    """Records the most numbers that any tensor made inside had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("kind", ["tail", "pair"])
def test_no_tensor_is_larger_than_a_tile_or_the_inputs(kind: str, monkeypatch) -> None:
    tokens, elements = 512, 1 << 15
    monkeypatch.setattr(attention_kl_tiled, "TILE_ELEMENTS", elements)
    drawn = problem("causal", tokens, (4, 2), (0, 1, 3), all_queries=True, seed=0)
    drawn = drawn.to(torch.float32)
    teacher, _ = teacher_of(kind, drawn)
    bound = max(elements, attention_kl_tiled._QUERY_ROWS * tokens, drawn.query.numel() * 3)
    assert bound < tokens * tokens / 4
    with LargestTensor() as tiled:
        value_and_gradients(drawn, teacher, "tiled")
    with LargestTensor() as whole:
        value_and_gradients(drawn, teacher, "reference")
    # Entry indices are int64, twice as long as a float32.
    assert tiled.numel <= 2 * bound < tokens * tokens < whole.numel


def test_heads_rows_and_backends_that_do_not_exist_are_refused() -> None:
    drawn = problem("causal", 4, (4, 2), (0, 1), all_queries=True, seed=0)
    teacher, _ = teacher_rows(drawn, None)
    pair, _ = teacher_pair(drawn)
    far = Geometry(
        heads=(0, 4),
        positions_BQ=drawn.positions_BQ,
        spans=drawn.spans,
        scaling=drawn.scaling,
    )
    with pytest.raises(ValueError, match=r"heads 0\.\.3; asked for \(0, 4\)"):
        attention_kl(drawn.query, drawn.key, teacher, far)
    fewer = problem("causal", 4, (4, 2), (0,), all_queries=True, seed=0).geometry()
    for given_teacher in (teacher, pair):
        with pytest.raises(ValueError, match="16 teacher rows for 2 batch rows x 1 heads x 4"):
            attention_kl(drawn.query, drawn.key, given_teacher, fewer)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        attention_kl(drawn.query, drawn.key[:, [0, 0, 0]], teacher, drawn.geometry())
    with pytest.raises(ValueError, match="'numpy' is unknown"):
        attention_kl(drawn.query, drawn.key, teacher, drawn.geometry(), "numpy")  # pyright: ignore


@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 3)] * 3), seed=st.integers(0, 1000), per_head=st.booleans())
def test_reductions_equal_sums_and_means_over_what_is_valid(
    shape: tuple[int, int, int], seed: int, per_head: bool
) -> None:
    batch, heads, queries = shape
    generator = torch.Generator().manual_seed(seed)
    kl = torch.rand(shape, generator=generator, dtype=torch.float64)
    size = shape if per_head else (batch, queries)
    valid = torch.rand(size, generator=generator) < 0.7
    valid_BSQ = valid if per_head else valid[:, None].expand(-1, heads, -1)
    for reduction in ("sum", "mean"):
        reduced = reduce_attention_kl({4: kl}, {4: valid}, reduction)
        for b in range(batch):
            own = kl[b][valid_BSQ[b]]
            wanted = own.sum() if reduction == "sum" or not len(own) else own.mean()
            assert math.isclose(reduced[b], wanted, rel_tol=1e-9, abs_tol=1e-12)


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
        reduce_attention_kl({0: torch.ones(1, 1, 1)}, {0: torch.ones(1, 1).bool()}, "median")  # pyright: ignore
    with pytest.raises(ValueError, match="no attention layer"):
        reduce_attention_kl({}, {})
