"""Whole numbers survive packing, in few bytes, and other bytes are refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekr.packing import pack, unpack

DTYPES = (np.uint8, np.int16, np.uint32, np.int64)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.integers(0, 3), st.integers(0, 300), st.integers(0, 2**63 - 1)), max_size=40
    )
)
def test_any_list_of_whole_numbers_comes_back(values: list[int]) -> None:
    found = unpack(pack(np.array(values, dtype=np.int64)))
    assert found.dtype == np.int64 and found.tolist() == values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 100])
def test_the_given_type_does_not_change_what_is_stored(dtype: type, length: int) -> None:
    values = (np.arange(length) % 100).astype(dtype)
    assert pack(values).tobytes() == pack(values.astype(np.int64)).tobytes()
    assert pack(np.repeat(values, 2)[::2]).tobytes() == pack(values).tobytes()


@pytest.mark.parametrize(
    ("highest", "size"),
    [(0, 1), (255, 1), (256, 2), (65535, 2), (65536, 4), (2**32 - 1, 4), (2**32, 8)],
)
def test_the_first_byte_is_the_narrowest_item_size(highest: int, size: int) -> None:
    packed = pack(np.array([0, highest]))
    assert packed.dtype == np.uint8 and packed[0] == size
    assert len(zlib.decompress(packed[1:].tobytes())) == 2 * size


def test_high_bytes_that_repeat_cost_next_to_nothing() -> None:
    low = np.random.default_rng(0).integers(0, 256, 4000)
    assert len(pack(low + 256 * 77)) < len(pack(low)) + 100


def test_an_unpacked_array_can_be_written_to() -> None:
    found = unpack(pack(np.arange(5)))
    found[0] = 9
    assert found.tolist() == [9, 1, 2, 3, 4]


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot pack -3; 0 or more"):
        pack(np.array([4, -3, 0]))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "item size 0"),
        (b"\x03abc", "item size 3"),
        (b"\x01", "incomplete"),
        (b"\x01not deflated", "header"),
        (b"\x04" + zlib.compress(b"12345"), "reshape"),
    ],
)
def test_bytes_of_another_kind_are_refused(data: bytes, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        unpack(np.frombuffer(data, dtype=np.uint8))
