"""The report's sections on how far a figure can be trusted: what was measured, and paired tests.

Streams are compared row by row where their final models were tested on the same rows; a stream that is
not finished, or has other test data, is left out by name instead of being compared anyhow.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.labels import BASE
from pipelines.readable import metric_name, percent, points
from pipelines.results import StreamView
from seekr.metrics import AccuracyMatrix
from seekr.statistics import Paired, Scores, holm, op_error, paired

_SURE = 0.05


def op_hint(view: StreamView) -> str:
    """Return what stands below OP: what it is, and its standard error over test rows."""
    error = op_error(view.final_scores())
    words = "mean score over the tasks learnt, OP"
    return words if error is None else f"{words}; standard error {percent(error)} over test rows"


def measured_tasks(view: StreamView) -> list[dict[str, str]]:
    """Return per task what its score is a score of: metric, rows, decoding, digests."""
    options = {task["name"]: task for task in view.config.get("tasks", ())}
    defaults = view.config.get("data", {})
    digests: dict[tuple[str, str], str] = {
        (task, name): digest for task, name, digest in view.sources()
    }
    rows = {result.task: result.record.stats for result in view.of("ingest")}
    metrics = view.metrics_of_tasks()
    found: list[dict[str, str]] = []
    for task in view.tasks:
        stats = rows.get(task, {})
        own = options.get(task, {}).get("max_answer_length")
        limit = own or defaults.get("max_answer_length", "n/a")
        found.append(
            {
                "task": task,
                "metric": metric_name(metrics[task]) if task in metrics else "n/a",
                "train": str(stats.get("train_rows", "n/a")),
                "test": str(stats.get("test_rows", "n/a")),
                "seen": str(stats.get("test_rows_in_train", "n/a")),
                "decoding": f"greedy, at most {limit} tokens",
                "train_digest": digests.get((task, "train"), "n/a")[:12],
                "test_digest": digests.get((task, "test"), "n/a")[:12],
            }
        )
    return found


def general_ability(view: StreamView) -> dict[str, Any] | None:
    """Return what the harness measured per model, and the change since the base model."""
    found = view.general()
    if not found:
        return None
    models = [BASE] * (BASE in found) + [name for name in found if name != BASE]
    rows = []
    for task in dict.fromkeys(task for cells in found.values() for task in cells):
        cells = [found[model].get(task) for model in models]
        known = [cell for cell in cells if cell is not None]
        first, last = cells[0], cells[-1]
        change = ""
        if len(models) > 1 and first is not None and last is not None:
            change = f"{last['value'] - first['value']:+.3f}"
        rows.append(
            {
                "task": task,
                "metric": known[0]["metric"],
                "cells": ["n/a" if cell is None else _with_error(cell) for cell in cells],
                "change": change,
            }
        )
    titles = ["base model" if model == BASE else f"after {model}" for model in models]
    return {"models": titles, "rows": rows}


def _with_error(cell: Mapping[str, Any]) -> str:
    error = cell["error"]
    return f"{cell['value']:.3f}" + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.3f}")


def pairs(views: Sequence[StreamView], matrices: Sequence[AccuracyMatrix]) -> dict[str, Any] | None:
    """Return every two finished streams against each other; None if there are no such two.

    The p-values are adjusted for being several (Holm).
    """
    scores: list[tuple[str, Scores]] = []
    left_out: list[str] = []
    for view, matrix in zip(views, matrices, strict=True):
        done = view.learnt(matrix) == len(view.tasks) - 1
        own = view.final_scores() if done else {}
        if own:
            scores.append((view.name, own))
        else:
            left_out.append(f"{view.name} is not finished")
    found: list[tuple[str, str, Paired]] = []
    for (first, ours), (second, theirs) in itertools.combinations(scores, 2):
        same = ours.keys() == theirs.keys() and all(
            ours[task].keys() == theirs[task].keys() for task in ours
        )
        result = paired(ours, theirs) if same else None
        if result is None:
            left_out.append(f"{first} and {second} were not tested on the same rows")
        else:
            found.append((first, second, result))
    if not found and not left_out:
        return None
    adjusted = holm([result.p_value for _, _, result in found])
    rows = [
        {
            "first": first,
            "second": second,
            "difference": points(result.difference),
            "error": percent(result.standard_error),
            "p": f"{p:.4f}" if p >= 0.0001 else "< 0.0001",
            "sure": p < _SURE,
            "rows": str(result.rows),
        }
        for (first, second, result), p in zip(found, adjusted, strict=True)
    ]
    return {"rows": rows, "left_out": left_out}


def same_data(views: Sequence[StreamView]) -> bool:
    """Return whether all streams read the same files for testing, and say they are one variant."""
    tests = {
        tuple(sorted((task, digest) for task, name, digest in view.sources() if name == "test"))
        for view in views
    }
    return len(tests) == 1 and len({view.config.get("benchmark") for view in views}) == 1
