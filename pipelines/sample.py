"""Sample: the replay set of a task, the rows with the smallest hash of (seed, row id).

The count is exact and the rows are the same for any block layout, cluster size or file order, because
a row's chance depends on nothing but its content and the seed.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import StreamConfig
from pipelines.monitor import Reporter
from pipelines.rowsets import REPLAY, TRAIN, read_rows, write_rows
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.sampling import priority, replay_size


def sample(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes replay/."""
    settings, data = workspace.config, workspace.inputs["data"]
    size = replay_size(data.record.stats["train_rows"], settings["ratio"], settings["rows"])
    seed = settings["seed"]

    def prioritise(table: pa.Table) -> pa.Table:
        # Zero-padded text: sorts like the number, and 64 unsigned bits survive every backend.
        keys = [f"{priority(seed, row_id):020d}" for row_id in table["row_id"].to_pylist()]
        return pa.table({"priority": pa.array(keys, pa.string()), "row_id": table["row_id"]})

    ranked = read_rows(data, TRAIN, ["row_id"]).map_batches(prioritise, batch_format="pyarrow")
    drawn = ranked.sort(["priority", "row_id"]).limit(size).take_all()
    kept = pa.array([row["row_id"] for row in drawn])
    rows = read_rows(data, TRAIN).map_batches(
        lambda table: table.filter(pc.is_in(table["row_id"], value_set=kept)),
        batch_format="pyarrow",
    )
    write_rows(rows.sort("row_id"), workspace, REPLAY)
    report.post(force=True, rows_done=size)
    return StageOutcome(rows=size, stats={"drawn_from": data.record.stats["train_rows"]})
