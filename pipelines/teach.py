"""Teach: the model that has just learnt a task writes what its students will need.

Per row one binary value: the likeliest tokens at answer positions, and the largest entries of the
attention rows of the selected heads at the sampled query positions. The rows are a task's replay set,
or, for a method that asks the previous model, all rows of the task that comes next. Of a model with
shared attention it is what rows give to its blocks (`reflect`). Rows and targets are joined by row id
later, never by position.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipelines.config import PoolConfig, StreamConfig
from pipelines.hosts import model_pool
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, rows_in_blocks
from pipelines.reflect import record_weights
from pipelines.rowsets import (
    REPLAY,
    TRAIN,
    kind_folder,
    load_rows_table,
    rows_of,
    write_rows,
    write_table,
)
from pipelines.select import read_selection
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.collation import collate
from seekr.sampling import query_positions
from seekr.teacher import Keep, teach_batch
from seekr.teacher_store import encode_target

TARGETS = "targets"
TARGET_SCHEMA = pa.schema([("row_id", pa.string()), ("target", pa.large_binary())])


def teach(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes targets/."""
    if "weights" in workspace.config:
        return record_weights(workspace, config, report, TARGETS, TARGET_SCHEMA)
    if (data := workspace.inputs.get("data")) is not None:
        table = load_rows_table(data, kind_folder(TRAIN))
    else:
        table = load_rows_table(workspace.inputs["replay"], REPLAY)
    report.post(force=True, rows_done=0, rows=table.num_rows)
    if table.num_rows == 0:  # all were forgotten
        write_table(TARGET_SCHEMA.empty_table(), workspace, TARGETS)
        return StageOutcome(rows=0)
    heads = workspace.inputs.get("heads")
    arguments = {
        "teacher": ModelSource.of(workspace, config, "teacher"),
        "heads_by_layer": None if heads is None else read_selection(heads).by_layer(),
        "settings": dict(workspace.config),
        "report": report,
    }
    with model_pool("teach", _Teacher, arguments, workspace.key, config.teach, config) as through:
        write_rows(through(rows_in_blocks(table, config.teach)), workspace, TARGETS)
    return StageOutcome(
        rows=table.num_rows, stats={}, seeds={"query_positions": workspace.config["seed"]}
    )


class _Teacher:
    """An actor with one model."""

    def __init__(
        self,
        *,
        teacher: ModelSource,
        heads_by_layer: dict[int, tuple[int, ...]] | None,
        settings: dict[str, Any],
        report: Reporter,
        pool: PoolConfig,
    ) -> None:
        self._device = prepare_device(pool)
        attention = "seekr" if heads_by_layer else "sdpa"
        self._model = teacher.load(attention).to(self._device)  # pyright: ignore
        self._heads, self._settings = heads_by_layer, settings
        self._report = report.named(f"teacher-{id(self)}")

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, settings = rows_of(table), self._settings
        positions = [
            query_positions(
                settings["seed"], row.row_id, len(row.input_ids), settings.get("query_budget")
            )
            for row in rows
        ]
        targets = teach_batch(
            self._model,
            collate(rows, pad_id=0).to(self._device),
            self._heads,
            positions,
            logits=settings["logits"],
            shift=settings["logit_shift"],
            keep=Keep(logits=settings.get("logits_kept"), attention=settings.get("attention_kept")),
        )
        self._report.add_rows(len(rows))
        encoded = [encode_target(target, settings["bits"]) for target in targets]
        return pa.table(
            {"row_id": [row.row_id for row in rows], "target": encoded}, schema=TARGET_SCHEMA
        )
