"""Sample: the replay set of a task, and the only place that decides which rows are kept.

By default they are the rows with the smallest hash of (seed, row id). The count is exact and the rows
are the same for any block layout, cluster size or file order, because a row's chance depends on nothing
but its content and the seed. Nothing is shuffled for it. Or they are the rows that surprise a model
most, by the mean negative log-likelihood of their answer tokens; equal ones are ordered by row id.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from pyarrow.dataset import field as column

from pipelines.config import PoolConfig, StreamConfig
from pipelines.forgotten import ForgottenRows
from pipelines.hosts import model_pool
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, ray_tables, rows_in_blocks
from pipelines.rowsets import (
    REPLAY,
    ROW_SCHEMA,
    TRAIN,
    kind_folder,
    load_rows_table,
    read_rows,
    replayed,
    rows_of,
    smallest,
    write_rows,
    write_table,
)
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.sampling import most_surprising
from seekr.surprise import surprise

SURPRISE_SCHEMA = pa.schema([("row_id", pa.string()), ("surprise", pa.float64())])


def sample(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes replay/."""
    settings, data = workspace.config, workspace.inputs["data"]
    num_rows, size = data.record.stats["train_rows"], replayed(data, settings)
    # Data that came back with a backup does not come back into the replay memory.
    forgotten = ForgottenRows.load(workspace.store)
    surprising = settings.get("sampling") == "surprise"
    if surprising:
        kept = _most_surprising(workspace, config, size, report, forgotten)
    else:
        ids = read_rows(data, kind_folder(TRAIN), ["row_id"])
        if forgotten.dates:
            ids = ids.map_batches(forgotten.filtered, batch_format="pyarrow")
        kept = smallest(ids, None, size, settings["seed"])

    def drawn(table: pa.Table) -> pa.Table:
        return table.filter(column("row_id").isin(kept))

    size = len(kept)
    if size:
        rows = read_rows(data, kind_folder(TRAIN))
        write_rows(rows.map_batches(drawn, batch_format="pyarrow"), workspace, REPLAY)
    else:  # all were forgotten
        write_table(ROW_SCHEMA.empty_table(), workspace, REPLAY)
    report.post(force=True, rows_done=size)
    seeds = {} if surprising else {"sample": settings["seed"]}
    return StageOutcome(rows=size, stats={"drawn_from": num_rows}, seeds=seeds)


def _most_surprising(
    workspace: Workspace,
    config: StreamConfig,
    size: int,
    report: Reporter,
    forgotten: ForgottenRows,
) -> pa.Array:
    table = forgotten.filtered(load_rows_table(workspace.inputs["data"], kind_folder(TRAIN)))
    report.post(force=True, rows_done=0, rows=table.num_rows)
    arguments = {"model": ModelSource.of(workspace, config, "model"), "report": report}
    with model_pool("teach", _Surprised, arguments, workspace.key, config.teach, config) as through:
        found = pa.concat_tables(ray_tables(through(rows_in_blocks(table, config.teach))))
    by_id = dict(zip(found["row_id"].to_pylist(), found["surprise"].to_pylist(), strict=True))
    return pa.array(most_surprising(by_id, min(size, len(by_id))), pa.string())


class _Surprised:
    """An actor with one model."""

    def __init__(self, *, model: ModelSource, report: Reporter, pool: PoolConfig) -> None:
        self._device = prepare_device(pool)
        loaded: Any = model.load("sdpa")
        self._model = loaded.to(self._device)
        self._report = report.named(f"surprised-{id(self)}")

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = rows_of(table)
        values = surprise(self._model, rows)
        self._report.add_rows(len(rows))
        columns = {"row_id": [row.row_id for row in rows], "surprise": values}
        return pa.table(columns, schema=SURPRISE_SCHEMA)
