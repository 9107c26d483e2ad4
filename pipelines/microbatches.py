"""The rows of a training in a worker's memory, and its share of a step cut into micro-batches.

Rows are read from Parquet once per worker. A replay row arrives with its encoded target, joined by row
id here; it is decoded when its batch is formed. All workers make the same number of forward passes:
where a worker has no row left, it repeats one that counts for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.artifact import Artifact
from pipelines.rowsets import (
    REPLAY,
    TRAIN,
    kind_folder,
    load_rows_table,
    load_table,
    rows_of,
)
from pipelines.teach import TARGETS
from seekr.batch_targets import BatchTargets, collate_targets
from seekr.batches import StepRows, num_micro_batches, share
from seekr.errors import StoreError
from seekr.prompts import Batch, TokenizedRow, collate
from seekr.teacher_store import decode_target


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Rows of one forward pass. `targets` are encoded, one per row, or None. `counts` is False for
    a pass that only keeps the workers in step."""

    rows: Sequence[TokenizedRow]
    targets: Sequence[bytes] | None
    replay: bool
    counts: bool

    def tensors(self, pad_id: int, device: torch.device) -> tuple[Batch, BatchTargets | None]:
        """Pad the rows and place their targets."""
        batch = collate(self.rows, pad_id)
        if self.targets is None:
            return batch.to(device), None
        targets = collate_targets([decode_target(target) for target in self.targets], batch)
        return batch.to(device), targets.to(device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingRows:
    """Task rows and replay rows; ids are `task/row_id`, so two tasks may share a row."""

    task: Sequence[TokenizedRow]
    task_ids: Sequence[str]
    replay: Sequence[TokenizedRow]
    replay_ids: Sequence[str]
    targets: Sequence[bytes] | None

    @classmethod
    def load(
        cls,
        data: Mapping[str, Artifact],
        replay: Mapping[str, Artifact],
        targets: Mapping[str, Artifact],
    ) -> TrainingRows:
        """Read the artifacts, each by task name.

        Raises:
            StoreError: a replay row has no target although its task has targets.
        """
        task, task_ids = _load(data, kind_folder(TRAIN))
        replayed, replay_ids = _load(replay, REPLAY)
        return cls(
            task=task,
            task_ids=task_ids,
            replay=replayed,
            replay_ids=replay_ids,
            targets=_join(replay_ids, targets) if targets else None,
        )

    def counts(self, rows: StepRows) -> dict[str, int]:
        """Return what loss terms are divided by, over all workers, and the tokens processed."""
        task = [self.task[index] for index in rows.task]
        replay = [self.replay[index] for index in rows.replay]
        return {
            "task_tokens": max(1, _answer_tokens(task)),
            "replay_tokens": max(1, _answer_tokens(replay)),
            "replay_rows": max(1, len(replay)),
            "tokens": sum(len(row.input_ids) for row in (*task, *replay)),
        }

    def micro_batches(
        self, rows: StepRows, rank: int, world_size: int, size: int
    ) -> list[MicroBatch]:
        """Return one worker's passes of a step: its task rows, then its replay rows."""
        return [
            *self._cut(rows.task, False, rank, world_size, size),
            *self._cut(rows.replay, True, rank, world_size, size),
        ]

    def _cut(
        self, rows: NDArray[np.int64], replay: bool, rank: int, world_size: int, size: int
    ) -> list[MicroBatch]:
        own = share(rows, rank, world_size)
        source = self.replay if replay else self.task
        found: list[MicroBatch] = []
        for index in range(num_micro_batches(len(rows), world_size, size)):
            chosen = own[index * size : (index + 1) * size]
            counts = len(chosen) > 0
            chosen = chosen if counts else rows[:1]
            targets = [self.targets[i] for i in chosen] if replay and self.targets else None
            found.append(
                MicroBatch(
                    rows=[source[i] for i in chosen],
                    targets=targets,
                    replay=replay,
                    counts=counts,
                )
            )
        return found


def _load(artifacts: Mapping[str, Artifact], folder: str) -> tuple[list[TokenizedRow], list[str]]:
    rows: list[TokenizedRow] = []
    ids: list[str] = []
    for task, artifact in sorted(artifacts.items()):
        own = rows_of(load_rows_table(artifact, folder))
        rows += own
        ids += [f"{task}/{row.row_id}" for row in own]
    return rows, ids


def _join(ids: Sequence[str], targets: Mapping[str, Artifact]) -> list[bytes]:
    found: dict[str, bytes] = {}
    for task, artifact in targets.items():
        table = load_table(artifact, TARGETS)
        for row_id, target in zip(
            table["row_id"].to_pylist(), table["target"].to_pylist(), strict=True
        ):
            found[f"{task}/{row_id}"] = target
    missing = [row_id for row_id in ids if row_id not in found]
    if missing:
        raise StoreError(
            f"{len(missing)} of {len(ids)} replay rows have no teacher target, the first is "
            f"{missing[0]}; every one needs one: remove the teach stage's folder and run again"
        )
    return [found[row_id] for row_id in ids]


def _answer_tokens(rows: Sequence[TokenizedRow]) -> int:
    return sum(len(row.input_ids) - row.prompt_length for row in rows)
