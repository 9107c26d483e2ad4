"""The rows of a training out of its artifacts.

Rows are read from Parquet once per worker, and a row is joined to its encoded target, if it has one, by
task and row id. What a worker does with them is `seekr.training.microbatches`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.artifact import Artifact
from pipelines.rowsets import REPLAY, TRAIN, kind_folder, load_rows_table, load_table, rows_of
from pipelines.teach import TARGETS
from seekr.errors import StoreError
from seekr.prompts import TokenizedRow
from seekr.training.microbatches import TrainingRows


def load_training_rows(
    data: Mapping[str, Artifact],
    replay: Mapping[str, Artifact],
    targets: Mapping[str, Artifact],
    task_targets: Mapping[str, Artifact],
) -> TrainingRows:
    """Read the artifacts, each by task name.

    Raises:
        StoreError: a row has no target although its task has targets.
    """
    task, task_ids = _load(data, kind_folder(TRAIN))
    replayed, replay_ids = _load(replay, REPLAY)
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
