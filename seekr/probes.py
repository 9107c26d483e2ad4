"""The three things that are measured on attention maps, computed from queries, keys and values.

`RowProbe` returns chosen rows of chosen heads, for teacher targets and for the student's loss.
`GradientProbe` and `DifferenceProbe` return sums of squares over whole maps: of dL/dA and of A's
change over a task. They walk over blocks of query rows, so at most `TILE_ELEMENTS` numbers of a map
exist at a time and nothing larger than [B,H] leaves a layer.

Arithmetic is in float32 or better whatever the model's dtype, outside autocast; sums are float64.

Shape suffixes: B batch, L layers, H query heads, G key/value heads, S selected heads, T tokens,
Q query rows, K query rows of one block, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from seekr.attention import Observation

TILE_ELEMENTS = 1 << 23


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype computed in: float64 stays, everything narrower becomes float32."""
    return torch.promote_types(dtype, torch.float32)


def masked_log_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Log-softmax over the allowed entries of the last axis, -inf elsewhere.

    Rows without any allowed entry are -inf throughout. No gradient is ever NaN: what reaches a
    masked entry from above is dropped.
    """
    blank = ~allowed.any(dim=-1, keepdim=True)
    log_rows = scores.masked_fill(~(allowed | blank), -torch.inf).log_softmax(dim=-1)
    return log_rows.masked_fill(~allowed, -torch.inf)


class RowProbe:
    """Keeps log-probabilities of chosen query rows of chosen heads.

    After a forward pass `log_rows[layer]` is [B,S,Q,T]: the heads in the order given, the query
    rows in the order of `positions_BQ`, -inf at masked keys and at missing rows. It is
    differentiable with respect to queries and keys. A next forward pass replaces it.

    Under non-reentrant activation checkpointing the layer runs again during backward; the second
    run computes the rows again, for autograd, and the rows of the forward pass are kept.

    Args:
        heads_by_layer: Query heads per layer; layers that are absent are not observed.
        positions_BQ: Padded positions of the query rows, -1 where a row of the batch has fewer.
    """

    def __init__(self, heads_by_layer: Mapping[int, Sequence[int]], positions_BQ: Tensor) -> None:
        self.heads_by_layer = {layer: tuple(heads) for layer, heads in heads_by_layer.items()}
        self.positions_BQ = positions_BQ
        self.log_rows: dict[int, Tensor] = {}

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(self.heads_by_layer)

    def observe(self, seen: Observation) -> None:
        """Compute the rows of one layer.

        Raises:
            RuntimeError: a model in training mode runs without autograd, so that the rows could not
                be trained on (reentrant checkpointing) or would be a teacher's with dropout.
        """
        if seen.training and not torch.is_grad_enabled():
            raise RuntimeError(
                f"attention rows of layer {seen.layer} are asked of a model in training mode "
                "without gradients; use gradient checkpointing with use_reentrant=False, or "
                "model.eval() to teach"
            )
        rows = _log_rows(seen, self.heads_by_layer[seen.layer], self.positions_BQ)
        if not _in_backward():
            self.log_rows[seen.layer] = rows


def _log_rows(seen: Observation, heads: Sequence[int], positions_BQ: Tensor) -> Tensor:
    num_heads, num_groups = seen.query_BHTD.shape[1], seen.key_BGTD.shape[1]
    if not all(0 <= head < num_heads for head in heads):
        raise ValueError(f"layer {seen.layer} has heads 0..{num_heads - 1}; asked for {heads}")
    device, dtype = seen.query_BHTD.device, exact_dtype(seen.query_BHTD.dtype)
    head_S = torch.tensor(heads, dtype=torch.long, device=device)
    positions_BQ = positions_BQ.to(device)
    at_BQ = positions_BQ.clamp(min=0)
    index_B = torch.arange(len(at_BQ), device=device)
    at = (index_B[:, None, None], head_S[None, :, None], at_BQ[:, None, :])
    with torch.autocast(device_type=device.type, enabled=False):
        query_BSQD = seen.query_BHTD[at].to(dtype)
        key_BSTD = seen.key_BGTD[:, head_S // (num_heads // num_groups)].to(dtype)
        scores_BSQT = query_BSQD @ key_BSTD.transpose(-1, -2) * seen.scaling
        allowed = _allowed_at(seen, head_S, at_BQ) & (positions_BQ >= 0)[:, None, :, None]
        return masked_log_softmax(scores_BSQT, allowed)


def _allowed_at(seen: Observation, head_S: Tensor, at_BQ: Tensor) -> Tensor:
    """Return which keys the chosen query rows may see, broadcastable to [B,S,Q,T]."""
    num_tokens = seen.key_BGTD.shape[2]
    mask = seen.mask_BHTT
    if mask is None:
        key_T = torch.arange(num_tokens, device=at_BQ.device)
        return key_T <= at_BQ[:, None, :, None]
    mask = mask if mask.shape[1] == 1 else mask[:, head_S]
    mask = mask.expand(len(at_BQ), -1, -1, -1)
    index = at_BQ[:, None, :, None].expand(-1, mask.shape[1], -1, num_tokens)
    return mask.gather(2, index)


def _in_backward() -> bool:
    """Tell a recomputation of a checkpointed layer from its forward pass."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore


class GradientProbe:
    """Sums squares of dL/dA over each row's maps while backward runs, and keeps queries and keys.

    A map enters the loss only through its output O = A V, so dL/dA_ij = dO_i . v_j, per query head,
    also where A_ij is 0 by the mask (there the paper's map has no entry and the official code has
    one).

    After backward: `causal_BLH` sums over the pairs that the mask allows, `square_BLH` over all
    pairs of real tokens. `captured[layer]` is (query [B,H,T,D], key [B,G,T,D]), detached.

    Args:
        real_BT: True at real tokens, False at padding.
    """

    layers: frozenset[int] | None = None

    def __init__(self, real_BT: Tensor) -> None:
        self.real_BT = real_BT
        self.captured: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, seen: Observation) -> None:
        """Keep queries and keys of one layer and wait for the gradient of its output."""
        self.captured[seen.layer] = (seen.query_BHTD.detach(), seen.key_BGTD.detach())
        value_BGTD = seen.value_BGTD.detach()
        seen.output_BTHD.register_hook(
            partial(self._accumulate, seen.layer, value_BGTD, seen.mask_BHTT)
        )

    @property
    def causal_BLH(self) -> Tensor:
        return _stack_layers({layer: sums[0] for layer, sums in self._sums.items()})

    @property
    def square_BLH(self) -> Tensor:
        return _stack_layers({layer: sums[1] for layer, sums in self._sums.items()})

    def _accumulate(
        self, layer: int, value_BGTD: Tensor, mask: Tensor | None, grad_BTHD: Tensor
    ) -> None:
        dtype = exact_dtype(grad_BTHD.dtype)
        grad_BHTD = grad_BTHD.transpose(1, 2).to(dtype)
        value_BGTD = value_BGTD.to(dtype)
        batch, heads, tokens, _ = grad_BHTD.shape
        causal_BH = grad_BHTD.new_zeros(batch, heads, dtype=torch.float64)
        square_BH = torch.zeros_like(causal_BH)
        real = self.real_BT[:, None, None, :]
        for start, stop in blocks(batch * heads, tokens):
            both = self.real_BT[:, None, start:stop, None] & real
            allowed = allowed_block(mask, start, stop, tokens, grad_BHTD.device) & both
            squares = _grouped_product(grad_BHTD[:, :, start:stop], value_BGTD).double().square()
            causal_BH += squares.masked_fill(~allowed, 0.0).sum(dim=(-2, -1))
            square_BH += squares.masked_fill(~both, 0.0).sum(dim=(-2, -1))
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
        self._real_BT = real_BT
        chosen = torch.zeros(len(real_BT), real_BT.shape[1] + 1, dtype=torch.bool)
        # Column T takes the missing rows (-1) and is cut off again.
        chosen.scatter_(
            1, torch.where(positions_BQ < 0, real_BT.shape[1], positions_BQ).cpu(), True
        )
        self._chosen_BT = chosen[:, :-1].to(real_BT.device) & real_BT
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def all_BLH(self) -> Tensor:
        return _stack_layers({layer: sums[0] for layer, sums in self._sums.items()})

    @property
    def chosen_BLH(self) -> Tensor:
        return _stack_layers({layer: sums[1] for layer, sums in self._sums.items()})

    @torch.no_grad()
    def observe(self, seen: Observation) -> None:
        """Compare one layer's maps with those of the model after the task."""
        query, key = self._after[seen.layer]
        if query.shape != seen.query_BHTD.shape or key.shape != seen.key_BGTD.shape:
            raise ValueError(
                f"layer {seen.layer}: queries {tuple(seen.query_BHTD.shape)} before and "
                f"{tuple(query.shape)} after the task; both models need one architecture"
            )
        batch, heads, tokens, _ = query.shape
        all_BH = torch.zeros(batch, heads, dtype=torch.float64, device=query.device)
        chosen_BH = torch.zeros_like(all_BH)
        pair_before, pair_after = (seen.query_BHTD, seen.key_BGTD), (query, key)
        for start, stop in blocks(batch * heads, tokens):
            allowed = allowed_block(seen.mask_BHTT, start, stop, tokens, query.device)
            maps = [
                _map_block(*pair, start, stop, seen.scaling, allowed)
                for pair in (pair_after, pair_before)
            ]
            per_row_BHK = (maps[0] - maps[1]).double().square().sum(dim=-1)
            for total, rows_BT in ((all_BH, self._real_BT), (chosen_BH, self._chosen_BT)):
                total += per_row_BHK.masked_fill(~rows_BT[:, None, start:stop], 0.0).sum(dim=-1)
        self._sums[seen.layer] = (all_BH, chosen_BH)


def _map_block(
    query: Tensor, key: Tensor, start: int, stop: int, scaling: float, allowed: Tensor
) -> Tensor:
    """Return rows start..stop of all maps, [B,H,K,T]."""
    dtype = exact_dtype(query.dtype)
    with torch.autocast(device_type=query.device.type, enabled=False):
        scores = _grouped_product(query[:, :, start:stop].to(dtype), key.to(dtype)) * scaling
        return masked_log_softmax(scores, allowed).exp()


def _grouped_product(left_BHKD: Tensor, right_BGTD: Tensor) -> Tensor:
    """Return left . right per query head, [B,H,K,T]; H/G query heads share a key/value head."""
    batch, heads, rows, dim = left_BHKD.shape
    groups, tokens = right_BGTD.shape[1], right_BGTD.shape[2]
    left = left_BHKD.reshape(batch, groups, heads // groups * rows, dim)
    return (left @ right_BGTD.transpose(-1, -2)).reshape(batch, heads, rows, tokens)


def blocks(num_maps: int, num_tokens: int) -> Iterator[tuple[int, int]]:
    """Split query rows into ranges whose maps hold at most TILE_ELEMENTS numbers."""
    size = max(1, TILE_ELEMENTS // (num_maps * num_tokens))
    for start in range(0, num_tokens, size):
        yield start, min(start + size, num_tokens)


def allowed_block(
    mask: Tensor | None, start: int, stop: int, num_tokens: int, device: torch.device
) -> Tensor:
    """Return which keys the query rows start..stop may see, broadcastable to [B,H,K,T]."""
    if mask is not None:
        return mask[:, :, start:stop]
    query_K = torch.arange(start, stop, device=device)
    key_T = torch.arange(num_tokens, device=device)
    return (key_T <= query_K[:, None])[None, None]


def _stack_layers(by_layer: Mapping[int, Tensor]) -> Tensor:
    if not by_layer:
        raise RuntimeError("the probe has observed nothing; run the model inside `probing` first")
    return torch.stack([by_layer[layer] for layer in sorted(by_layer)], dim=1)
