"""Sample: the replay set of a task, the rows with the smallest hash of (seed, row id).

The count is exact and the rows are the same for any block layout, cluster size or file order, because
a row's chance depends on nothing but its content and the seed. Nothing is shuffled for it.
"""

from __future__ import annotations

import pyarrow as pa
from pyarrow.dataset import field as column

from pipelines.config import StreamConfig
from pipelines.monitor import Reporter
from pipelines.rowsets import REPLAY, TRAIN, kind_folder, read_rows, smallest, write_rows
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.sampling import replay_size


def sample(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes replay/."""
    settings, data = workspace.config, workspace.inputs["data"]
    num_rows = data.record.stats["train_rows"]
    size = replay_size(num_rows, settings["ratio"], settings["rows"])
    ids = read_rows(data, kind_folder(TRAIN), ["row_id"])
    kept = smallest(ids, None, size, settings["seed"])

    def drawn(table: pa.Table) -> pa.Table:
        return table.filter(column("row_id").isin(kept))

    rows = read_rows(data, kind_folder(TRAIN))
    write_rows(rows.map_batches(drawn, batch_format="pyarrow"), workspace, REPLAY)
    report.post(force=True, rows_done=size)
    return StageOutcome(
        rows=size, stats={"drawn_from": num_rows}, seeds={"sample": settings["seed"]}
    )
