"""The report's section on rows that were forgotten: where they were, and which models have learnt them."""

from __future__ import annotations

from typing import Any

from pipelines.lineage import said_by_day, walk
from pipelines.results import StreamView


def erased_rows(view: StreamView) -> dict[str, Any] | None:
    """Return what was taken out of a stream's files, and its models that were trained on some of it.

    None for a stream of which nothing was forgotten.
    """
    touched = [result for result in view.stages if result.record.forgotten]
    if not touched:
        return None
    records = [result.record for result in view.stages]
    models = []
    for result in view.of("train"):
        if rows := walk(records, result.fingerprint).forgotten():
            own = any(erasure.learnt for erasure in result.record.forgotten)
            how = "itself" if own else "through the model it started from"
            models.append({"task": result.task, "rows": said_by_day(rows), "how": how})
    files = [
        {"task": result.task, "stage": result.stage, "rows": erasure.rows, "day": erasure.at[:10]}
        for result in touched
        for erasure in result.record.forgotten
        if erasure.rows
    ]
    return {"models": models, "files": files}
