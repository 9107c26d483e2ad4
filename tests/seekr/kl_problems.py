"""Random students and teachers for tests of the attention KL, and the students' rows by loops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from seekr.attention_kl import Geometry, TeacherPair
from seekr.spans import Spans
from seekr.sparse_rows import SparseRows, keep_largest

MASKS = ("causal", "left", "right", "window", "packed", "left-window")
BATCH, DIM = 2, 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A student's queries [B,H,T,D] and keys [B,G,T,D], and which rows of its maps are compared."""

    query: Tensor
    key: Tensor
    heads: tuple[int, ...]
    positions_BQ: Tensor
    spans: Spans
    scaling: float
    seed: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (BATCH, len(self.heads), self.positions_BQ.shape[1])

    def geometry(self, epsilon: float = 0.0) -> Geometry:
        return Geometry(
            heads=self.heads,
            positions_BQ=self.positions_BQ,
            spans=self.spans,
            scaling=self.scaling,
            epsilon=epsilon,
        )

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype))

    def student_rows(self) -> Tensor:
        """Return the compared rows' probabilities [B,S,Q,T] in float64, row by row."""
        tokens = self.query.shape[2]
        groups = self.query.shape[1] // self.key.shape[1]
        query, key = self.query.detach().double().numpy(), self.key.detach().double().numpy()
        rows = np.zeros((*self.shape, tokens))
        for b, s, q in np.ndindex(*self.shape):
            position, head = int(self.positions_BQ[b, q]), self.heads[s]
            if position < 0:
                continue
            first, last = (
                int(self.spans.first_BT[b, position]),
                int(self.spans.last_BT[b, position]),
            )
            if last < first:
                continue
            keys = key[b, head // groups, first : last + 1]
            scores = self.scaling * (keys @ query[b, head, position])
            weights = np.exp(scores - scores.max())
            rows[b, s, q, first : last + 1] = weights / weights.sum()
        return torch.from_numpy(rows)


def spans_of(mask: str, tokens: int) -> Spans:
    """Return the spans of a batch of two; padded queries see no key."""
    query_BT = torch.arange(tokens).repeat(BATCH, 1)
    first_BT, last_BT = torch.zeros_like(query_BT), query_BT.clone()
    if "window" in mask:
        first_BT = (query_BT - 2).clamp(min=0)
    if mask == "packed":
        cut = max(1, tokens // 3)
        first_BT[query_BT >= cut] = cut
    if "left" in mask:
        start = tokens // 3
        first_BT[1] = first_BT[1].clamp(min=start)
        first_BT[1, :start], last_BT[1, :start] = 0, -1
    if mask == "right":
        length = tokens - tokens // 3
        last_BT[1] = last_BT[1].clamp(max=length - 1)
    return Spans(first_BT, last_BT)


def problem(
    mask: str,
    tokens: int,
    num_heads: tuple[int, int],
    heads: tuple[int, ...],
    all_queries: bool,
    seed: int,
) -> Problem:
    """Draw a student with num_heads = (H, G) in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randn(BATCH, count, tokens, DIM, generator=generator).double() * 1.5

    query, key = (draw(count) for count in num_heads)
    positions_BQ = torch.arange(tokens).repeat(BATCH, 1)
    if not all_queries:
        counts = [max(1, tokens // 2), max(1, tokens // 3)]
        positions_BQ = torch.full((BATCH, counts[0]), -1)
        for row, count in enumerate(counts):
            chosen = torch.randperm(tokens, generator=generator)[:count].sort().values
            positions_BQ[row, :count] = chosen
    return Problem(
        query=query,
        key=key,
        heads=heads,
        positions_BQ=positions_BQ,
        spans=spans_of(mask, tokens),
        scaling=0.7,
        seed=seed,
    )


def _other(given: Problem, of_student: bool) -> Problem:
    """Return the teacher's queries and keys, in float64."""
    if of_student:
        return given.to(torch.float64)
    generator = torch.Generator().manual_seed(given.seed + 1)
    query, key = (
        torch.randn(part.shape, generator=generator).double() for part in (given.query, given.key)
    )
    return replace(given, query=query, key=key)


def _present(given: Problem, dense_BSQT: Tensor) -> Tensor:
    """Return which rows have a target [B,S,Q]: not the first head's last row of the batch row 1."""
    present = dense_BSQT.sum(dim=-1) > 0
    present[1, 0, -1:] = False
    return present


def teacher_rows(
    given: Problem, keep: int | None, *, of_student: bool = False
) -> tuple[SparseRows, Tensor]:
    """Return stored rows, and the same as [B,S,Q,T + 1] with the tail at the end."""
    dense = _other(given, of_student).student_rows()
    present_R = _present(given, dense).flatten()
    flat = dense.flatten(0, 2).masked_fill(~present_R[:, None], 0.0)
    possible_R = (flat > 0).sum(dim=-1)
    rows = keep_largest(flat, possible_R, keep)
    tail_R = rows.tail_R.masked_fill(~present_R, 0.0)
    rows = replace(rows, tail_R=tail_R)
    target = torch.cat([rows.dense_RC(dense.shape[-1]), tail_R[:, None]], dim=1)
    return rows, target.view(*given.shape, dense.shape[-1] + 1)


def teacher_pair(given: Problem, *, of_student: bool = False) -> tuple[TeacherPair, Tensor]:
    """Return queries and keys, and their rows as [B,S,Q,T + 1] without a tail."""
    other = _other(given, of_student)
    dense = other.student_rows()
    valid_BSQ = _present(given, dense)
    heads = torch.tensor(given.heads)
    groups = given.query.shape[1] // given.key.shape[1]
    at_BQ = given.positions_BQ.clamp(min=0)
    index = (torch.arange(BATCH)[:, None, None], heads[None, :, None], at_BQ[:, None])
    pair = TeacherPair(
        query_BSQD=other.query[index],
        key_BSTD=other.key[:, heads // groups],
        scaling=given.scaling,
        valid_BSQ=valid_BSQ,
    )
    dense = dense.masked_fill(~valid_BSQ[..., None], 0.0)
    return pair, torch.cat([dense, dense.new_zeros(*given.shape, 1)], dim=-1)
