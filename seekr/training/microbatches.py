"""The rows of a training in a worker's memory, and its share of a step cut into micro-batches.

A step's rows are put in order of length before they are dealt, so that the rows of a pass are about
as long as each other and workers have about as much to do. Task rows may be packed, whole, into
sequences without padding. Which rows a step has never depends on workers, micro-batch or packing, and
all workers make the same number of passes: where one has no row left, it repeats one that counts for
nothing.

A row that is distilled has its encoded target beside it; it is decoded when its batch is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from seekr.batch_targets import BatchTargets, collate_targets
from seekr.batches import StepRows, num_micro_batches, share
from seekr.collation import Batch, collate, collate_packed
from seekr.prompts import TokenizedRow
from seekr.teacher_store import decode_target

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        targets: Encoded, one per row, or None.
        counts: False for a pass that only keeps the workers in step.
        packed: Whether the rows are joined into one sequence, or padded.
    """

    rows: Sequence[TokenizedRow]
    targets: Sequence[bytes] | None
    replay: bool
    counts: bool
    packed: bool = False

    def tensors(self, pad_id: int, device: torch.device) -> tuple[Batch, BatchTargets | None]:
        """Pad or pack the rows and place their targets."""
        batch = collate_packed(self.rows) if self.packed else collate(self.rows, pad_id)
        if self.targets is None:
            return batch.to(device), None
        targets = collate_targets([decode_target(target) for target in self.targets], batch)
        return batch.to(device), targets.to(device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingRows:
    """Task rows and replay rows; ids are `task/row_id`, so two tasks may share a row.

    `targets` are encoded, one per replay row, or None; `task_targets` one per task row.
    """

    task: Sequence[TokenizedRow]
    task_ids: Sequence[str]
    replay: Sequence[TokenizedRow]
    replay_ids: Sequence[str]
    targets: Sequence[bytes] | None
    task_targets: Sequence[bytes] | None = None

    def counts(self, rows: StepRows) -> dict[str, int]:
        """Return what loss terms are divided by, over all workers, and the tokens processed."""
        task = [self.task[index] for index in rows.task]
        replay = [self.replay[index] for index in rows.replay]
        return {
            "task_tokens": max(1, _answer_tokens(task)),
            "task_rows": max(1, len(task)),
            "replay_tokens": max(1, _answer_tokens(replay)),
            "replay_rows": max(1, len(replay)),
            "tokens": sum(len(row.input_ids) for row in (*task, *replay)),
        }

    def micro_batches(
        self,
        rows: StepRows,
        rank: int,
        world_size: int,
        size: int,
        pack_tokens: int | None = None,
    ) -> list[MicroBatch]:
        """Return one worker's passes of a step: its task rows, then its replay rows.

        Args:
            size: Rows of a padded pass.
            pack_tokens: Tokens of a packed pass of task rows; where the step has a longer row, its
                length is the limit. None pads task rows as well. Replay rows are always padded, as
                their targets are per sequence.
        """
        task = _longest_first(self.task, rows.task)
        replay = _longest_first(self.replay, rows.replay)
        if pack_tokens is None:
            shares = _cut(task, rank, world_size, size)
        else:
            shares = _deal(_pack(self.task, task, pack_tokens), rank, world_size)
        packed = pack_tokens is not None
        return [
            *(self._task_pass(own, task, packed) for own in shares),
            *(self._replay_pass(own, replay) for own in _cut(replay, rank, world_size, size)),
        ]

    def _task_pass(self, own: Indices, rows: Indices, packed: bool) -> MicroBatch:
        chosen, targets = _or_shortest(own, rows), self.task_targets
        return MicroBatch(
            rows=[self.task[index] for index in chosen],
            targets=None if targets is None else [targets[index] for index in chosen],
            replay=False,
            counts=len(own) > 0,
            packed=packed,
        )

    def _replay_pass(self, own: Indices, rows: Indices) -> MicroBatch:
        chosen = _or_shortest(own, rows)
        return MicroBatch(
            rows=[self.replay[index] for index in chosen],
            targets=None if self.targets is None else [self.targets[index] for index in chosen],
            replay=True,
            counts=len(own) > 0,
        )


def first_fit_decreasing(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Put items into as few packs as is cheaply found, none longer than `limit`.

    Args:
        lengths: Of the items, longest first. An item above the limit is a pack of its own.

    Returns:
        Packs of indices into `lengths`, in the order in which they were opened.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        fitting = next((pack for pack, left in enumerate(room) if left >= length), None)
        if fitting is None:
            packs.append([index])
            room.append(limit - length)
        else:
            packs[fitting].append(index)
            room[fitting] -= length
    return packs


def _longest_first(source: Sequence[TokenizedRow], rows: Indices) -> Indices:
    """Return a step's rows by falling length; rows of one length stay in the step's order."""
    lengths = np.array([len(source[index].input_ids) for index in rows], dtype=np.int64)
    return rows[np.argsort(-lengths, kind="stable")]


def _or_shortest(own: Indices, rows: Indices) -> Indices:
    """Return a pass's rows, or the cheapest of the step's where it has none."""
    return own if len(own) else rows[-1:]


def _cut(rows: Indices, rank: int, world_size: int, size: int) -> list[Indices]:
    """Return a worker's share in passes of `size` rows, the last ones possibly empty."""
    own = share(rows, rank, world_size)
    passes = num_micro_batches(len(rows), world_size, size)
    return [own[index * size : (index + 1) * size] for index in range(passes)]


def _pack(source: Sequence[TokenizedRow], rows: Indices, pack_tokens: int) -> list[Indices]:
    """Pack rows that come longest first; the fullest packs come first."""
    lengths = [len(source[index].input_ids) for index in rows]
    packs = first_fit_decreasing(lengths, max([pack_tokens, *lengths[:1]]))
    packs.sort(key=lambda pack: -sum(lengths[index] for index in pack))
    return [rows[pack] for pack in packs]


def _deal(packs: Sequence[Indices], rank: int, world_size: int) -> list[Indices]:
    """Return a worker's packs, with an empty one where others have one more.

    Every other round goes backwards, so no worker gets the fuller pack each time: workers' tokens
    differ by at most one pack.
    """
    found: list[Indices] = []
    for turn in range(-(-len(packs) // world_size)):
        place = rank if turn % 2 == 0 else world_size - 1 - rank
        index = turn * world_size + place
        found.append(packs[index] if index < len(packs) else np.zeros(0, dtype=np.int64))
    return found


def _answer_tokens(rows: Sequence[TokenizedRow]) -> int:
    return sum(len(row.input_ids) - row.prompt_length for row in rows)
