"""Which rows an optimizer step sees: a pure function of the rows, the seed and the step.

Task rows go through in epochs, each a permutation of its own; replay rows beside them at a fixed
ratio of rows to rows, pass after pass, so no ratio rounds to zero and a buffer longer than the task
is used like any other. Nothing depends on the number of workers or on where a run resumed: workers
take their share of a step's rows by position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from seekr.errors import ConfigError
from seekr.sampling import epoch_order

# Replay passes draw from their own family of permutations.
_REPLAY_SEED_OFFSET = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """Indices into the task's and the replay rows of one optimizer step, over all workers."""

    epoch: int
    task: NDArray[np.int64]
    replay: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The steps of one training.

    Attributes:
        row_ids: Task rows. replay_ids: replay rows, possibly none.
        epochs: Passes over the task rows; the last step of an epoch may be smaller.
        batch_size: Task rows per step. batch_ratio: replay rows per task row, any positive number.
        seed: Of both orders.
    """

    row_ids: Sequence[str]
    replay_ids: Sequence[str]
    epochs: int
    batch_size: int
    batch_ratio: float
    seed: int
    _orders: dict[tuple[str, int], NDArray[np.int64]] = field(
        default_factory=lambda: dict[tuple[str, int], NDArray[np.int64]](), repr=False
    )

    def __post_init__(self) -> None:
        if not self.row_ids:
            raise ConfigError("a training has no rows; at least one is needed: check the task")

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.row_ids) // self.batch_size)

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def ends_epoch(self, index: int) -> bool:
        """Whether step `index` is the last one of its pass over the task rows."""
        return (index + 1) % self.steps_per_epoch == 0

    def step(self, index: int) -> StepRows:
        """Return the rows of step `index` (from 0). Replay rows follow the rows seen so far."""
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} is outside 0..{self.num_steps - 1}")
        epoch, within = divmod(index, self.steps_per_epoch)
        start = within * self.batch_size
        task = self._order("task", epoch)[start : start + self.batch_size]
        seen = epoch * len(self.row_ids) + start
        return StepRows(epoch=epoch, task=task, replay=self._replay(seen, seen + len(task)))

    def _replay(self, seen_before: int, seen_after: int) -> NDArray[np.int64]:
        if not self.replay_ids:
            return np.zeros(0, dtype=np.int64)
        # Exact rational arithmetic: floats would lose a row now and then at odd ratios.
        ratio = Fraction(str(self.batch_ratio))
        first, last = int(ratio * seen_before), int(ratio * seen_after)
        rows = [divmod(position, len(self.replay_ids)) for position in range(first, last)]
        return np.array([self._order("replay", p)[i] for p, i in rows], dtype=np.int64)

    def _order(self, kind: str, epoch: int) -> NDArray[np.int64]:
        key = (kind, epoch)
        if key not in self._orders:
            rows, offset = (
                (self.row_ids, 0) if kind == "task" else (self.replay_ids, _REPLAY_SEED_OFFSET)
            )
            self._orders[key] = epoch_order(self.seed + offset, epoch, rows)
        return self._orders[key]


def share(rows: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """Return the rows of a step that belong to one worker: every world_size-th."""
    return rows[rank::world_size]


def num_micro_batches(num_rows: int, world_size: int, micro_batch_size: int) -> int:
    """Return how many forward passes each worker makes for a step's rows; equal on all workers."""
    rows_per_worker = math.ceil(num_rows / world_size)
    return math.ceil(rows_per_worker / micro_batch_size)
