"""What head scoring measures on whole attention maps: squares of dL/dA, and of A's change.

A map enters the loss only through its output O = A V, so dL/dA_ij = dO_i . v_j; the sum of the
squares follows from Gram matrices of dO and V (`seekr.gram`), and no map is ever made. The change
of a map has no such form: both maps are computed tile by tile, each tile only as wide as the mask
lets its queries look and small enough for the cache. What exists at a time is linear in T, the
model's own mask excepted.

Arithmetic is in float32 or better whatever the model's dtype, outside autocast; sums are float64.

Shape suffixes: B batch, L layers, H query heads, G key/value heads, R query heads per key/value
head, T tokens, Q sampled query rows, K query rows of a tile, J keys of a tile, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from seekr.attention import Observation
from seekr.gram import GramPlan, gram_plan, product_squares
from seekr.softmax import exact_dtype
from seekr.spans import SpanCache

GRAM_BLOCK = 128
TILE_ROWS = 128
TILE_ELEMENTS = 1 << 20

Plan = TypeVar("Plan")


class GradientProbe:
    """Sums squares of dL/dA over each row's maps while backward runs, and keeps queries and keys.

    The gradient counts per query head, also where A_ij is 0 by the mask (there the paper's map has
    no entry and the official code has one).

    After backward: `causal_BLH` sums over the pairs of real tokens that the mask allows,
    `square_BLH` over all pairs of real tokens. `captured[layer]` is (query [B,H,T,D],
    key [B,G,T,D]), detached. `earliest` is the first observed layer's output [B,T,H,D]:
    `torch.autograd.grad(loss, probe.earliest)` reaches every layer, and nothing below them. Where
    that output depends on nothing that needs a gradient, autograd's graph begins there.

    Args:
        real_BT: True at real tokens, False at padding.
    """

    layers: frozenset[int] | None = None

    def __init__(self, real_BT: Tensor) -> None:
        self.captured: dict[int, tuple[Tensor, Tensor]] = {}
        self._real_BT = real_BT
        self._plans = _Plans(real_BT, gram_plan)
        self._earliest: Tensor | None = None
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, seen: Observation) -> None:
        """Keep queries and keys of one layer and wait for the gradient of its output.

        Raises:
            UnsupportedModel: the mask is not one run of keys per query, the same for all heads.
        """
        output = seen.output_BTHD
        if not output.requires_grad:
            output.requires_grad_()
        if self._earliest is None:
            self._earliest = output
        self.captured[seen.layer] = (seen.query_BHTD.detach(), seen.key_BGTD.detach())
        plans_B = self._plans.of(seen, GRAM_BLOCK)
        output.register_hook(
            partial(self._accumulate, seen.layer, seen.value_BGTD.detach(), plans_B)
        )

    @property
    def earliest(self) -> Tensor:
        if self._earliest is None:
            raise _nothing_observed()
        return self._earliest

    @property
    def causal_BLH(self) -> Tensor:
        return _stack_layers(self._sums, 0)

    @property
    def square_BLH(self) -> Tensor:
        return _stack_layers(self._sums, 1)

    @torch.no_grad()
    def _accumulate(
        self, layer: int, value_BGTD: Tensor, plans_B: list[GramPlan], grad_BTHD: Tensor
    ) -> None:
        batch = zip(grad_BTHD, value_BGTD, self._real_BT, plans_B, strict=True)
        with torch.autocast(device_type=grad_BTHD.device.type, enabled=False):
            sums_B = [product_squares(*row) for row in batch]
        causal_BH, square_BH = (torch.stack(part) for part in zip(*sums_B, strict=True))
        self._sums[layer] = (causal_BH, square_BH)


class DifferenceProbe:
    """Sums squares of A_after - A_before over each row's maps, attached to the model before the
    task.

    After the forward pass: `all_BLH` sums over all real query rows, `chosen_BLH` over those in
    `positions_BQ`.

    Args:
        after: `GradientProbe.captured` of the model after the task, for the same batch.
        real_BT: True at real tokens, False at padding.
        positions_BQ: Padded positions of the sampled query rows, -1 where there are fewer.
    """

    layers: frozenset[int] | None = None

    def __init__(
        self, after: Mapping[int, tuple[Tensor, Tensor]], real_BT: Tensor, positions_BQ: Tensor
    ) -> None:
        self._after = after
        chosen = torch.zeros(len(real_BT), real_BT.shape[1] + 1, dtype=torch.bool)
        # Column T takes the missing rows (-1) and is cut off again.
        chosen.scatter_(
            1, torch.where(positions_BQ < 0, real_BT.shape[1], positions_BQ).cpu(), True
        )
        self._chosen_BT = chosen[:, :-1].to(real_BT.device)
        self._plans = _Plans(real_BT, _map_tiles)
        self._kept: Tensor | None = None
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def all_BLH(self) -> Tensor:
        return _stack_layers(self._sums, 0)

    @property
    def chosen_BLH(self) -> Tensor:
        return _stack_layers(self._sums, 1)

    @torch.no_grad()
    def observe(self, seen: Observation) -> None:
        """Compare one layer's maps with those of the model after the task.

        Raises:
            ValueError: the two models' queries or keys have different shapes.
            UnsupportedModel: the mask is not one run of keys per query, the same for all heads.
        """
        query, key = self._after[seen.layer]
        if query.shape != seen.query_BHTD.shape or key.shape != seen.key_BGTD.shape:
            raise ValueError(
                f"layer {seen.layer}: queries {tuple(seen.query_BHTD.shape)} before and "
                f"{tuple(query.shape)} after the task; both models need one architecture"
            )
        ratio = query.shape[1] // key.shape[1]
        rows = min(TILE_ROWS, max(1, _limit(query.device) // (ratio * query.shape[2])))
        sums_B: list[tuple[Tensor, Tensor]] = []
        with torch.autocast(device_type=query.device.type, enabled=False):
            for index, tiles in enumerate(self._plans.of(seen, rows)):
                after = _RowMaps(query[index], key[index], seen.scaling)
                before = _RowMaps(seen.query_BHTD[index], seen.key_BGTD[index], seen.scaling)
                square_HT = self._row_squares(after, before, tiles)
                chosen_HT = square_HT.masked_fill(~self._chosen_BT[index], 0.0)
                sums_B.append((square_HT.sum(dim=-1), chosen_HT.sum(dim=-1)))
        all_BH, chosen_BH = (torch.stack(part) for part in zip(*sums_B, strict=True))
        self._sums[seen.layer] = (all_BH, chosen_BH)

    def _row_squares(self, after: _RowMaps, before: _RowMaps, tiles: list[MapTile]) -> Tensor:
        """Return the squared change of each query row of one row's maps, [H,T] float64."""
        query_GRTD = after.query_GRTD
        groups, ratio = query_GRTD.shape[:2]
        square_GRT = query_GRTD.new_zeros(query_GRTD.shape[:3], dtype=torch.float64)
        spaces_2X = self._spaces(query_GRTD)
        for tile in tiles:
            each = ratio * (tile.stop - tile.start) * (tile.high - tile.low)
            step = max(1, _limit(query_GRTD.device) // each)
            for some in (slice(at, min(at + step, groups)) for at in range(0, groups, step)):
                new, old = spaces_2X[:, : (some.stop - some.start) * each]
                change_GRKJ = after.tile(tile, some, new).sub_(before.tile(tile, some, old))
                norm_GRK = torch.linalg.vector_norm(change_GRKJ, dim=-1).double()
                norm_GRK.masked_fill_(~tile.counted_K, 0.0)
                square_GRT[some, :, tile.start : tile.stop] = norm_GRK.square_()
        return square_GRT.flatten(0, 1)

    def _spaces(self, query_GRTD: Tensor) -> Tensor:
        """Return memory for two tiles [2,X], kept from layer to layer."""
        _, ratio, tokens, _ = query_GRTD.shape
        size = (2, max(_limit(query_GRTD.device), ratio * tokens))
        kept = self._kept
        if kept is None or kept.shape != size or kept.device != query_GRTD.device:
            kept = self._kept = query_GRTD.new_empty(size)
        return kept


@dataclass(frozen=True, slots=True, eq=False)
class MapTile:
    """Query rows start .. stop of a map and the keys low .. high that they may look at.

    `edges` are ranges of those keys, counted from low, that some of the rows may not look at, and
    where (True is hidden). Rows that are not `counted_K` are padding or see no key.
    """

    start: int
    stop: int
    low: int
    high: int
    edges: tuple[tuple[slice, Tensor], ...]
    counted_K: Tensor


def _map_tiles(first_T: Tensor, last_T: Tensor, real_T: Tensor, size: int) -> list[MapTile]:
    """Cut one row's maps into tiles of `size` query rows; padding and hidden keys are left out."""
    device = first_T.device
    first_T, last_T = first_T.cpu(), last_T.cpu()
    counted_T = real_T.cpu() & (first_T <= last_T)
    tiles: list[MapTile] = []
    for start in range(0, len(first_T), size):
        rows = slice(start, min(start + size, len(first_T)))
        counted_K = counted_T[rows]
        if not counted_K.any():
            continue
        first_K, last_K = first_T[rows], last_T[rows]
        (low, all_low), (all_high, high) = (
            [int(bound) for bound in span_K[counted_K].aminmax()] for span_K in (first_K, last_K)
        )
        inner = [(low, all_low), (all_high + 1, high + 1)]
        edges = inner if all_low <= all_high else [(low, high + 1)]
        hidden: list[tuple[slice, Tensor]] = []
        for begin, end in edges:
            if begin < end:
                key_J = torch.arange(begin, end)
                hidden_KJ = (key_J < first_K[:, None]) | (key_J > last_K[:, None])
                hidden.append((slice(begin - low, end - low), hidden_KJ.to(device)))
        tiles.append(MapTile(start, rows.stop, low, high + 1, tuple(hidden), counted_K.to(device)))
    return tiles


class _RowMaps:
    """One row's attention maps of one model, a tile at a time."""

    def __init__(self, query_HTD: Tensor, key_GTD: Tensor, scaling: float) -> None:
        dtype, groups = exact_dtype(query_HTD.dtype), len(key_GTD)
        self.query_GRTD = (query_HTD.to(dtype) * scaling).unflatten(0, (groups, -1))
        self._key_GTD = key_GTD.to(dtype).contiguous()

    def tile(self, tile: MapTile, groups: slice, space: Tensor) -> Tensor:
        """Write a tile of the maps of some groups' heads, [G,R,K,J], into `space`."""
        query_GRKD = self.query_GRTD[groups, :, tile.start : tile.stop]
        key_GJD = self._key_GTD[groups, tile.low : tile.high]
        maps_GXJ = space.view(len(key_GJD), -1, key_GJD.shape[1])
        torch.bmm(query_GRKD.flatten(1, 2), key_GJD.mT, out=maps_GXJ)
        maps_GRKJ = maps_GXJ.unflatten(1, query_GRKD.shape[1:3])
        for columns, hidden_KJ in tile.edges:
            maps_GRKJ[..., columns].masked_fill_(hidden_KJ, -torch.inf)
        torch.softmax(maps_GXJ, dim=-1, out=maps_GXJ)
        return maps_GRKJ


class _Plans(Generic[Plan]):
    """What `make` derives from each batch row's spans: once per mask, as layers share masks."""

    def __init__(
        self, real_BT: Tensor, make: Callable[[Tensor, Tensor, Tensor, int], Plan]
    ) -> None:
        self._real_BT, self._make = real_BT, make
        self._spans = SpanCache()
        self._made: dict[tuple[int, int], list[Plan]] = {}

    def of(self, seen: Observation, size: int) -> list[Plan]:
        """Return one plan per batch row, for blocks of `size` query rows."""
        spans = self._spans.of(seen)
        # The cache keeps its spans, so their ids stay theirs.
        made = self._made.get((id(spans), size))
        if made is None:
            rows = zip(spans.first_BT, spans.last_BT, self._real_BT, strict=True)
            made = self._made[id(spans), size] = [self._make(*row, size) for row in rows]
        return made


def _limit(device: torch.device) -> int:
    """Return how many numbers a tile may hold: what caches hold, and more where launches cost."""
    return TILE_ELEMENTS if device.type == "cpu" else 16 * TILE_ELEMENTS


def _stack_layers(sums: Mapping[int, tuple[Tensor, Tensor]], part: int) -> Tensor:
    if not sums:
        raise _nothing_observed()
    return torch.stack([sums[layer][part] for layer in sorted(sums)], dim=1)


def _nothing_observed() -> RuntimeError:
    return RuntimeError("the probe has observed nothing; run the model inside `probing` first")
