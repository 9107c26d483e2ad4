"""The rows of a training out of its artifacts.

Rows are read from Parquet once per worker, and a row is joined to its encoded target, if it has one, by
task and row id. What a worker does with them is `seekr.training.microbatches`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.artifact import Artifact
from pipelines.rowsets import REPLAY, TRAIN, kind_folder, load_rows_table, load_table, rows_of
from pipelines.teach import TARGETS
from pipelines.weights import load_weights
from seekr.errors import StoreError
from seekr.prompts import TokenizedRow
from seekr.token_weights import relative_weights
from seekr.training.microbatches import TrainingRows

PerToken = Literal["weights", "reference_nll"]


def load_training_rows(
    data: Mapping[str, Artifact],
    replay: Mapping[str, Artifact],
    targets: Mapping[str, Artifact],
    task_targets: Mapping[str, Artifact],
    per_token: Mapping[str, Artifact],
    kind: PerToken,
) -> TrainingRows:
    """Read the artifacts, each by task name.

    Args:
        per_token: Numbers per token of rows, possibly none; kind: what they are.

    Raises:
        StoreError: a row has no target, or no weights, although others have.
    """
    task, task_ids = _load(data, kind_folder(TRAIN))
    replayed, replay_ids = _load(replay, REPLAY)
    if per_token:
        numbers = load_weights(per_token)
        task = [_with(row, i, numbers, kind) for row, i in zip(task, task_ids, strict=True)]
        replayed = [
            _with(row, i, numbers, kind) for row, i in zip(replayed, replay_ids, strict=True)
        ]
    return TrainingRows(
        task=task,
        task_ids=task_ids,
        replay=replayed,
        replay_ids=replay_ids,
        targets=_join(replay_ids, targets) if targets else None,
        task_targets=_join(task_ids, task_targets) if task_targets else None,
    )


def _load(artifacts: Mapping[str, Artifact], folder: str) -> tuple[list[TokenizedRow], list[str]]:
    rows: list[TokenizedRow] = []
    ids: list[str] = []
    for task, artifact in sorted(artifacts.items()):
        own = rows_of(load_rows_table(artifact, folder))
        rows += own
        ids += [f"{task}/{row.row_id}" for row in own]
    return rows, ids


def _with(
    row: TokenizedRow, row_id: str, numbers: Mapping[str, NDArray[np.float32]], kind: PerToken
) -> TokenizedRow:
    """Return a row with its numbers, weights so that its answer's mean is 1."""
    own = numbers.get(row_id)
    if own is None:
        raise StoreError(
            f"row {row_id} has no {kind}; every row needs them: remove the weights stage's folder "
            "and run again"
        )
    if kind == "weights":
        own = relative_weights(own, row.prompt_length)
    return replace(row, **{kind: own})


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
            f"{len(missing)} of {len(ids)} rows have no teacher target, the first is "
            f"{missing[0]}; every one needs one: remove the teach stage's folder and run again"
        )
    return [found[row_id] for row_id in ids]
