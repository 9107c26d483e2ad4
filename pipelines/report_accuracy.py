"""The report's sections on what the model knows: tiles, the matrix R, forgetting curves, the
comparison.

Each is a function from a `StreamView` and its `AccuracyMatrix` to plain values and figures; the
template lays out and escapes. A number that was not measured is written "n/a" with the reason,
never as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from pipelines.figures import Series, line_chart
from pipelines.readable import MINUS, duration, percent, points, size
from pipelines.report_statistics import op_hint, pairs, same_data
from pipelines.results import StreamView
from pipelines.svg import Frame
from seekr.metrics import AccuracyMatrix

MID, STRONG = 0.55, 0.78  # from here on text on the heat colour is dark / light on a light page
DASH = "\N{EN DASH}"
Cell = dict[str, Any]


def tiles(view: StreamView, matrix: AccuracyMatrix) -> list[dict[str, str]]:
    """The numbers a reader wants first; what cannot be measured yet says why."""
    last = view.learnt(matrix)
    op = None if last is None else matrix.op(last)
    several = last is not None and last > 0
    paper = matrix.bwt(last, "paper") if several else None
    trace = matrix.bwt(last, "trace") if several else None
    forward = matrix.fwt(last) if several else None
    missing = "not measured by this method" if several else "needs two tasks"
    replay = view.replay_bytes()
    reused = any(result.state == "reused" for result in view.stages)
    now = duration(view.seconds(ran_only=True))
    over, base = (
        f"over T{MINUS}1 earlier tasks, the paper's",
        "score before learning, over the base model",
    )
    return [
        _tile("Overall performance", percent(op), "%", op_hint(view)),
        _tile("Backward transfer", points(paper), "pt", over, paper, missing),
        _tile(
            "Backward transfer", points(trace), "pt", "over all T tasks, TRACE's", trace, missing
        ),
        _tile("Forward transfer", points(forward), "pt", base, forward, missing),
        _tile(
            "Compute time",
            duration(view.seconds()),
            "",
            f"{now} of it in this run" if reused else "all of it in this run",
        ),
        _tile("Replay store", size(replay) if replay else "none", "", "rows and their targets"),
    ]


def matrix_table(view: StreamView, matrix: AccuracyMatrix) -> dict[str, Any] | None:
    """R with its margins: OP and BWT per row at the right, the change of every task below."""
    last = view.learnt(matrix)
    if last is None:
        return None
    size = len(view.tasks)
    measured = [
        i for i in range(-1, size) if any(matrix.score(i, j) is not None for j in range(size))
    ]
    rows = [_matrix_row(view, matrix, i) for i in measured]
    change = [_change(matrix, last, j) for j in range(size)]
    seen = any(cell["alpha"] is not None for cell in change)
    dense = size > 7 or sum(map(len, view.tasks)) > 90
    return {"columns": view.tasks, "rows": rows, "change": change if seen else None, "dense": dense}


def forgetting_curves(view: StreamView, matrix: AccuracyMatrix) -> Markup | None:
    """Score of each task from the model that learnt it to the newest one; None below two models."""
    last = view.learnt(matrix)
    size = len(view.tasks)
    measured = [i for i in range(size) if matrix.score(i, i) is not None]
    if last is None or len(measured) < 2:
        return None
    series = []
    for j in range(last + 1):
        known = [
            (i + 1.0, score) for i in range(j, size) if (score := matrix.score(i, j)) is not None
        ]
        xs, ys = [x for x, _ in known], [y for _, y in known]
        series.append(Series(label=view.tasks[j], xs=xs, ys=ys, colour=j))
    scores = [score for s in series for score in s.ys]
    return line_chart(
        series,
        title=f"Score of every task of {view.name} after each later task",
        x_label="after learning",
        frame=Frame(width=1036, height=max(290, 16 * size + 60), left=88, right=190),
        y_range=_range(scores),
        percent=True,
        x_names=view.tasks,
        end_labels=True,
        markers=True,
    )


def comparison(views: Sequence[StreamView], matrices: Sequence[AccuracyMatrix]) -> dict[str, Any]:
    """A table of methods by figures, the best of each column marked, and OP as tasks arrive."""
    table = [_figures(view, matrix) for view, matrix in zip(views, matrices, strict=True)]
    formats = (percent, points, points, duration, lambda n: size(n) if n else "none")
    highest = (True, True, True, False, False)
    best = [_best([row[c] for row in table], highest[c]) for c in range(len(formats))]
    rows = []
    for view, matrix, figures in zip(views, matrices, table, strict=True):
        last = view.learnt(matrix)
        cells = [
            {
                "text": form(value) if value is not None else "n/a",
                "best": value is not None and value == top,
            }
            for value, form, top in zip(figures, formats, best, strict=True)
        ]
        learnt = f"{0 if last is None else last + 1} of {len(view.tasks)}"
        rows.append({"name": view.name, "method": view.method, "learnt": learnt, "cells": cells})
    same = len({view.tasks for view in views}) == 1
    lede = (
        "All streams learn the same tasks in the same order."
        if same
        else "The streams learn different tasks or orders: compare their figures with care."
    )
    if not same_data(views):
        lede += " Their test data or its variant differ, so the figures cannot be compared."
    tests = pairs(views, matrices)
    return {"rows": rows, "chart": _op_chart(views, matrices, same), "lede": lede, "pairs": tests}


def _op_chart(
    views: Sequence[StreamView], matrices: Sequence[AccuracyMatrix], same: bool
) -> Markup:
    series = []
    for colour, (view, matrix) in enumerate(zip(views, matrices, strict=True)):
        known = [(i + 1.0, op) for i in range(len(view.tasks)) if (op := matrix.op(i)) is not None]
        xs, ys = [x for x, _ in known], [y for _, y in known]
        series.append(Series(label=view.name, xs=xs, ys=ys, colour=colour))
    longest = max((view.tasks for view in views), key=len)
    names = longest if same else [str(i + 1) for i in range(len(longest))]
    return line_chart(
        series,
        title="Overall performance of every stream after each task",
        x_label="after learning",
        frame=Frame(width=1036, height=320, left=88, right=190),
        y_range=_range([y for s in series for y in s.ys]),
        percent=True,
        x_names=names,
        end_labels=True,
        markers=True,
    )


def _range(shares: Sequence[float]) -> tuple[float, float]:
    """Whole tenths around the data with a little air, inside [0, 1]."""
    low, high = min(shares, default=0.0), max(shares, default=1.0)
    bottom = max(0.0, math.floor(10 * low - 0.3) / 10)
    return bottom, max(bottom + 0.1, min(1.0, math.ceil(10 * high + 0.3) / 10))


def _figures(view: StreamView, matrix: AccuracyMatrix) -> list[float | None]:
    last = view.learnt(matrix)
    op = None if last is None else matrix.op(last)
    paper = matrix.bwt(last, "paper") if last else None
    trace = matrix.bwt(last, "trace") if last else None
    return [op, paper, trace, view.seconds(), float(view.replay_bytes())]


def _best(values: Sequence[float | None], highest: bool) -> float | None:
    """The best value where the streams differ; None when there is nothing to tell apart."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return None
    return max(known) if highest else min(known)


def _tile(
    label: str, value: str, unit: str, hint: str, signed: float | None = None, missing: str = ""
) -> dict[str, str]:
    if value == "n/a":
        return {"label": label, "value": value, "unit": "", "hint": missing or hint, "css": "soft"}
    css = "" if not signed else "good" if signed > 0 else "bad"
    return {"label": label, "value": value, "unit": unit, "hint": hint, "css": css}


def _matrix_row(view: StreamView, matrix: AccuracyMatrix, i: int) -> Cell:
    name = "base model" if i < 0 else f"after {view.tasks[i]}"
    cells = [_cell(matrix, i, j, f"{name}, tested on {task}") for j, task in enumerate(view.tasks)]
    op, bwt = (None, None) if i < 0 else (matrix.op(i), matrix.bwt(i))
    sums = [DASH if op is None else percent(op), DASH if bwt is None else points(bwt)]
    return {"name": name, "cells": cells, "sums": sums}


def _cell(matrix: AccuracyMatrix, i: int, j: int, where: str) -> Cell:
    score = matrix.score(i, j)
    if score is None:
        return {
            "text": "\N{MIDDLE DOT}",
            "css": "blank",
            "alpha": None,
            "hint": f"{where}: not measured",
        }
    hint = f"{where}: {percent(score)} %"
    if j > i:
        hint = f"{hint}, not learnt yet"
        return {"text": percent(score), "css": "heat future", "alpha": None, "hint": hint}
    css = (
        "heat"
        + (" strong" if score > STRONG else " mid" if score > MID else "")
        + (" diagonal" if i == j else "")
    )
    return {"text": percent(score), "css": css, "alpha": f"{0.06 + 0.94 * score:.3f}", "hint": hint}


def _change(matrix: AccuracyMatrix, last: int, j: int) -> Cell:
    now, then = matrix.score(last, j), matrix.score(j, j)
    if j >= last or now is None or then is None:
        return {"text": "", "css": "", "alpha": None, "hint": ""}
    css = "up" if now > then else "down" if now < then else ""
    alpha = f"{min(0.75, 0.08 + 3 * abs(now - then)):.2f}"
    hint = f"{percent(then)} % when learnt, {percent(now)} % now"
    return {"text": points(now - then), "css": css, "alpha": alpha, "hint": hint}
