"""Select: from the per-row statistics of all tasks so far to the heads that are distilled.

Nothing runs a model here: definitions, combination rule and budgets are applied to stored sums, so
changing one of them costs seconds and leaves the scores as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.artifact import Artifact
from pipelines.config import StreamConfig
from pipelines.monitor import Reporter
from pipelines.rowsets import load_table
from pipelines.score import SCORES, STATISTICS
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.errors import DataError
from seekr.importance import HeadStatistics, combine, forgettability, task_sensitivity
from seekr.selection import HeadSelection, random_heads, select_heads

HEADS = "heads.json"


def select(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes heads.json."""
    settings = workspace.config
    per_task: list[tuple[np.ndarray, np.ndarray]] = []
    for name in sorted(workspace.inputs):
        stats = _statistics(workspace.inputs[name])
        if not stats:  # all rows of the task were forgotten
            continue
        pair = (
            task_sensitivity(stats, settings["definition"]),
            forgettability(stats, settings["definition"]),
        )
        per_task.append(pair)
    if not per_task:
        raise DataError(
            f"select/{task}: no task has a replay row left, all were forgotten, so there is nothing to "
            "choose heads by; raise replay.ratio or replay.rows, or use a method without heads"
        )
    sensitivity_LH = np.sum([pair[0] for pair in per_task], axis=0)
    forgettability_LH = np.sum([pair[1] for pair in per_task], axis=0)
    importance_LH = combine(per_task, settings["combine"])
    ranked_by = {
        "importance": importance_LH,
        "sensitivity": sensitivity_LH,
        "forgettability": forgettability_LH,
    }
    budgets = (settings["layer_budget"], settings["head_budget"])
    if settings["heads"] == "random":
        num_layers, num_heads = importance_LH.shape
        selection = random_heads(settings["seed"], num_layers, num_heads, *budgets)
    else:
        selection = select_heads(ranked_by[settings["heads"]], *budgets)
    content: dict[str, Any] = selection.to_dict() | {
        "layers": sorted(selection.by_layer()),
        "importance": importance_LH.tolist(),
        "sensitivity": sensitivity_LH.tolist(),
        "forgettability": forgettability_LH.tolist(),
        "settings": dict(settings),
    }
    workspace.write_json(HEADS, content)
    report.post(force=True, rows_done=len(selection.heads))
    return StageOutcome(rows=len(selection.heads), stats={"layers": len(selection.by_layer())})


def read_selection(artifact: Artifact) -> HeadSelection:
    """Return the heads that a select stage chose."""
    return HeadSelection.from_dict(artifact.read_json(HEADS))


def _statistics(artifact: Artifact) -> list[HeadStatistics]:
    table: pa.Table = load_table(artifact, SCORES)
    settings = artifact.record.payload["config"]
    shape = (settings["num_layers"], settings["num_heads"])
    return [
        HeadStatistics(
            row_id=row["row_id"],
            length=row["length"],
            num_queries=row["num_queries"],
            **{name: np.array(row[name], dtype=np.float64).reshape(shape) for name in STATISTICS},
        )
        for row in table.to_pylist()
    ]
