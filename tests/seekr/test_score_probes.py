"""Sums over maps that were never made against maps that were: products, softmaxes, autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seekr import score_probes
from seekr.attention import Observation, probing
from seekr.collation import Side, collate
from seekr.errors import UnsupportedModel
from seekr.importance import score_batch
from seekr.score_probes import DifferenceProbe, GradientProbe
from seekr.spans import key_spans
from seekr.teacher import place_positions
from tests.seekr import reference, tiny
from tests.seekr.test_gram import KINDS, draw, mask_of


def seen_by(query: Tensor, key: Tensor, mask: Tensor | None, output: Tensor) -> Observation:
    return Observation(
        layer=0,
        query_BHTD=query[None],
        key_BGTD=key[None],
        value_BGTD=key[None],
        mask_BHTT=None if mask is None else mask[None, None],
        scaling=0.7,
        output_BTHD=output,
        training=False,
    )


def differences_by_maps(
    pairs: list[tuple[Tensor, Tensor]], allowed: Tensor, rows: Tensor
) -> Tensor:
    maps = []
    for query, key in pairs:
        key = key.double().repeat_interleave(len(query) // len(key), dim=0)
        scores = (query.double() @ key.mT * 0.7).masked_fill(~allowed, -torch.inf)
        maps.append(scores.softmax(dim=-1).nan_to_num(0.0))
    return ((maps[0] - maps[1]).square().sum(dim=-1) * rows).sum(dim=-1)


def differences_by_tiles(
    pairs: list[tuple[Tensor, Tensor]], mask: Tensor | None, real: Tensor, chosen: list[int]
) -> tuple[Tensor, Tensor]:
    (query, key), (query_before, key_before) = pairs
    probe = DifferenceProbe(
        {0: (query[None], key[None])}, real[None], torch.tensor([chosen], dtype=torch.long)
    )
    probe.observe(seen_by(query_before, key_before, mask, query))
    return probe.all_BLH[0, 0], probe.chosen_BLH[0, 0]


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 45),
    part=st.integers(1, 20),
    rows=st.integers(1, 50),
    tile=st.sampled_from([1, 100, 1 << 20]),
    groups=st.integers(1, 3),
    ratio=st.integers(1, 3),
)
def test_tiles_give_the_squared_change_of_whole_maps_for_any_mask_and_tile(
    kind: str, tokens: int, part: int, rows: int, tile: int, groups: int, ratio: int
) -> None:
    allowed, real = mask_of(kind, tokens, part)
    pairs = [draw(groups * ratio, groups, tokens, 3, seed=seed) for seed in (1, 2)]
    chosen = [*real.nonzero()[::2, 0].tolist(), -1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_probes, "TILE_ROWS", rows)
        patch.setattr(score_probes, "TILE_ELEMENTS", tile)
        found = differences_by_tiles(pairs, allowed, real, chosen)
    is_chosen = torch.zeros(tokens, dtype=torch.bool)
    is_chosen[chosen[:-1]] = True
    expected = tuple(differences_by_maps(pairs, allowed, counted) for counted in (real, is_chosen))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_of_lower_precisions_are_compared_in_float32(dtype: torch.dtype) -> None:
    pairs = [draw(4, 2, 300, 16, seed, dtype) for seed in (1, 2)]
    allowed, real = mask_of("causal", 300, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = differences_by_tiles(pairs, None, real, [0])
    expected = differences_by_maps(pairs, allowed, real)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_sums_over_models_maps_equal_autograd_and_softmax_to_ten_digits(
    name: str, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_probes, "GRAM_BLOCK", 3)
    monkeypatch.setattr(score_probes, "TILE_ROWS", 2)
    rows = tiny.rows()
    batch = collate(rows, tiny.PAD_ID, side, multiple_of=4)
    queries = [np.array([0, 3]), np.array([4]), np.array([1, 2, 6])]
    found = score_batch(
        tiny.build(name, seed=1), tiny.build(name), batch, place_positions(queries, batch)
    )
    slow = [tiny.build(name, attention="reference", seed=seed) for seed in (1, 0)]
    for statistics, row, chosen in zip(found, rows, queries, strict=True):
        causal, square = reference.gradient_squares(slow[1], row)
        everywhere, at_chosen = reference.difference_squares(slow[0], slow[1], row, chosen)
        np.testing.assert_allclose(statistics.grad_sq_causal, causal, rtol=1e-10)
        np.testing.assert_allclose(statistics.grad_sq_square, square, rtol=1e-10)
        np.testing.assert_allclose(statistics.diff_sq, everywhere, rtol=1e-10)
        np.testing.assert_allclose(statistics.diff_sq_queries, at_chosen, rtol=1e-10)


def test_only_the_layers_above_the_first_attention_are_differentiated() -> None:
    batch = tiny.batch()
    model, probe = tiny.build("llama2-gqa").requires_grad_(False), None
    probe = GradientProbe(batch.attention_mask_BT.bool())
    with pytest.raises(RuntimeError, match="observed nothing"):
        _ = probe.earliest
    with probing(model, probe):
        logits = model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    assert probe.earliest.is_leaf and logits.requires_grad
    torch.autograd.grad(logits.sum(), probe.earliest)
    assert probe.causal_BLH.shape == (3, tiny.LAYERS, tiny.HEADS)


def test_logits_are_computed_where_answers_are_and_nowhere_else() -> None:
    rows = tiny.rows((9, 5, 7))
    batch = collate(rows, tiny.PAD_ID)
    positions_BQ = place_positions([np.array([1])] * 3, batch)
    before, after = tiny.build("llama2-gqa", seed=1), tiny.build("llama2-gqa")
    columns = []
    for model in (after, before):
        model.lm_head.register_forward_hook(lambda *seen: columns.append(seen[1][0].shape[1]))
    found = score_batch(before, after, batch, positions_BQ)
    assert columns == [6, 1]  # the union of 7..8, 3..4 and 5..6, one place earlier
    for model in (after, before):
        with_all_logits(model)
    expected = score_batch(before, after, batch, positions_BQ)
    assert columns[2:] == [9, 9]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.grad_sq_causal, other.grad_sq_causal, rtol=1e-12)
        np.testing.assert_array_equal(one.diff_sq, other.diff_sq)


def with_all_logits(model: torch.nn.Module) -> None:
    """Make it a model that knows nothing of logits_to_keep."""
    stock = model.forward

    def forward(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool):
        return stock(input_ids, attention_mask, position_ids, use_cache=use_cache)

    model.forward = forward  # type: ignore[method-assign]


def test_masks_with_gaps_and_masks_of_single_heads_are_refused() -> None:
    query, key = draw(2, 2, 4, 3)
    gap = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    real = torch.ones(4, dtype=torch.bool)
    for probe in (
        GradientProbe(real[None]),
        DifferenceProbe({0: (query[None], key[None])}, real[None], torch.tensor([[0]])),
    ):
        with pytest.raises(UnsupportedModel, match="query 2 of batch row 0"):
            probe.observe(seen_by(query, key, gap, torch.zeros(1, 4, 2, 3)))
    with pytest.raises(UnsupportedModel, match="differs between 2 heads"):
        key_spans(gap.expand(1, 2, 4, 4), 1, 4, gap.device)


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, list | tuple) else [result]:
            if isinstance(part, Tensor):
                self.numel = max(self.numel, part.numel())
        return result


@contextmanager
def largest() -> Iterator[_Largest]:
    with _Largest() as mode:
        yield mode
    assert mode.numel > 0


def largest_of_gradient(tokens: int) -> int:
    query, key = draw(2, 1, tokens, 16, dtype=torch.float32)
    output = torch.zeros(1, tokens, 2, 16)
    probe = GradientProbe(torch.ones(1, tokens, dtype=torch.bool))
    probe.observe(seen_by(query, key, None, output))
    with largest() as mode:
        torch.autograd.grad(output.square().sum(), probe.earliest)
    assert probe.causal_BLH.shape == (1, 1, 2)
    return mode.numel


def test_the_largest_tensor_of_the_gradient_sums_grows_with_the_row_and_not_its_square() -> None:
    at_1024 = largest_of_gradient(1024)
    assert 2 * 1024 * 64 <= at_1024 < 2 * 1024**2
    assert largest_of_gradient(2048) <= 2 * at_1024


def test_no_tensor_of_the_difference_sums_is_larger_than_two_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score_probes, "TILE_ELEMENTS", 1 << 17)
    tokens = 1024
    pairs = [draw(2, 1, tokens, 16, seed, torch.float32) for seed in (1, 2)]
    with largest() as mode:
        differences_by_tiles(pairs, None, torch.ones(tokens, dtype=torch.bool), [0])
    assert mode.numel <= 2 << 17
