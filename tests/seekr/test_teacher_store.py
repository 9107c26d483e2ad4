"""Targets as bytes: what comes back, how much it was rounded, and which bytes are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from torch import Tensor

from seekr import teacher_store
from seekr.errors import StoreError
from seekr.sparse_rows import SparseRows, keep_largest
from seekr.teacher import Keep, TeacherTarget, teach_batch
from seekr.teacher_store import decode_target, encode_target
from tests.seekr import tiny

HEADS = {0: (0, 3), 2: (1, 2, 3)}
QUERIES = [np.array([0, 4, 8]), np.array([1, 4]), np.array([3, 5, 6])]
WHOLE = 65535
# float32 numbers that stand for multiples of 1 / 65535 are off by less than this.
FLOAT = 1e-7


def taught(**changes: Any) -> list[TeacherTarget]:
    options = {"logits": True} | changes
    return teach_batch(tiny.build("llama2-gqa"), tiny.batch(), HEADS, QUERIES, **options)


def target_of(attention: SparseRows | None, logits: Tensor | SparseRows | None = None) -> Any:
    """A target that holds these rows: one head, a query row each."""
    num_rows = 0 if attention is None else len(attention)
    return TeacherTarget(
        length=9,
        shift=True,
        logits=logits,
        heads_by_layer={} if attention is None else {0: (0,)},
        query_positions=np.arange(num_rows),
        attention=attention,
    )


def through(rows: SparseRows, bits: Any) -> SparseRows:
    found = decode_target(encode_target(target_of(rows), bits)).attention
    assert found is not None
    return found


def rows_of(kept: Sequence[dict[int, float]], tails: Sequence[float]) -> SparseRows:
    """Rows from columns and values written out."""
    return SparseRows(
        columns_N=torch.tensor([c for row in kept for c in row], dtype=torch.int64),
        values_N=torch.tensor([v for row in kept for v in row.values()], dtype=torch.float64),
        offsets=torch.tensor([0, *np.cumsum([len(row) for row in kept])]),
        tail_R=torch.tensor(tails, dtype=torch.float64),
    )


def draw_rows(num_rows: int, columns: int, seed: int, sharp: float, keep: int | None) -> SparseRows:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_rows, columns, generator=generator, dtype=torch.float64) * sharp
    masked = torch.rand(num_rows, columns, generator=generator) < 0.3
    masked[:, 0] = False
    rows = scores.masked_fill(masked, -torch.inf).softmax(dim=-1)
    return keep_largest(rows, (~masked).sum(dim=-1), keep)


def assert_same_rows(found: SparseRows, expected: SparseRows) -> None:
    assert torch.equal(found.columns_N, expected.columns_N)
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.values_N, expected.values_N.float())
    assert torch.equal(found.tail_R, expected.tail_R.float())
    assert found.values_N.dtype == found.tail_R.dtype == torch.float32


def assert_rounded(found: SparseRows, rows: SparseRows, columns: int) -> None:
    """Within one step of 1 / 65535, every row summing to exactly 1, no entry of 0."""
    codes = found.values_N.double() * WHOLE
    assert torch.allclose(codes, codes.round(), rtol=0, atol=WHOLE * FLOAT)
    assert bool((codes.round() > 0).all())
    assert found.values_N.dtype == torch.float32 and len(found) == len(rows)
    tails = (found.tail_R.double() * WHOLE).round()
    sums = tails.index_add(0, found.rows_N(), codes.round())
    assert sums.tolist() == [WHOLE] * len(rows)
    close = {"rtol": 0, "atol": 1 / WHOLE + FLOAT}
    torch.testing.assert_close(
        found.dense_RC(columns).double(), rows.dense_RC(columns).double(), **close
    )
    torch.testing.assert_close(found.tail_R.double(), rows.tail_R.double(), **close)
    assert not found.tail_R[rows.tail_R == 0].any()


SHAPES = {
    "num_rows": st.integers(1, 6),
    "columns": st.integers(1, 40),
    "seed": st.integers(0, 10**6),
    "sharp": st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    "keep": st.sampled_from([None, 1, 2, 7, 40]),
}


@settings(max_examples=150, deadline=None)
@given(**SHAPES)
def test_32_bits_lose_nothing_of_a_float32_row(
    num_rows: int, columns: int, seed: int, sharp: float, keep: int | None
) -> None:
    rows = draw_rows(num_rows, columns, seed, sharp, keep)
    assert_same_rows(through(rows, 32), rows)


@settings(max_examples=150, deadline=None)
@given(**SHAPES)
def test_16_bits_keep_every_entry_within_a_step_and_every_sum_at_one(
    num_rows: int, columns: int, seed: int, sharp: float, keep: int | None
) -> None:
    rows = draw_rows(num_rows, columns, seed, sharp, keep)
    found = through(rows, 16)
    assert_rounded(found, rows, columns)
    # What was rounded once is not rounded again.
    assert_same_rows(through(found, 16), found)


@pytest.mark.parametrize("columns", [65535, 70000, 200_000])
def test_flat_rows_of_many_columns_keep_their_sum(columns: int) -> None:
    rows = keep_largest(torch.full((2, columns), 1 / columns), torch.tensor([columns] * 2), None)
    found = through(rows, 16)
    assert len(found.values_N) == 2 * WHOLE
    assert_rounded(found, rows, columns)


def test_a_mass_of_many_entries_below_a_step_goes_to_the_tail_or_its_largest() -> None:
    small = {column: 1e-7 for column in range(1, 1001)}
    rows = rows_of([{0: 0.9} | small, {0: 1 - 1e-4} | small], [0.1 - 1e-4, 0.0])
    found = through(rows, 16)
    assert_rounded(found, rows, 1001)
    assert found.offsets[1] < 10
    assert found.tail_R[0] > 0.09 and found.tail_R[1] == 0


def test_rows_with_one_entry_or_none_survive() -> None:
    rows = rows_of([{}, {3: 1.0}, {}, {8: 0.25}, {}], [1.0, 0.0, 1.0, 0.75, 1.0])
    assert_same_rows(through(rows, 32), rows)
    found = through(rows, 16)
    assert_rounded(found, rows, 9)
    assert found.offsets.tolist() == [0, 0, 1, 1, 2, 2] and found.columns_N.tolist() == [3, 8]
    assert found.tail_R[[0, 2, 4]].tolist() == [1.0] * 3 and found.values_N[0] == 1.0


@pytest.mark.parametrize("bits", [16, 32])
def test_no_rows_at_all_survive(bits: Any) -> None:
    found = through(rows_of([], []), bits)
    assert len(found) == 0 and len(found.columns_N) == 0 and found.offsets.tolist() == [0]


@pytest.mark.parametrize("bits", [16, 32])
def test_columns_of_a_large_vocabulary_survive(bits: Any) -> None:
    rows = rows_of([{0: 0.5, 151_935: 0.25}, {151_935: 0.5}], [0.25, 0.5])
    assert through(rows, bits).columns_N.tolist() == [0, 151_935, 151_935]


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("keep", [None, Keep(logits=4), Keep(logits=4, attention=2)])
def test_a_teachers_targets_survive_with_everything_beside_their_rows(
    bits: Any, keep: Keep | None
) -> None:
    for shift in (True, False):
        for target in taught(keep=keep, shift=shift):
            found = decode_target(encode_target(target, bits))
            assert (found.length, found.shift) == (target.length, shift)
            assert found.heads_by_layer == HEADS
            assert np.array_equal(found.query_positions, target.query_positions)
            pairs = [(found.attention, target.attention, target.length)]
            if keep is None:
                stored = torch.float16 if bits == 16 else torch.float32
                assert torch.equal(found.logits, target.logits.to(stored).float())
            else:
                pairs.append((found.logits, target.logits, tiny.VOCAB))
            for got, rows, columns in pairs:
                if bits == 16:
                    assert_rounded(got, rows, columns)
                else:
                    assert_same_rows(got, rows)


@pytest.mark.parametrize("bits", [16, 32])
def test_targets_without_logits_or_attention_survive(bits: Any) -> None:
    stock = tiny.build("llama2-gqa", attention="sdpa")
    (target, *_) = teach_batch(stock, tiny.batch(), None, [], logits=True, shift=False)
    found = decode_target(encode_target(target, bits))
    assert found.attention is None and found.shift is False and found.heads_by_layer == {}
    assert len(found.query_positions) == 0
    assert decode_target(encode_target(taught(logits=False)[0], bits)).logits is None


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("keep", [None, Keep(logits=4, attention=2)])
def test_equal_targets_give_equal_bytes(keep: Keep | None, bits: Any) -> None:
    for one, other in zip(taught(keep=keep), taught(keep=keep), strict=True):
        assert encode_target(one, bits) == encode_target(other, bits)


def test_fewer_entries_and_bits_take_fewer_bytes() -> None:
    sizes = [
        len(encode_target(target_of(draw_rows(40, 500, 0, 3.0, keep)), bits))
        for keep, bits in ((4, 16), (4, 32), (None, 16), (None, 32))
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 10
    # About a byte for the column and two for the value of an entry, one for the count of a row.
    assert sizes[0] < 4 * 160 + 40 + 700


@pytest.mark.parametrize("keep", [None, Keep(logits=4, attention=2)])
def test_any_flipped_bit_or_truncation_is_refused(keep: Keep | None) -> None:
    data = encode_target(taught(keep=keep)[1])
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(StoreError, match="cannot be read"):
            decode_target(bytes(damaged))
    for length in [*range(0, len(data), 31), len(data) - 1]:
        with pytest.raises(StoreError, match="cannot be read"):
            decode_target(data[:length])
    with pytest.raises(StoreError, match="cannot be read"):
        decode_target(data + b"\0")


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=80))
def test_bytes_that_are_no_target_are_refused(data: bytes) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        decode_target(data)


def foreign(name: str) -> bytes:
    """Safetensors that another program, or an earlier version, wrote."""
    arrays: dict[str, Any] = {
        "a model": {"weights": np.zeros(3, dtype=np.float32)},
        "nothing": {},
        "a checksum alone": {"checksum": np.zeros(1, dtype=np.int64)},
        "a scalar": {"meta": np.array(2), "checksum": np.array(0)},
        "format 1": {
            "meta": np.array([1, 9, 1], dtype=np.int64),
            "query_positions": np.arange(3),
            "heads.0": np.arange(2),
            "attention.0": np.zeros((2, 3, 9), dtype=np.float32),
        },
    }
    own = arrays[name]
    if name == "format 1":
        own |= {"checksum": teacher_store._checksum(own)}
    return save(own)


@pytest.mark.parametrize("name", ["a model", "nothing", "a checksum alone", "a scalar"])
def test_safetensors_of_another_kind_are_refused(name: str) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        decode_target(foreign(name))


def test_bytes_of_another_format_are_refused_by_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(StoreError, match="its format is 1 and this version reads 2"):
        decode_target(foreign("format 1"))
    monkeypatch.setattr("seekr.teacher_store._FORMAT", 3)
    data = encode_target(taught()[0])
    monkeypatch.undo()
    with pytest.raises(StoreError, match="its format is 3 and this version reads 2"):
        decode_target(data)
    assert "meta" in load(data)


@pytest.mark.parametrize("name", ["meta", "heads", "positions", "attention.values"])
def test_a_missing_part_is_refused_even_under_a_right_checksum(name: str) -> None:
    arrays = load(encode_target(taught(keep=Keep(logits=4))[0]))
    del arrays[name], arrays["checksum"]
    with pytest.raises(StoreError, match=name):
        decode_target(save(arrays | {"checksum": teacher_store._checksum(arrays)}))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float, bits: Any) -> None:
    sparse = rows_of([{0: 0.5, 2: bad}], [0.5])
    tail = rows_of([{0: 0.5}], [bad])
    whole = torch.tensor([[0.0, bad]])
    for target in (target_of(sparse), target_of(tail), target_of(None, sparse)):
        with pytest.raises(StoreError, match="NaN"):
            encode_target(target, bits)
    with pytest.raises(StoreError, match="teacher logits have a NaN"):
        encode_target(target_of(None, whole), bits)


def test_logits_that_float16_cannot_hold_are_refused_and_32_bits_take_them() -> None:
    large = target_of(None, torch.tensor([[1e6, -1e6]]))
    with pytest.raises(StoreError, match=r"float16 cannot hold.*32 bits"):
        encode_target(large, 16)
    assert torch.equal(decode_target(encode_target(large, 32)).logits, large.logits)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize(
    ("kept", "tail"), [({}, 0.0), ({0: 0.5}, 0.0), ({0: 0.5, 1: 0.6}, 0.0), ({}, 0.5)]
)
def test_rows_that_are_no_distribution_are_refused(
    kept: dict[int, float], tail: float, bits: Any
) -> None:
    rows = rows_of([{0: 1.0}, kept], [0.0, tail])
    with pytest.raises(StoreError, match="row 1 of the teacher's attention sums to"):
        encode_target(target_of(rows), bits)


def test_a_diverged_teacher_is_refused() -> None:
    target = taught(keep=Keep(logits=4))[0]
    broken = replace(
        target, logits=replace(target.logits, values_N=target.logits.values_N * np.nan)
    )
    with pytest.raises(StoreError, match="look for a diverged model"):
        encode_target(broken)
