"""Sums of squared dot products of queries' gradients and keys' values, without the products.

The squares of dO_i . v_j over queries I and keys J sum to the inner product of two D x D Gram
matrices, <sum_I dO_i dO_i^T, sum_J v_j v_j^T>. A row is cut into blocks of tokens: the keys that a
whole block of queries may look at are one difference of prefix sums, and only the blocks that the
mask cuts through are multiplied out. Time is O(T D^2) per head, memory O(T D).

Products are in the precision of the inputs (exact_dtype), sums in float64.

Shape suffixes: G key/value heads, R query heads per key/value head, H = G R query heads, T tokens,
N blocks, K tokens of a block, P pairs of blocks, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from seekr.softmax import exact_dtype

CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class GramPlan:
    """Which blocks of keys each block of queries of one row may look at.

    Query block n sees the blocks low_N[n] .. high_N[n] (excluded) wholly, and the blocks key_P[p]
    with query_P[p] = n in part, as first_NK and last_NK (both included) say.
    """

    first_NK: Tensor
    last_NK: Tensor
    low_N: Tensor
    high_N: Tensor
    query_P: Tensor
    key_P: Tensor


def gram_plan(first_T: Tensor, last_T: Tensor, real_T: Tensor, size: int) -> GramPlan:
    """Return the plan of one row, for blocks of `size` tokens.

    Args:
        first_T: First key of each query, as in `Spans`.
        last_T: Last key of each query, included.
        real_T: True at real tokens; the spans of others are not looked at.
    """
    tokens = len(first_T)

    def blocked(span_T: Tensor, fill: int) -> Tensor:
        span_T = span_T.masked_fill(~real_T, fill)
        return functional.pad(span_T, (0, -tokens % size), value=fill).view(-1, size)

    first_NK, last_NK = blocked(first_T, tokens), blocked(last_T, -1)
    start_N = first_NK.amin(dim=1) // size
    stop_N = torch.maximum(last_NK.amax(dim=1) // size + 1, start_N)
    low_N = (blocked(first_T, 0).amax(dim=1) + size - 1) // size
    high_N = (blocked(last_T, tokens - 1).amin(dim=1) + 1) // size
    whole_N = (low_N < high_N) & (start_N < stop_N)
    low_N, high_N = torch.where(whole_N, low_N, start_N), torch.where(whole_N, high_N, start_N)
    left, right = _pairs(start_N, low_N), _pairs(high_N, stop_N)
    query_P, key_P = (torch.cat(sides) for sides in zip(left, right, strict=True))
    return GramPlan(first_NK, last_NK, low_N, high_N, query_P, key_P)


def _pairs(start_N: Tensor, stop_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n, k) for every n and every k from start_N[n] to stop_N[n], excluded."""
    count_N = stop_N - start_N
    query_P = torch.arange(len(count_N), device=count_N.device).repeat_interleave(count_N)
    before_N = count_N.cumsum(dim=0) - count_N
    offset_P = torch.arange(len(query_P), device=count_N.device) - before_N[query_P]
    return query_P, start_N[query_P] + offset_P


def product_squares(
    grad_THD: Tensor, value_GTD: Tensor, real_T: Tensor, plan: GramPlan
) -> tuple[Tensor, Tensor]:
    """Sum (dO_i . v_j)^2 over pairs of real tokens of one row, per query head.

    Args:
        grad_THD: Gradient of the heads' outputs.
        value_GTD: Values; H/G successive query heads share one.
        real_T: True at real tokens; others may hold anything.
        plan: `gram_plan` of the row.

    Returns:
        [H] float64 over the pairs that the plan allows, and over all pairs.
    """
    tokens, heads, dim = grad_THD.shape
    groups, size = len(value_GTD), plan.first_NK.shape[1]
    dtype = exact_dtype(grad_THD.dtype)
    padding_T1 = ~real_T[:, None]
    grad_HTD = grad_THD.movedim(0, 1).to(dtype).masked_fill(padding_T1, 0.0)
    # The squares of tiny gradients would leave float32's range.
    peak = torch.linalg.vector_norm(grad_HTD, ord=torch.inf)
    scale = torch.where(peak > 0, peak, torch.ones_like(peak))
    grad_GRTD = grad_HTD.unflatten(0, (groups, heads // groups))
    parts: list[tuple[Tensor, Tensor]] = []
    for some in chunks(groups, heads // groups * tokens * max(dim, size)):
        value = value_GTD[some].to(dtype).masked_fill(padding_T1, 0.0)
        blocks = _in_blocks(grad_GRTD[some] / scale, size), _in_blocks(value, size)
        whole, square = _gram_sums(*blocks, plan)
        parts.append((whole + _pair_sums(*blocks, plan), square))
    allowed_GR, square_GR = (torch.cat(part) for part in zip(*parts, strict=True))
    return allowed_GR.flatten() * scale.double() ** 2, square_GR.flatten() * scale.double() ** 2


def _gram_sums(grad_GRNKD: Tensor, value_GNKD: Tensor, plan: GramPlan) -> tuple[Tensor, Tensor]:
    """Return the sums [G,R] over blocks that are seen wholly, and over all pairs."""
    grad_GRNDD = (grad_GRNKD.mT @ grad_GRNKD).double()
    value_GNDD = (value_GNKD.mT @ value_GNKD).double()
    prefix_GNDD = functional.pad(value_GNDD.cumsum(dim=1), (0, 0, 0, 0, 1, 0))
    high_N, low_N = (bound_N.clamp(max=len(plan.low_N)) for bound_N in (plan.high_N, plan.low_N))
    seen_GNDD = prefix_GNDD[:, high_N] - prefix_GNDD[:, low_N]
    whole = grad_GRNDD.flatten(2) @ seen_GNDD.flatten(1)[..., None]
    square = grad_GRNDD.sum(dim=2).flatten(2) @ prefix_GNDD[:, -1].flatten(1)[..., None]
    return whole[..., 0], square[..., 0]


def _pair_sums(grad_GRNKD: Tensor, value_GNKD: Tensor, plan: GramPlan) -> Tensor:
    """Return the sum [G,R] over the allowed entries of the blocks that are seen in part."""
    groups, ratio, _, size, _ = grad_GRNKD.shape
    total = grad_GRNKD.new_zeros(groups, ratio, dtype=torch.float64)
    offset_K = torch.arange(size, device=total.device)
    for some in chunks(len(plan.query_P), groups * ratio * size**2):
        query_P, key_P = plan.query_P[some], plan.key_P[some]
        grad_GPXD = grad_GRNKD[:, :, query_P].transpose(1, 2).flatten(2, 3)
        product = (grad_GPXD @ value_GNKD[:, key_P].mT).unflatten(2, (ratio, size))
        key_P1K = (key_P[:, None] * size + offset_K)[:, None]
        first_PK1, last_PK1 = plan.first_NK[query_P][..., None], plan.last_NK[query_P][..., None]
        hidden_PKK = (key_P1K < first_PK1) | (key_P1K > last_PK1)
        product.masked_fill_(hidden_PKK[:, None], 0.0)
        norm_GPRK = torch.linalg.vector_norm(product, dim=-1).double()
        total += norm_GPRK.square().sum(dim=(1, 3))
    return total


def _in_blocks(part: Tensor, size: int) -> Tensor:
    """Cut [...,T,D] into [...,N,K,D]; the last block is filled up with zeros."""
    missing = -part.shape[-2] % size
    whole = functional.pad(part, (0, 0, 0, missing)) if missing else part.contiguous()
    return whole.unflatten(-2, (-1, size))


def chunks(count: int, elements_each: int) -> Iterator[slice]:
    """Split `count` things of so many numbers each into runs of at most CHUNK_ELEMENTS numbers."""
    step = max(1, CHUNK_ELEMENTS // elements_each)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
