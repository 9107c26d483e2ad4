"""Probability distributions of which few entries are kept, and the rest as one mass.

Attention rows and next-token distributions are dominated by a few entries. A `SparseRows` holds any
number of distributions in compressed-row form: kept entries with their columns, and per row the
`tail`, the probability of everything that was not kept. With all entries kept the tail is 0 and the
row is exact.

A KL divergence against such a row treats the tail as one outcome: sum_kept t log(t / p) +
tail log(tail / p(not kept)). By the data-processing inequality it never exceeds the full KL; it is
0 where the full one is; and its gradient asks nothing of how the student spreads its own tail.

Shape suffixes: R rows, N kept entries of all rows, C columns (possible outcomes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseRows:
    """R distributions; row r has entries offsets[r] .. offsets[r + 1].

    Attributes:
        columns_N: int64, ascending within a row.
        values_N: Probabilities of the kept entries.
        offsets: [R + 1] int64, always on the CPU.
        tail_R: Probability of the columns that were not kept. A row without entries and with tail 0
            is no distribution at all: it has no target.
    """

    columns_N: Tensor
    values_N: Tensor
    offsets: Tensor
    tail_R: Tensor

    def __len__(self) -> int:
        return len(self.tail_R)

    def to(self, device: torch.device | str) -> SparseRows:
        """Return the rows with their entries on `device`."""
        return SparseRows(
            columns_N=self.columns_N.to(device),
            values_N=self.values_N.to(device),
            offsets=self.offsets,
            tail_R=self.tail_R.to(device),
        )

    def cut(self, start: int, stop: int) -> SparseRows:
        """Return rows start .. stop."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return SparseRows(
            columns_N=self.columns_N[first:last],
            values_N=self.values_N[first:last],
            offsets=self.offsets[start : stop + 1] - first,
            tail_R=self.tail_R[start:stop],
        )

    def rows_N(self) -> Tensor:
        """Return each entry's row, int64 on the entries' device."""
        counts = self.offsets.diff().to(self.columns_N.device)
        index = torch.arange(len(self), device=counts.device)
        return index.repeat_interleave(counts, output_size=len(self.columns_N))

    def mass_R(self) -> Tensor:
        """Return each row's whole probability: 1 up to rounding, 0 for rows without a target."""
        return self.tail_R.index_add(0, self.rows_N(), self.values_N)

    def dense_RC(self, num_columns: int) -> Tensor:
        """Return the kept entries as [R, num_columns], 0 elsewhere; the tail is not in it."""
        dense_RC = self.values_N.new_zeros(len(self), num_columns)
        dense_RC[self.rows_N(), self.columns_N] = self.values_N
        return dense_RC


def keep_largest(dense_RC: Tensor, possible_R: Tensor, keep: int | None) -> SparseRows:
    """Keep the largest entries of all rows together.

    One threshold for all rows spends entries where probability is concentrated: it is the choice of
    `keep * R` entries that loses the least squared probability. A flat row may keep none.

    Args:
        dense_RC: Distributions, 0 where a row has no such outcome.
        possible_R: Number of outcomes that each row could have; a row that keeps them all has tail
            0.
        keep: Entries per row on average, at least 1; None keeps all that are not 0.
    """
    num_columns = dense_RC.shape[1]
    flat = dense_RC.reshape(-1)
    kept = flat.nonzero()[:, 0]
    if keep is not None and len(kept) > keep * len(dense_RC):
        largest = flat[kept].topk(keep * len(dense_RC), sorted=False).indices
        kept = kept[largest].sort().values
    rows_N, values_N = kept // num_columns, flat[kept]
    counts_R = torch.bincount(rows_N, minlength=len(dense_RC))
    tail_R = 1.0 - values_N.new_zeros(len(dense_RC)).index_add(0, rows_N, values_N)
    complete_R = (counts_R >= possible_R) if keep is not None else torch.ones_like(counts_R).bool()
    return SparseRows(
        columns_N=kept % num_columns,
        values_N=values_N,
        offsets=torch.cat([counts_R.new_zeros(1), counts_R.cumsum(0)]).cpu(),
        tail_R=tail_R.clamp(min=0.0).masked_fill(complete_R, 0.0),
    )


def concatenate(parts: Sequence[SparseRows]) -> SparseRows:
    """Return the rows of all parts, one after the other."""
    starts = torch.tensor([0, *(len(part.columns_N) for part in parts)]).cumsum(0)
    offsets = [part.offsets[1:] + starts[index] for index, part in enumerate(parts)]
    return SparseRows(
        columns_N=torch.cat([part.columns_N for part in parts]),
        values_N=torch.cat([part.values_N for part in parts]),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), *offsets]),
        tail_R=torch.cat([part.tail_R for part in parts]),
    )
