"""Spans say of every query and key exactly what the mask says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seekr import spans as module
from seekr.attention import Observation
from seekr.errors import UnsupportedModel
from seekr.spans import SpanCache, Spans, key_spans

CPU = torch.device("cpu")


def mask_of(spans: Spans, tokens: int) -> Tensor:
    """Return the mask [B,1,T,T] that spans stand for."""
    key_T = torch.arange(tokens)
    low, high = spans.first_BT[..., None], spans.last_BT[..., None]
    return ((key_T >= low) & (key_T <= high))[:, None]


def causal(tokens: int, window: int | None = None, chunk: int | None = None) -> Tensor:
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    mask = key <= query
    if window is not None:
        mask &= query - key < window
    if chunk is not None:
        mask &= query // chunk == key // chunk
    return mask


def real(tokens: int, lengths: list[int], side: str) -> Tensor:
    """Return [B,T], True at real tokens."""
    place_T = torch.arange(tokens)
    length_B1 = torch.tensor(lengths)[:, None]
    return place_T >= tokens - length_B1 if side == "left" else place_T < length_B1


def seen(mask: Tensor | None, batch: int = 2, tokens: int = 5) -> Observation:
    rows = torch.zeros(batch, 1, tokens, 2)
    return Observation(
        layer=0,
        query_BHTD=rows,
        key_BGTD=rows,
        value_BGTD=rows,
        mask_BHTT=mask,
        scaling=1.0,
        output_BTHD=rows,
        training=False,
    )


def test_no_mask_is_plain_causal_attention() -> None:
    spans = key_spans(None, 2, 6, CPU)
    assert torch.equal(mask_of(spans, 6), causal(6).expand(2, 1, 6, 6))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 12),
    window=st.none() | st.integers(1, 5),
    chunk=st.none() | st.integers(1, 5),
    cuts=st.none() | st.sets(st.integers(1, 11)),
    side=st.sampled_from(["left", "right"]),
    data=st.data(),
)
def test_spans_stand_for_the_mask_of_any_window_chunk_packing_and_padding(
    tokens: int, window: int | None, chunk: int | None, cuts: set[int] | None, side: str, data
) -> None:
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=1, max_size=3))
    mask = causal(tokens, window, chunk)
    if cuts is not None:
        pack_T = torch.tensor([sum(cut <= place for cut in cuts) for place in range(tokens)])
        mask &= pack_T[:, None] == pack_T
    mask_BHTT = mask & real(tokens, lengths, side)[:, None, None, :]
    spans = key_spans(mask_BHTT, len(lengths), tokens, CPU)
    assert torch.equal(mask_of(spans, tokens), mask_BHTT)
    assert spans.first_BT.dtype == spans.last_BT.dtype == torch.int64


def test_a_query_that_sees_no_key_has_an_empty_span() -> None:
    mask = causal(4) & torch.tensor([False, False, True, True])
    spans = key_spans(mask[None, None], 1, 4, CPU)
    assert (spans.last_BT < spans.first_BT).tolist() == [[True, True, False, False]]


def test_a_mask_shared_by_the_batch_gives_every_row_the_same_spans() -> None:
    spans = key_spans(causal(5, window=2)[None, None], 3, 5, CPU)
    assert spans.first_BT.tolist() == [[0, 0, 1, 2, 3]] * 3
    assert spans.last_BT.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_expanded_and_transposed_masks_are_read_right() -> None:
    mask = causal(5, window=3)
    expanded = mask[None, None].expand(2, 1, 5, 5)
    transposed = mask.T.contiguous().T[None, None]
    for given_mask in (expanded, transposed):
        spans = key_spans(given_mask, 2, 5, CPU)
        assert torch.equal(mask_of(spans, 5)[1, 0], mask)


def test_masks_are_read_in_pieces_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = causal(9, window=4)[None, None]
    whole = key_spans(mask, 1, 9, CPU)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 20)
    pieces = key_spans(mask, 1, 9, CPU)
    assert torch.equal(whole.first_BT, pieces.first_BT)
    assert torch.equal(whole.last_BT, pieces.last_BT)


def test_a_gap_is_refused_and_said_where(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = causal(6).repeat(2, 1, 1, 1)
    mask[1, 0, 4, 2] = False
    for elements in (1 << 24, 12):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
        with pytest.raises(UnsupportedModel, match=r"query 4 of batch row 1 .* gap"):
            key_spans(mask, 2, 6, CPU)


def test_a_mask_per_head_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="differs between 3 heads"):
        key_spans(causal(4).expand(1, 3, 4, 4), 1, 4, CPU)


def test_a_cache_reads_each_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor | None] = []

    def spy(mask: Tensor | None, *rest) -> Spans:
        read.append(mask)
        return key_spans(mask, *rest)

    monkeypatch.setattr(module, "key_spans", spy)
    full, window = causal(5)[None, None], causal(5, window=2)[None, None]
    cache = SpanCache()
    first = cache.of(seen(full))
    assert cache.of(seen(full)) is first
    assert cache.of(seen(window)) is not first
    assert cache.of(seen(None)) is cache.of(seen(None))
    assert cache.of(seen(full)) is first
    assert [id(mask) for mask in read] == [id(full), id(window), id(None)]


def test_a_cache_does_not_take_one_shape_for_another() -> None:
    cache = SpanCache()
    assert cache.of(seen(None, tokens=5)).last_BT.shape == (2, 5)
    assert cache.of(seen(None, tokens=7)).last_BT.shape == (2, 7)
    assert cache.of(seen(None, batch=1, tokens=7)).last_BT.shape == (1, 7)
