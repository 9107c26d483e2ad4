"""Score: per replay row, the sums of squares that head importance is made of.

An actor holds the models before and after the task and returns [L, H] numbers per row. Nothing of size
L x L leaves it, and both the paper's and the official definitions can be formed from what it returns.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipelines.config import PoolConfig, StreamConfig
from pipelines.hosts import model_pool
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, rows_in_blocks
from pipelines.rowsets import REPLAY, load_rows_table, rows_of, write_rows, write_table
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.collation import collate
from seekr.importance import HeadStatistics, score_batch
from seekr.sampling import query_positions
from seekr.teacher import place_positions

SCORES = "scores"
STATISTICS = ("grad_sq_causal", "grad_sq_square", "diff_sq", "diff_sq_queries")
SCORE_SCHEMA = pa.schema(
    [("row_id", pa.string()), ("length", pa.int32()), ("num_queries", pa.int32())]
    + [(name, pa.list_(pa.float64())) for name in STATISTICS]
)


def score(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes scores/."""
    table = load_rows_table(workspace.inputs["replay"], REPLAY)
    report.post(force=True, rows_done=0, rows=table.num_rows)
    if table.num_rows == 0:  # all were forgotten
        write_table(SCORE_SCHEMA.empty_table(), workspace, SCORES)
        return StageOutcome(rows=0)
    arguments = {
        "before": ModelSource.of(workspace, config, "before"),
        "after": ModelSource.of(workspace, config, "after"),
        "settings": dict(workspace.config),
        "report": report,
    }
    with model_pool("score", _Scorer, arguments, workspace.key, config.score, config) as through:
        write_rows(through(rows_in_blocks(table, config.score)), workspace, SCORES)
    return StageOutcome(rows=table.num_rows, seeds={"query_positions": workspace.config["seed"]})


class _Scorer:
    """An actor with two models."""

    def __init__(
        self,
        *,
        before: ModelSource,
        after: ModelSource,
        settings: dict[str, Any],
        report: Reporter,
        pool: PoolConfig,
    ) -> None:
        self._device = prepare_device(pool)
        self._before = before.load("seekr").to(self._device)  # pyright: ignore
        self._after = after.load("seekr").to(self._device)  # pyright: ignore
        self._settings, self._report = settings, report.named(f"scorer-{id(self)}")

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, settings = rows_of(table), self._settings
        batch = collate(rows, pad_id=0)
        positions = [
            query_positions(
                settings["seed"], row.row_id, len(row.input_ids), settings["query_budget"]
            )
            for row in rows
        ]
        positions_BQ = place_positions(positions, batch).to(self._device)
        stats = score_batch(self._before, self._after, batch.to(self._device), positions_BQ)
        self._report.add_rows(len(rows))
        return pa.Table.from_pylist([_record(row) for row in stats], schema=SCORE_SCHEMA)


def _record(stats: HeadStatistics) -> dict[str, Any]:
    sums = {name: getattr(stats, name).ravel().tolist() for name in STATISTICS}
    return {
        "row_id": stats.row_id,
        "length": stats.length,
        "num_queries": stats.num_queries,
    } | sums
