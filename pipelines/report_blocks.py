"""The report's section on shared attention: whether rows find their own task's block, and what one costs."""

from __future__ import annotations

from typing import Any

from pipelines.readable import percent, size
from pipelines.results import StreamView
from seekr.addition_files import TENSORS


def shared_attention(view: StreamView) -> dict[str, Any] | None:
    """Return per task the share of its test rows that give most to its own block, after each task.

    None for models without blocks.
    """
    found = view.selection_accuracy()
    if not found:
        return None
    learnt = [task for task in view.tasks if any(after == task for after, _ in found)]
    grown = _grown(view)
    rows = [
        {
            "task": task,
            "cells": [
                percent(found[after, task]) if (after, task) in found else "" for after in learnt
            ],
            "added": size(grown[task]) if task in grown else "n/a",
        }
        for task in learnt
    ]
    last = [found[learnt[-1], task] for task in learnt if (learnt[-1], task) in found]
    return {"models": learnt, "rows": rows, "mean": percent(sum(last) / len(last))}


def _grown(view: StreamView) -> dict[str, int]:
    """Return the bytes that each task has added to what lies beside the model."""
    sizes = {
        result.task: sum(o.size for o in result.record.outputs if o.path.endswith(TENSORS))
        for result in view.of("train")
    }
    found: dict[str, int] = {}
    before = 0
    for task, whole in sizes.items():
        found[task], before = whole - before, whole
    return found
