"""KL(teacher row || student row) of attention maps, without the student's map.

The one entry point through which attention is distilled. It takes the student's queries and keys,
not its probabilities, so an implementation may walk over tiles of the map and forget them:
`reference` forms the rows and leaves the rest to autograd, `tiled` walks and recomputes in backward
(`attention_kl_tiled`), `triton` does the same in one kernel on CUDA (`attention_kl_triton`).

With scores s, student p = softmax(s) over the keys that the mask allows and teacher t, the gradient
of KL(t || p) with respect to s is p - t: neither a map nor its logarithm has to be kept.

Shape suffixes: B batch, H query heads, G key/value heads, S selected heads, Q query rows, T tokens
(keys), D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seekr.softmax import exact_dtype, masked_log_softmax
from seekr.spans import Spans
from seekr.sparse_rows import SparseRows

Reduction = Literal["mean", "sum"]
Backend = Literal["auto", "reference", "tiled", "triton"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherPair:
    """The teacher's side as queries and keys: its rows are softmax(scaling * query . key) over the
    same keys that the student may look at.

    Attributes:
        query_BSQD: Of the selected heads at the query rows.
        key_BSTD: Of the same heads; an expanded view where heads share a key head.
        scaling: Multiplies the scores.
        valid_BSQ: False where there is no teacher row.
    """

    query_BSQD: Tensor
    key_BSTD: Tensor
    scaling: float
    valid_BSQ: Tensor


Teacher = SparseRows | TeacherPair


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Geometry:
    """Which entries of the maps are compared: not differentiable, shared by both sides.

    Attributes:
        heads: Query heads, ascending; the S axis.
        positions_BQ: Query rows as padded positions, -1 (after a batch row's last one) for none.
        spans: Which keys each query may look at.
        scaling: Multiplies the student's scores.
        epsilon: 0 for the paper's KL. The official code uses log(student + 1e-8), which leaves the
            teacher's own logarithm alone and bounds the loss where the student is near 0.
    """

    heads: tuple[int, ...]
    positions_BQ: Tensor
    spans: Spans
    scaling: float
    epsilon: float = 0.0


def attention_kl(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    teacher: Teacher,
    geometry: Geometry,
    backend: Backend = "auto",
) -> Tensor:
    """KL(teacher || student) per attention row, the summand of equation (12).

    Args:
        query_BHTD, key_BGTD: The student's, as the attention function gets them. H is a multiple of
            G; gradients flow into both, none into the teacher.
        teacher: Stored rows in the order (B, S, Q), columns being padded key positions; or queries
            and keys.
        geometry: The rows compared.
        backend: "auto" is "triton" on CUDA where it can be used and "tiled" elsewhere.

    Returns:
        [B,S,Q] in float32, or float64 for float64 input; 0 where there is no teacher row. Infinite
        where the student cannot look at a key that the teacher looked at (with epsilon 0).
    """
    _check(query_BHTD, key_BGTD, teacher, geometry)
    if backend == "auto":
        backend = _best_backend(query_BHTD, geometry)
    if backend == "reference":
        return _reference(query_BHTD, key_BGTD, teacher, geometry)
    if backend == "tiled":
        from seekr.attention_kl_tiled import tiled_attention_kl

        return tiled_attention_kl(query_BHTD, key_BGTD, teacher, geometry)
    if backend == "triton":
        from seekr.attention_kl_triton import triton_attention_kl

        return triton_attention_kl(query_BHTD, key_BGTD, teacher, geometry)
    raise ValueError(
        f"attention KL backend {backend!r} is unknown; use 'auto', 'reference', 'tiled' or 'triton'"
    )


def _best_backend(query_BHTD: Tensor, geometry: Geometry) -> Backend:
    if query_BHTD.device.type != "cuda":
        return "tiled"
    from seekr.attention_kl_triton import can_use_triton

    return "triton" if can_use_triton(query_BHTD, geometry) else "tiled"


def _check(query: Tensor, key: Tensor, teacher: Teacher, geometry: Geometry) -> None:
    _check_heads(query, geometry)
    num_heads, num_groups = query.shape[1], key.shape[1]
    if num_heads % num_groups:
        raise ValueError(
            f"{num_heads} query heads cannot share {num_groups} key heads; a multiple is needed"
        )
    rows = len(query) * len(geometry.heads) * geometry.positions_BQ.shape[1]
    found = len(teacher) if isinstance(teacher, SparseRows) else teacher.valid_BSQ.numel()
    if found != rows:
        raise ValueError(
            f"{found} teacher rows for {len(query)} batch rows x {len(geometry.heads)} heads x "
            f"{geometry.positions_BQ.shape[1]} query rows = {rows}; they must be equal"
        )


def _check_heads(query_BHTD: Tensor, geometry: Geometry) -> None:
    num_heads = query_BHTD.shape[1]
    if not all(0 <= head < num_heads for head in geometry.heads):
        raise ValueError(
            f"the layer has heads 0..{num_heads - 1}; asked for {geometry.heads}: select heads for "
            "this model"
        )


def student_log_rows(query_BHTD: Tensor, key_BGTD: Tensor, geometry: Geometry) -> Tensor:
    """Log-probabilities [B,S,Q,T] of the compared rows, -inf at masked keys and missing rows.

    Differentiable; this is the map that the other backends avoid, but for the chosen rows only.

    Raises:
        ValueError: the layer has no such head.
    """
    _check_heads(query_BHTD, geometry)
    device, dtype = query_BHTD.device, exact_dtype(query_BHTD.dtype)
    head_S = torch.tensor(geometry.heads, dtype=torch.long, device=device)
    at_BQ = geometry.positions_BQ.to(device).clamp(min=0)
    index_B = torch.arange(len(at_BQ), device=device)
    at = (index_B[:, None, None], head_S[None, :, None], at_BQ[:, None, :])
    with torch.autocast(device_type=device.type, enabled=False):
        query_BSQD = query_BHTD[at].to(dtype)
        group_S = head_S // (query_BHTD.shape[1] // key_BGTD.shape[1])
        key_BSTD = key_BGTD[:, group_S].to(dtype)
        scores_BSQT = query_BSQD @ key_BSTD.transpose(-1, -2) * geometry.scaling
        return masked_log_softmax(scores_BSQT, allowed_rows(geometry, key_BGTD.shape[2]))


def allowed_rows(geometry: Geometry, num_tokens: int) -> Tensor:
    """Return which keys the compared rows may look at, [B,1,Q,T]; none for missing rows."""
    device = geometry.spans.first_BT.device
    positions_BQ = geometry.positions_BQ.to(device)
    at_BQ = positions_BQ.clamp(min=0)
    first_BQ = geometry.spans.first_BT.gather(1, at_BQ)
    last_BQ = geometry.spans.last_BT.gather(1, at_BQ).masked_fill(positions_BQ < 0, -1)
    key_T = torch.arange(num_tokens, device=device)
    return ((key_T >= first_BQ[..., None]) & (key_T <= last_BQ[..., None]))[:, None]


def _reference(
    query_BHTD: Tensor, key_BGTD: Tensor, teacher: Teacher, geometry: Geometry
) -> Tensor:
    """Form the rows, then the sums, in the plainest way."""
    log_p = student_log_rows(query_BHTD, key_BGTD, geometry)
    with torch.no_grad():
        t, tail = _dense_teacher(teacher, geometry, log_p)
    kept = t > 0
    t_safe = t.masked_fill(~kept, 1.0)
    log_kept = _with_epsilon(log_p.masked_fill(~kept, 0.0), geometry.epsilon)
    kl = (t_safe * (t_safe.log() - log_kept)).masked_fill(~kept, 0.0).sum(dim=-1)
    # A row without anything outside the kept entries has no tail to look at.
    rest = (tail > 0) & (log_p.masked_fill(kept, -torch.inf).amax(dim=-1) > -torch.inf)
    hidden = kept | ~rest[..., None]
    log_rest = log_p.masked_fill(hidden, -torch.inf).masked_fill(~rest[..., None], 0.0)
    log_rest = _with_epsilon(log_rest.logsumexp(dim=-1), geometry.epsilon)
    tail_safe = tail.masked_fill(~rest, 1.0)
    return kl + (tail_safe * (tail_safe.log() - log_rest)).masked_fill(~rest, 0.0)


def _dense_teacher(teacher: Teacher, geometry: Geometry, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return (probabilities [B,S,Q,T], tail [B,S,Q])."""
    if isinstance(teacher, SparseRows):
        dense = teacher.dense_RC(log_p.shape[-1]).to(log_p.dtype).reshape(log_p.shape)
        return dense, teacher.tail_R.to(log_p.dtype).reshape(log_p.shape[:-1])
    with torch.autocast(device_type=log_p.device.type, enabled=False):
        query, key = teacher.query_BSQD.to(log_p.dtype), teacher.key_BSTD.to(log_p.dtype)
        scores = query @ key.transpose(-1, -2) * teacher.scaling
    rows = masked_log_softmax(scores, allowed_rows(geometry, log_p.shape[-1])).exp()
    rows = rows.masked_fill(~teacher.valid_BSQ[..., None], 0.0)
    return rows, rows.new_zeros(rows.shape[:-1])


def _with_epsilon(log_p: Tensor, epsilon: float) -> Tensor:
    return (log_p.exp() + epsilon).log() if epsilon > 0 else log_p


def reduce_attention_kl(
    kl_by_layer: Mapping[int, Tensor],
    valid_by_layer: Mapping[int, Tensor],
    reduction: Reduction = "mean",
) -> Tensor:
    """Reduce per-row KL to one number per row of the batch.

    Args:
        kl_by_layer: [B,S,Q] per layer.
        valid_by_layer: [B,Q] or [B,S,Q] per layer: which of them are a batch row's own. Rows of a
            batch may have different heads (selections frozen per task).
        reduction: "sum" over heads and query rows, equation (12); "mean" as the official code: over
            heads and query rows of a layer, then over layers. lambda2 = 1e2..1e3 goes with "mean".
            Each batch row averages over its own heads, query rows and layers only.

    Returns:
        [B]; 0 for a batch row without any valid entry.
    """
    if not kl_by_layer:
        raise ValueError("no attention layer to reduce; distil at least one head")
    totals: list[Tensor] = []
    counts: list[Tensor] = []
    for layer, kl_BSQ in kl_by_layer.items():
        valid_BSQ = _valid_BSQ(valid_by_layer[layer]).to(kl_BSQ.device).expand_as(kl_BSQ)
        totals.append(kl_BSQ.masked_fill(~valid_BSQ, 0.0).sum(dim=(1, 2)))
        counts.append(valid_BSQ.sum(dim=(1, 2)))
    total_LB, count_LB = torch.stack(totals), torch.stack(counts)
    if reduction == "sum":
        return total_LB.sum(dim=0)
    if reduction == "mean":
        layers_B = (count_LB > 0).sum(dim=0).clamp(min=1)
        return (total_LB / count_LB.clamp(min=1)).sum(dim=0) / layers_B
    raise ValueError(f"attention KL reduction {reduction!r} is unknown; use 'mean' or 'sum'")


def _valid_BSQ(valid: Tensor) -> Tensor:
    """Give [B,Q] a head axis; [B,S,Q] stays."""
    return valid[:, None, :] if valid.dim() == 2 else valid
