"""Distributions of which few entries are kept."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seekr.sparse_rows import SparseRows, concatenate, keep_largest


def draw(rows: int, columns: int, seed: int, zeros: float = 0.0) -> Tensor:
    """Return random distributions; a share of their entries is 0, but never all of a row."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, columns, generator=generator, dtype=torch.float64) ** 4 + 1e-3
    off = torch.rand(rows, columns, generator=generator) < zeros
    off[:, 0] = False
    values = values.masked_fill(off, 0.0)
    return values / values.sum(dim=-1, keepdim=True)


def same(found: SparseRows, wanted: SparseRows) -> None:
    for field in ("columns_N", "values_N", "offsets", "tail_R"):
        assert torch.equal(getattr(found, field), getattr(wanted, field)), field


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 7),
    keep=st.none() | st.integers(1, 8),
    zeros=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 1000),
)
def test_kept_entries_and_tails_make_up_each_distribution(
    rows: int, columns: int, keep: int | None, zeros: float, seed: int
) -> None:
    dense = draw(rows, columns, seed, zeros)
    possible = (dense > 0).sum(dim=-1)
    found = keep_largest(dense, possible, keep)
    kept = found.dense_RC(columns)
    whole = int(possible.sum())
    size = whole if keep is None else min(keep * rows, whole)
    assert len(found) == rows and len(found.columns_N) == len(found.values_N) == size
    assert found.offsets.tolist()[0] == 0 and found.offsets.tolist()[-1] == size
    assert torch.equal(kept[kept > 0], dense[kept > 0])
    torch.testing.assert_close(found.mass_R(), torch.ones(rows).double(), rtol=0, atol=1e-12)
    complete = (kept > 0).sum(dim=-1) == possible
    assert (found.tail_R[complete] == 0).all() and (found.tail_R[~complete] > 0).all()
    for row in range(rows):
        columns_of_row = found.cut(row, row + 1).columns_N
        assert columns_of_row.tolist() == sorted(set(columns_of_row.tolist()))
    # No entry left out is larger than one that was kept, in whichever row.
    left = dense[(kept == 0) & (dense > 0)]
    assert not len(left) or left.max() <= found.values_N.min()


def test_no_other_choice_of_as_many_entries_loses_less_squared_probability() -> None:
    dense = draw(3, 4, seed=3)
    found = keep_largest(dense, torch.full((3,), 4), keep=2)
    lost = (dense - found.dense_RC(4)).square().sum()
    squares = dense.flatten().square()
    best = min(squares.sum() - squares[list(chosen)].sum() for chosen in combinations(range(12), 6))
    torch.testing.assert_close(lost, best, rtol=0, atol=1e-15)


def test_a_budget_is_shared_by_all_rows_so_a_flat_row_may_keep_nothing() -> None:
    dense = torch.tensor([[0.4, 0.35, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    found = keep_largest(dense, torch.tensor([3, 3]), keep=1)
    assert found.offsets.diff().tolist() == [2, 0]
    torch.testing.assert_close(found.tail_R[1], torch.tensor(1.0))


def test_a_row_that_could_have_more_outcomes_than_it_has_keeps_a_tail() -> None:
    dense = torch.tensor([[0.9, 0.1, 0.0]], dtype=torch.float64)
    assert keep_largest(dense, torch.tensor([2]), keep=1).tail_R.item() == pytest.approx(0.1)
    assert keep_largest(dense, torch.tensor([2]), keep=2).tail_R.item() == 0.0
    # All that is not 0 is kept, so nothing was lost but rounding: None means exact.
    assert keep_largest(dense, torch.tensor([3]), None).tail_R.item() == 0.0


def test_tails_are_never_negative() -> None:
    dense = torch.full((50, 3), 1 / 3, dtype=torch.float32) * (1 + 1e-6)
    assert (keep_largest(dense, torch.full((50,), 9), keep=3).tail_R >= 0).all()


def test_empty_rows_and_no_rows_are_kept_as_such() -> None:
    blank = keep_largest(torch.zeros(2, 4), torch.zeros(2), None)
    assert blank.offsets.tolist() == [0, 0, 0] and blank.mass_R().tolist() == [0.0, 0.0]
    nothing = keep_largest(torch.zeros(0, 4), torch.zeros(0), 2)
    assert len(nothing) == 0 and nothing.dense_RC(4).shape == (0, 4)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), keep=st.integers(1, 4), seed=st.integers(0, 100), data=st.data())
def test_cutting_and_joining_give_the_rows_back(rows: int, keep: int, seed: int, data) -> None:
    whole = keep_largest(draw(rows, 4, seed), torch.full((rows,), 4), keep)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    middle = whole.cut(start, stop)
    assert torch.equal(middle.dense_RC(4), whole.dense_RC(4)[start:stop])
    assert torch.equal(middle.tail_R, whole.tail_R[start:stop])
    same(concatenate([whole.cut(0, start), middle, whole.cut(stop, rows)]), whole)


def test_rows_n_names_each_entrys_row_also_past_empty_rows() -> None:
    rows = SparseRows(
        columns_N=torch.tensor([1, 0, 2]),
        values_N=torch.tensor([0.5, 0.25, 0.75]),
        offsets=torch.tensor([0, 1, 1, 3]),
        tail_R=torch.tensor([0.5, 0.0, 0.0]),
    )
    assert rows.rows_N().tolist() == [0, 2, 2]
    assert rows.mass_R().tolist() == [1.0, 0.0, 1.0]
    assert rows.dense_RC(3).tolist() == [[0, 0.5, 0], [0, 0, 0], [0.25, 0, 0.75]]
    moved = rows.to("meta")
    assert moved.columns_N.is_meta and moved.tail_R.is_meta and not moved.offsets.is_meta
