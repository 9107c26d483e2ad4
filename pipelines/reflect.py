"""What rows give to the blocks of tasks once their task is learnt: the targets of attentive reflection.

Weights depend on a row's prompt, the query network and the keys alone, so no row goes through the model:
its embedding is enough. A task's mean is over all its training rows, so it does not depend on which
rows are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.config import PoolConfig, StreamConfig
from pipelines.hosts import model_pool
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, ray_tables, rows_in_blocks
from pipelines.rowsets import REPLAY, TRAIN, kind_folder, load_rows_table, rows_of, write_table
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.collation import collate
from seekr.shared_attention import weights_of
from seekr.teacher import TeacherTarget
from seekr.teacher_store import encode_target

WEIGHTS_SCHEMA = pa.schema([("row_id", pa.string()), ("weights", pa.list_(pa.float32()))])


def record_weights(
    workspace: Workspace, config: StreamConfig, report: Reporter, folder: str, schema: pa.Schema
) -> StageOutcome:
    """Write a target per kept row: its own weights, or the mean of its task's rows.

    Returns:
        An outcome with `own`: the share of rows that give most to the block of their own task.
    """
    kept = load_rows_table(workspace.inputs["replay"], REPLAY)
    asked = kept
    if workspace.config["weights"] == "mean":
        asked = load_rows_table(workspace.inputs["data"], kind_folder(TRAIN))
    report.post(force=True, rows_done=0, rows=asked.num_rows)
    if kept.num_rows == 0:  # all were forgotten
        write_table(schema.empty_table(), workspace, folder)
        return StageOutcome(rows=0)
    arguments = {"model": ModelSource.of(workspace, config, "teacher"), "report": report}
    with model_pool("teach", _Recorder, arguments, workspace.key, config.teach, config) as through:
        found = pa.concat_tables(ray_tables(through(rows_in_blocks(asked, config.teach))))
    by_row = dict(zip(found["row_id"].to_pylist(), found["weights"].to_pylist(), strict=True))
    weights_NS = np.asarray([by_row[row_id] for row_id in sorted(by_row)], dtype=np.float64)
    mean = weights_NS.mean(axis=0)
    records: list[dict[str, Any]] = []
    for row in rows_of(kept):
        own = mean if workspace.config["weights"] == "mean" else by_row[row.row_id]
        target = _target(len(row.input_ids), torch.as_tensor(own, dtype=torch.float32))
        records.append({"row_id": row.row_id, "target": encode_target(target)})
    write_table(pa.Table.from_pylist(records, schema=schema), workspace, folder)
    newest = weights_NS.shape[1] - 1
    share = float(np.mean(weights_NS.argmax(axis=1) == newest))
    return StageOutcome(rows=len(records), stats={"own": share})


def _target(length: int, weights_S: torch.Tensor) -> TeacherTarget:
    return TeacherTarget(
        length=length,
        shift=True,
        logits=None,
        heads_by_layer={},
        query_positions=np.zeros(0, dtype=np.int64),
        attention=None,
        weights=weights_S,
    )


class _Recorder:
    """An actor with one model."""

    def __init__(self, *, model: ModelSource, report: Reporter, pool: PoolConfig) -> None:
        self._device = prepare_device(pool)
        self._model: Any = model.load("sdpa").to(self._device)  # pyright: ignore
        self._report = report.named(f"recorder-{id(self)}")

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = rows_of(table)
        weights_BS = weights_of(self._model, collate(rows, pad_id=0).to(self._device))
        self._report.add_rows(len(rows))
        columns = {"row_id": [row.row_id for row in rows], "weights": weights_BS.cpu().tolist()}
        return pa.table(columns, schema=WEIGHTS_SCHEMA)
