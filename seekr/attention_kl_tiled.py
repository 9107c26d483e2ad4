"""Attention KL over tiles of the map, computed again in backward.

A tile is a run of query rows of some selected heads against the keys that any of them may look at,
so with causal attention only the lower triangle is visited. Forward keeps one number per row, the
student's probability of what the teacher did not keep; backward forms each tile again and turns it
in place into the gradient of the scores,

    kept entry:  g * (m * p - u)          u = t * p / (p + epsilon), so t itself for epsilon 0
    tail entry:  g * p * (m - U / P)      U likewise for the tail, P the student's tail

with g the gradient of the row's KL and m = sum u + U. A buffer holds at most TILE_ELEMENTS numbers of
a map at a time, or one row. Arithmetic is float32 (float64 for float64 input), outside autocast.

Shape suffixes: B batch, H query heads, G key/value heads, S selected heads, Q query rows, T tokens
(keys), D head dim; within a tile C heads, K query rows, M keys; N kept entries of the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seekr.attention_kl import Geometry, Teacher, TeacherPair
from seekr.errors import DataError
from seekr.softmax import exact_dtype
from seekr.sparse_rows import SparseRows

TILE_ELEMENTS = 1 << 18
_QUERY_ROWS = 64
_HIDDEN = -1e30  # a masked score; finite, so that differences of masked scores are 0 and not NaN


def tiled_attention_kl(
    query_BHTD: Tensor, key_BGTD: Tensor, teacher: Teacher, geometry: Geometry
) -> Tensor:
    """`attention_kl` in the manner above; [B,S,Q]. Not twice differentiable."""
    return _TiledKL.apply(query_BHTD, key_BGTD, teacher, geometry)  # pyright: ignore


@dataclass(frozen=True, slots=True)
class _Tile:
    """Heads slots.start .. slots.stop and query rows rows.start .. rows.stop of batch row `batch`,
    against keys keys.start .. keys.stop."""

    batch: int
    slots: slice
    rows: slice
    keys: slice


class _Layer:
    """One layer's tiles and the operands of a tile. Forward and backward walk the same way."""

    def __init__(
        self, query_BHTD: Tensor, key_BGTD: Tensor, teacher: Teacher, geometry: Geometry
    ) -> None:
        self.query_BHTD, self.key_BGTD, self.geometry = query_BHTD, key_BGTD, geometry
        self.dtype = exact_dtype(query_BHTD.dtype)
        device = query_BHTD.device
        self.positions_BQ = geometry.positions_BQ.to(device)
        at_BQ = self.positions_BQ.clamp(min=0)
        self.first_BQ = geometry.spans.first_BT.gather(1, at_BQ)
        self.last_BQ = geometry.spans.last_BT.gather(1, at_BQ)
        self.head_S = torch.tensor(geometry.heads, dtype=torch.int64, device=device)
        self.group_S = self.head_S // (query_BHTD.shape[1] // key_BGTD.shape[1])
        self.shape = (len(query_BHTD), len(geometry.heads), self.positions_BQ.shape[1])
        self.teacher = teacher

    def tiles(self) -> Iterator[_Tile]:
        num_rows_B = (self.positions_BQ >= 0).sum(dim=1).tolist()
        first_BQ, last_BQ = self.first_BQ.tolist(), self.last_BQ.tolist()
        num_slots, tokens = self.shape[1], self.key_BGTD.shape[2]
        fitting = max(1, TILE_ELEMENTS // tokens)
        for batch, num_rows in enumerate(num_rows_B):
            whole = num_slots * num_rows <= fitting
            size = max(1, num_rows) if whole else min(_QUERY_ROWS, fitting)
            for start in range(0, num_rows, size):
                rows = slice(start, min(start + size, num_rows))
                keys = slice(min(first_BQ[batch][rows]), max(last_BQ[batch][rows]) + 1)
                if keys.stop <= keys.start:
                    continue
                area = (rows.stop - rows.start) * (keys.stop - keys.start)
                heads = max(1, TILE_ELEMENTS // area)
                for slot in range(0, num_slots, heads):
                    yield _Tile(batch, slice(slot, min(slot + heads, num_slots)), rows, keys)

    def queries(self, tile: _Tile) -> Tensor:
        """The student's queries [C,K,D], scaled."""
        heads = self.head_S[tile.slots, None]
        rows = self.query_BHTD[tile.batch, heads, self.positions_BQ[tile.batch, tile.rows]]
        return rows.to(self.dtype) * self.geometry.scaling

    def keys(self, tile: _Tile) -> Tensor:
        """The student's keys [C,M,D]."""
        keys_GMD = self.key_BGTD[tile.batch, :, tile.keys]
        return keys_GMD[self.group_S[tile.slots]].to(self.dtype)

    def hide(self, scores_CKM: Tensor, tile: _Tile) -> Tensor:
        """Mask scores in place; only columns that some row of the tile may not look at."""
        first_K = self.first_BQ[tile.batch, tile.rows, None] - tile.keys.start
        last_K = self.last_BQ[tile.batch, tile.rows, None] - tile.keys.start
        lowest, highest = int(first_K.max()), int(last_K.min()) + 1
        column_M = torch.arange(scores_CKM.shape[-1], device=scores_CKM.device)
        if lowest > 0:
            part = column_M[:lowest]
            scores_CKM[..., :lowest].masked_fill_(part < first_K, _HIDDEN)
        if highest < len(column_M):
            highest = max(highest, 0)
            part = column_M[highest:]
            scores_CKM[..., highest:].masked_fill_(part > last_K, _HIDDEN)
        return scores_CKM

    def at(self, tile: _Tile) -> tuple[int, slice, slice]:
        """Index of a tile in [B,S,Q]."""
        return tile.batch, tile.slots, tile.rows


@dataclass(frozen=True, slots=True)
class _Entries:
    """What a teacher kept in one tile: where (in the flat tile, and its flat row), how much; the
    tails [C,K], or None where all are 0."""

    flat_N: Tensor
    row_N: Tensor
    value_N: Tensor
    tail_CK: Tensor | None


class _Stored:
    """A teacher's stored rows, cut into the tiles of a layer."""

    def __init__(self, layer: _Layer, teacher: SparseRows) -> None:
        self._layer, self._teacher = layer, teacher
        self._row_N, self._offsets = teacher.rows_N(), teacher.offsets.tolist()
        counts_BSQ = teacher.offsets.diff().to(self._row_N.device).view(layer.shape)
        # A row without anything outside the kept entries has no tail to look at.
        complete_BSQ = counts_BSQ >= (layer.last_BQ - layer.first_BQ + 1)[:, None]
        self._tail_BSQ = teacher.tail_R.view(layer.shape).masked_fill(complete_BSQ, 0.0)

    def entries(self, tile: _Tile) -> _Entries:
        """Return a tile's entries.

        Raises:
            DataError: an entry lies outside of the tile.
        """
        _, num_slots, num_rows = self._layer.shape
        num_keys, width = tile.keys.stop - tile.keys.start, tile.rows.stop - tile.rows.start
        chosen: list[slice] = []
        rows: list[Tensor] = []
        for index, slot in enumerate(range(tile.slots.start, tile.slots.stop)):
            first = (tile.batch * num_slots + slot) * num_rows + tile.rows.start
            chosen.append(slice(self._offsets[first], self._offsets[first + width]))
            rows.append(self._row_N[chosen[-1]] - (first - index * width))
        row_N = torch.cat(rows)
        column_N = torch.cat([self._teacher.columns_N[part] for part in chosen]) - tile.keys.start
        value_N = torch.cat([self._teacher.values_N[part] for part in chosen])
        if column_N.numel() and not 0 <= int(column_N.min()) <= int(column_N.max()) < num_keys:
            raise DataError(
                f"a teacher row of batch row {tile.batch} keeps a key outside {tile.keys.start}.."
                f"{tile.keys.stop - 1}, all that the student may look at; both need the same "
                "tokens and mask: teach the row again"
            )
        tail_CK = self._tail_BSQ[self._layer.at(tile)].to(self._layer.dtype)
        return _Entries(
            flat_N=row_N * num_keys + column_N,
            row_N=row_N,
            value_N=value_N.to(self._layer.dtype),
            tail_CK=tail_CK if bool((tail_CK > 0).any()) else None,
        )


class _TiledKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BHTD: Tensor, key_BGTD: Tensor, teacher: Teacher, geometry: Geometry
    ) -> Tensor:
        layer = _Layer(query_BHTD, key_BGTD, teacher, geometry)
        walk = _stored_forward if isinstance(teacher, SparseRows) else _pair_forward
        with torch.autocast(device_type=query_BHTD.device.type, enabled=False):
            kl_BSQ, *kept = walk(layer)
        ctx.save_for_backward(query_BHTD, key_BGTD, *kept)
        ctx.teacher, ctx.geometry = teacher, geometry
        return kl_BSQ

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_BSQ: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        query_BHTD, key_BGTD, *kept = ctx.saved_tensors
        layer = _Layer(query_BHTD, key_BGTD, ctx.teacher, ctx.geometry)
        grad_query = torch.zeros_like(query_BHTD, memory_format=torch.contiguous_format)
        grad_key = torch.zeros(key_BGTD.shape, dtype=layer.dtype, device=key_BGTD.device)
        walk = _stored_backward if isinstance(ctx.teacher, SparseRows) else _pair_backward
        with torch.autocast(device_type=query_BHTD.device.type, enabled=False):
            for tile, query_CKD, key_CMD, ds_CKM in walk(layer, grad_BSQ.to(layer.dtype), *kept):
                heads = layer.head_S[tile.slots, None]
                at = (tile.batch, heads, layer.positions_BQ[tile.batch, tile.rows])
                grad_rows = (ds_CKM @ key_CMD) * layer.geometry.scaling
                grad_query[at] = grad_rows.to(grad_query.dtype)
                into_GMD = grad_key[tile.batch, :, tile.keys]
                into_GMD.index_add_(
                    0, layer.group_S[tile.slots], ds_CKM.transpose(1, 2) @ query_CKD
                )
        return grad_query, grad_key.to(key_BGTD.dtype), None, None


def _check_present(layer: _Layer, teacher: SparseRows) -> None:
    """Check that rows which the student has not, or which see no key, have no entries."""
    blank_BQ = (layer.positions_BQ < 0) | (layer.last_BQ < layer.first_BQ)
    kept_BSQ = teacher.offsets.diff().view(layer.shape) > 0
    wrong_BSQ = kept_BSQ & blank_BQ.cpu()[:, None]
    if bool(wrong_BSQ.any()):
        raise DataError(
            f"batch row {int(wrong_BSQ.nonzero()[0, 0])} has a teacher row where the student has "
            "no query, or one that may look at no key; both need the same tokens and mask: teach "
            "the row again"
        )


def _scores(layer: _Layer, tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Return (queries, keys, masked scores [C,K,M])."""
    query_CKD, key_CMD = layer.queries(tile), layer.keys(tile)
    return query_CKD, key_CMD, layer.hide(query_CKD @ key_CMD.transpose(1, 2), tile)


def _softmax_(scores_CKM: Tensor) -> Tensor:
    """Turn scores in place into probabilities.

    The fused kernel, as an exponential of its own is many times slower where scores are hidden.
    """
    return torch.softmax(scores_CKM, dim=-1, out=scores_CKM)


def _softmax_and_log_sum_(scores_CKM: Tensor) -> tuple[Tensor, Tensor]:
    """The same; also return the logarithms of the denominators [C,K]."""
    top_CK = scores_CKM.amax(dim=-1)
    p_CKM = _softmax_(scores_CKM)
    return p_CKM, top_CK - p_CKM.amax(dim=-1).log()


def _stored_forward(layer: _Layer) -> tuple[Tensor, Tensor]:
    """Return (KL, the student's tails), both [B,S,Q]."""
    assert isinstance(layer.teacher, SparseRows)
    _check_present(layer, layer.teacher)
    kl_BSQ, rest_BSQ = layer.query_BHTD.new_zeros((2, *layer.shape), dtype=layer.dtype)
    stored, epsilon = _Stored(layer, layer.teacher), layer.geometry.epsilon
    for tile in layer.tiles():
        kept = stored.entries(tile)
        _, _, scores_CKM = _scores(layer, tile)
        score_N = scores_CKM.view(-1)[kept.flat_N]
        p_CKM, log_z_CK = _softmax_and_log_sum_(scores_CKM)
        log_p_N = score_N - log_z_CK.view(-1)[kept.row_N]
        if epsilon > 0:
            log_p_N = (log_p_N.exp() + epsilon).log()
        part_N = kept.value_N * (kept.value_N.log() - log_p_N)
        kl_CK = torch.zeros_like(log_z_CK)
        kl_CK.view(-1).index_add_(0, kept.row_N, part_N)
        if kept.tail_CK is not None:
            p_CKM.view(-1)[kept.flat_N] = 0.0
            rest_CK = rest_BSQ[layer.at(tile)] = p_CKM.sum(dim=-1)
            kl_CK += _tail_kl(kept.tail_CK, rest_CK + epsilon)
        kl_BSQ[layer.at(tile)] = kl_CK.masked_fill(kl_CK > -_HIDDEN * 1e-9, torch.inf)
    return kl_BSQ, rest_BSQ


def _tail_kl(tail: Tensor, rest: Tensor) -> Tensor:
    """tail * log(tail / rest), 0 where there is no tail; finite where `rest` underflowed."""
    tiny = torch.finfo(rest.dtype).tiny
    return torch.xlogy(tail, tail) - tail * rest.clamp(min=tiny).log()


def _stored_backward(
    layer: _Layer, grad_BSQ: Tensor, rest_BSQ: Tensor
) -> Iterator[tuple[_Tile, Tensor, Tensor, Tensor]]:
    """Yield per tile (tile, queries, keys, gradient of the scores)."""
    assert isinstance(layer.teacher, SparseRows)
    stored, epsilon = _Stored(layer, layer.teacher), layer.geometry.epsilon
    for tile in layer.tiles():
        kept = stored.entries(tile)
        query_CKD, key_CMD, scores_CKM = _scores(layer, tile)
        grad_CK, rest_CK = grad_BSQ[layer.at(tile)], rest_BSQ[layer.at(tile)]
        p_CKM = _softmax_(scores_CKM)
        p_N, u_N = p_CKM.view(-1)[kept.flat_N], kept.value_N
        if epsilon > 0:
            u_N = u_N * p_N / (p_N + epsilon)
        mass_CK = torch.zeros_like(grad_CK).view(-1).index_add(0, kept.row_N, u_N).view_as(grad_CK)
        factor_CK = mass_CK
        if kept.tail_CK is not None:
            share_CK = kept.tail_CK / (rest_CK + epsilon)
            share_CK = share_CK.masked_fill(rest_CK <= 0, 0.0)
            mass_CK = mass_CK + share_CK * rest_CK
            factor_CK = mass_CK - share_CK
        p_CKM.mul_((grad_CK * factor_CK)[..., None])
        row_grad_N = grad_CK.reshape(-1)[kept.row_N]
        kept_N = row_grad_N * (mass_CK.view(-1)[kept.row_N] * p_N - u_N)
        p_CKM.view(-1)[kept.flat_N] = kept_N
        yield tile, query_CKD, key_CMD, p_CKM


def _teacher_scores(layer: _Layer, tile: _Tile, teacher: TeacherPair) -> Tensor:
    query_CKD = teacher.query_BSQD[layer.at(tile)].to(layer.dtype) * teacher.scaling
    key_CMD = teacher.key_BSTD[tile.batch, tile.slots, tile.keys].to(layer.dtype)
    return layer.hide(query_CKD @ key_CMD.transpose(1, 2), tile)


def _pair_forward(layer: _Layer) -> tuple[Tensor]:
    """Return (KL,), [B,S,Q]."""
    assert isinstance(layer.teacher, TeacherPair)
    kl_BSQ = layer.query_BHTD.new_zeros(layer.shape, dtype=layer.dtype)
    epsilon = layer.geometry.epsilon
    for tile in layer.tiles():
        _, _, scores_CKM = _scores(layer, tile)
        theirs_CKM = _teacher_scores(layer, tile, layer.teacher)
        excess_CKM = theirs_CKM - scores_CKM
        p_CKM, log_z_CK = _softmax_and_log_sum_(scores_CKM)
        t_CKM, log_y_CK = _softmax_and_log_sum_(theirs_CKM)
        if epsilon > 0:
            kl_CK = (torch.xlogy(t_CKM, t_CKM) - t_CKM * (p_CKM + epsilon).log()).sum(dim=-1)
        else:
            kl_CK = t_CKM.mul_(excess_CKM).sum(dim=-1) - log_y_CK + log_z_CK
        valid_CK = layer.teacher.valid_BSQ[layer.at(tile)]
        kl_BSQ[layer.at(tile)] = kl_CK.masked_fill(~valid_CK, 0.0)
    return (kl_BSQ,)


def _pair_backward(
    layer: _Layer, grad_BSQ: Tensor
) -> Iterator[tuple[_Tile, Tensor, Tensor, Tensor]]:
    """Yield per tile (tile, queries, keys, gradient of the scores)."""
    assert isinstance(layer.teacher, TeacherPair)
    epsilon = layer.geometry.epsilon
    for tile in layer.tiles():
        query_CKD, key_CMD, scores_CKM = _scores(layer, tile)
        p_CKM = _softmax_(scores_CKM)
        u_CKM = _softmax_(_teacher_scores(layer, tile, layer.teacher))
        grad_CK = grad_BSQ[layer.at(tile)].masked_fill(
            ~layer.teacher.valid_BSQ[layer.at(tile)], 0.0
        )
        if epsilon > 0:
            u_CKM.mul_(p_CKM / (p_CKM + epsilon))
            p_CKM.mul_(u_CKM.sum(dim=-1, keepdim=True))
        yield tile, query_CKD, key_CMD, p_CKM.sub_(u_CKM).mul_(grad_CK[..., None])
