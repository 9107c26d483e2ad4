"""Tests of the Triton kernels by Triton's interpreter: `TRITON_INTERPRET=1 pytest <this file>`.

Triton decides when it is imported how kernels run, so these tests need a process of their own;
`test_attention_kl_triton` starts it. Not collected otherwise: the name has no `test_`.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seekr import attention_kl_triton, attention_kl_windows
from seekr.attention_kl import Geometry, Teacher, TeacherPair, attention_kl, student_log_rows
from seekr.spans import Spans, key_spans
from seekr.sparse_rows import SparseRows, keep_largest


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def some_spans(kind: str, batch: int, tokens: int) -> Spans:
    """Spans of a mask that is causal and something else."""
    query_T, key_T = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    mask_BTT = (key_T <= query_T).expand(batch, -1, -1).clone()
    if kind == "left":
        mask_BTT[1, :, : tokens // 3] = False
    elif kind == "right":
        mask_BTT[1, :, tokens // 2 :] = False
    elif kind == "window":
        mask_BTT &= key_T > query_T - 17
    elif kind == "packed":
        mask_BTT &= key_T // 23 == query_T // 23
    return key_spans(mask_BTT[:, None], batch, tokens, mask_BTT.device)


def case(
    kind: str = "causal",
    *,
    groups: int = 2,
    heads: tuple[int, ...] = (0, 2, 3),
    tokens: int = 70,
    dim: int = 24,
    positions: list[list[int]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Geometry, TeacherPair]:
    """Return (queries of 4 heads, keys, geometry, a teacher as queries and keys)."""
    positions = positions or [[0, 3, 9, 40, 64, 69], [24, 30, 34, -1, -1, -1]]
    positions_BQ = torch.tensor(positions)
    batch, num_rows = positions_BQ.shape
    geometry = Geometry(
        heads=heads,
        positions_BQ=positions_BQ,
        spans=some_spans(kind, batch, tokens),
        scaling=0.3,
    )
    per_group = 4 // groups
    their_key = draw((batch, groups, tokens, dim), 3, dtype)
    valid_BQ = positions_BQ >= 0
    pair = TeacherPair(
        query_BSQD=draw((batch, len(heads), num_rows, dim), 2, dtype),
        key_BSTD=their_key[:, [head // per_group for head in heads]],
        scaling=0.2,
        valid_BSQ=valid_BQ[:, None].expand(-1, len(heads), -1),
    )
    query = draw((batch, tokens, 4, dim), 0, dtype).transpose(1, 2)
    return query, draw((batch, groups, tokens, dim), 1, dtype), geometry, pair


def stored(pair: TeacherPair, geometry: Geometry, keep: int | None) -> SparseRows:
    """The rows of a pair, stored."""
    queries = torch.zeros(pair.key_BSTD.shape, dtype=pair.query_BSQD.dtype)
    heads = tuple(range(pair.key_BSTD.shape[1]))
    for batch, row in (geometry.positions_BQ >= 0).nonzero().tolist():
        at = geometry.positions_BQ[batch, row]
        queries[batch, :, at] = pair.query_BSQD[batch, :, row]
    own = Geometry(
        heads=heads,
        positions_BQ=geometry.positions_BQ,
        spans=geometry.spans,
        scaling=pair.scaling,
    )
    rows = student_log_rows(queries, pair.key_BSTD, own).exp().flatten(0, 2)
    return keep_largest(rows, (rows > 0).sum(dim=1), keep)


def result(
    backend: str, query: Tensor, key: Tensor, teacher: Teacher, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (KL, gradients of queries and keys of a weighted sum of its finite entries)."""
    query, key = query.clone().requires_grad_(), key.clone().requires_grad_()
    kl = attention_kl(query, key, teacher, geometry, backend)  # type: ignore[arg-type]
    weight = draw(tuple(kl.shape), 9, kl.dtype).to(kl.device)
    kl.masked_fill(kl.isinf(), 0.0).mul(weight).sum().backward()
    assert query.grad is not None and key.grad is not None
    return kl.detach(), query.grad, key.grad


def assert_same(query: Tensor, key: Tensor, teacher: Teacher, geometry: Geometry) -> None:
    """Hold the kernels to the reference, in float64."""
    expected = result("reference", query, key, teacher, geometry)
    found = result("triton", query, key, teacher, geometry)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def teachers(pair: TeacherPair, geometry: Geometry) -> dict[str, Teacher]:
    return {
        "pair": pair,
        "exact": stored(pair, geometry, None),
        "tails": stored(pair, geometry, 3),
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *product(["causal", "left", "right", "window", "packed"], ["pair", "tails"]),
        *product(["left", "packed"], ["exact"]),
    ],
)
def test_value_and_gradients_equal_the_reference_under_every_mask(kind: str, name: str) -> None:
    query, key, geometry, pair = case(kind)
    assert_same(query, key, teachers(pair, geometry)[name], geometry)


@pytest.mark.parametrize("name", ["pair", "tails"])
@pytest.mark.parametrize(
    ("groups", "heads", "dim", "tokens"),
    [(4, (1, 3), 16, 64), (1, (0, 1, 3), 40, 33), (2, (1, 2), 80, 95), (2, (0,), 5, 70)],
)
def test_any_heads_groups_and_sizes_equal_the_reference(
    groups: int, heads: tuple[int, ...], dim: int, tokens: int, name: str
) -> None:
    positions = [[5, 20, tokens - 1], [0, 32, -1]]
    query, key, geometry, pair = case(
        groups=groups, heads=heads, dim=dim, tokens=tokens, positions=positions
    )
    assert_same(query, key, teachers(pair, geometry)[name], geometry)


@pytest.mark.parametrize("name", ["pair", "tails"])
def test_many_blocks_and_windows_and_split_keys_change_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = list(range(0, 100, 2))
    query, key, geometry, pair = case(
        tokens=100, dim=16, positions=[rows, [*rows[:40], *[-1] * 10]]
    )
    teacher = teachers(pair, geometry)[name]
    expected = result("reference", query, key, teacher, geometry)
    # Stored rows: two heads a window, and 32 rows of one head a window.
    for rows_fit, splits in [(110, 3), (32, 1)] if name == "tails" else [(1, 3)]:
        monkeypatch.setattr(attention_kl_windows, "DENSE_BYTES", rows_fit * 100 * 8)
        monkeypatch.setattr(attention_kl_triton, "num_splits", lambda *_, count=splits: count)
        found = result("triton", query, key, teacher, geometry)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["pair", "tails"])
def test_float32_stays_near_float64_and_bfloat16_near_its_own_numbers(name: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        query, key, geometry, pair = case("left", dtype=dtype)
        double = case("left")[3]
        wide = TeacherPair(
            query_BSQD=pair.query_BSQD.double(),
            key_BSTD=pair.key_BSTD.double(),
            scaling=double.scaling,
            valid_BSQ=double.valid_BSQ,
        )
        found = result("triton", query, key, teachers(pair, geometry)[name], geometry)
        assert [part.dtype for part in found] == [torch.float32, dtype, dtype]
        expected = result(
            "reference", query.double(), key.double(), teachers(wide, geometry)[name], geometry
        )
        kl_tolerance = 1e-5 if name == "pair" or dtype == torch.float32 else tolerance
        torch.testing.assert_close(found[0].double(), expected[0], rtol=kl_tolerance, atol=1e-5)
        for one, other in zip(found[1:], expected[1:], strict=True):
            bound = tolerance * float(other.abs().max())
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=bound)


def test_rows_without_position_target_or_keys_are_zero_and_never_nan() -> None:
    query, key, geometry, pair = case("left", positions=[[2, 5, 69], [3, 40, -1]])
    valid_BSQ = pair.valid_BSQ.clone()
    valid_BSQ[0, 1, 1] = False
    pair = TeacherPair(
        query_BSQD=pair.query_BSQD, key_BSTD=pair.key_BSTD, scaling=0.2, valid_BSQ=valid_BSQ
    )
    rows = stored(pair, geometry, None)
    dense_RC = rows.dense_RC(70)
    dense_RC[~valid_BSQ.flatten()] = 0.0
    blank = keep_largest(dense_RC, torch.full((len(dense_RC),), 70), None)
    for teacher in (pair, blank):
        kl, grad_query, grad_key = result("triton", query, key, teacher, geometry)
        # Query 3 of the second batch row stands on padding; it may look at nothing.
        assert (kl[1, :, 0] == 0).all() and (kl[1, :, 2] == 0).all() and kl[0, 1, 1] == 0
        assert (kl[valid_BSQ & (kl != 0)] > 0).all() and (kl != 0).sum() == 11
        assert grad_query.isfinite().all() and grad_key.isfinite().all()
        assert (grad_query[1, :, 3] == 0).all() and (grad_query[1, :, 69] == 0).all()
        assert (grad_query[0, 2, 5] == 0).all() and (grad_query[:, 1] == 0).all()
        assert (grad_key[1, :, : 70 // 3] == 0).all() and (grad_key[1, :, 41:] == 0).all()


def test_a_kept_key_that_the_student_may_not_look_at_costs_infinity() -> None:
    query, key, geometry, pair = case(positions=[[4, 8], [6, 9]])
    rows = stored(pair, geometry, 3)
    columns_N = rows.columns_N.clone()
    columns_N[int(rows.offsets[1]) - 1] = 60
    rows = SparseRows(
        columns_N=columns_N, values_N=rows.values_N, offsets=rows.offsets, tail_R=rows.tail_R
    )
    kl, grad_query, grad_key = result("triton", query, key, rows, geometry)
    reference = result("reference", query, key, rows, geometry)[0]
    assert kl[0, 0, 0] == math.inf and kl.isinf().sum() == 1
    torch.testing.assert_close(kl, reference, rtol=1e-9, atol=1e-12)
    assert grad_query.isfinite().all() and grad_key.isfinite().all()


def test_gradients_are_the_same_under_activation_checkpointing() -> None:
    query, key, geometry, pair = case()
    for teacher in (pair, stored(pair, geometry, 3)):
        grads: list[Tensor] = []
        for again in (False, True):
            leaf = query.clone().requires_grad_()

            def loss(value: Tensor, teacher: Teacher = teacher) -> Tensor:
                return attention_kl(value * 2.0, key, teacher, geometry, "triton").sum()

            kl = checkpoint(loss, leaf, use_reentrant=False) if again else loss(leaf)
            kl.backward()
            assert leaf.grad is not None
            grads.append(leaf.grad)
        assert torch.equal(*grads) and (grads[0] != 0).any()
