"""Results and states as tables for a terminal, and as plain values for `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipelines.doctor import Check
from pipelines.knowledge import knowledge_figures
from pipelines.report_knowledge import FIGURES, figure_cell
from pipelines.results import StreamView
from pipelines.stream import StageStatus

_COLOURS = {
    "ran": "green",
    "reused": "cyan",
    "running": "yellow",
    "failed": "red",
    "interrupted": "yellow",
    "missing": "magenta",
}


def matrix_table(view: StreamView) -> Group:
    """Return the matrix R: a row per task learnt, a column per task tested, and OP and BWT below."""
    matrix = view.matrix()
    table = Table(
        title=f"{view.name}: accuracy after each task ({view.method})", title_justify="left"
    )
    table.add_column("after")
    for name in view.tasks:
        table.add_column(name, justify="right")
    for name, row in zip(view.tasks, matrix.rows(), strict=False):
        if any(value is not None for value in row):
            table.add_row(name, *(_percent(value) for value in row))
    found = summary(view)
    text = f"OP {_percent(found['op'])}   BWT {_percent(found['bwt'])} (T-1)"
    text += f"   {_percent(found['bwt_t'])} (T)"
    if found["fwt"] is not None:
        text += f"   FWT {_percent(found['fwt'])}"
    return Group(table, Text(text, "bold"))


def comparison_table(views: Sequence[StreamView]) -> Table:
    """Return streams side by side: what each method keeps, gains and costs."""
    table = Table(title="comparison, in per cent", title_justify="left")
    table.add_column("stream")
    table.add_column("method")
    for column in ("OP", "BWT (T-1)", "BWT (T)", "replay store", "seconds"):
        table.add_column(column, justify="right")
    for view in views:
        found = summary(view)
        table.add_row(
            view.name,
            view.method,
            *(_percent(found[key]) for key in ("op", "bwt", "bwt_t")),
            f"{found['replay_bytes'] / 1024:.0f} KiB",
            f"{view.seconds():.0f}",
        )
    return table


def knowledge_table(views: Sequence[StreamView]) -> Table | None:
    """Return what streams have learnt and kept of facts; None if none of them was asked."""
    found = [(view, figures) for view in views if (figures := knowledge_figures(view)) is not None]
    if not found:
        return None
    table = Table(title="facts, in per cent of answer tokens", title_justify="left")
    for column in ("stream", "method"):
        table.add_column(column)
    for column in FIGURES.values():
        table.add_column(column, justify="right")
    for view, figures in found:
        cells = (figure_cell(name, figures[name]) for name in FIGURES)
        table.add_row(view.name, view.method, *cells)
    return table


def summary(view: StreamView) -> dict[str, Any]:
    """Return the figures of a stream: R, OP, BWT with both denominators, FWT, forgetting."""
    matrix = view.matrix()
    return {
        "stream": view.name,
        "method": view.method,
        "tasks": list(view.tasks),
        "matrix": [list(row) for row in matrix.rows()],
        "op": matrix.op(),
        "bwt": matrix.bwt(),
        "bwt_t": matrix.bwt(denominator="trace"),
        "fwt": matrix.fwt(),
        "forgetting": matrix.forgetting(),
        "replay_bytes": view.replay_bytes(),
        "borrowed_bytes": view.borrowed_bytes(),
        "knowledge": knowledge_figures(view),
    }


def plan_table(statuses: Sequence[StageStatus]) -> Group:
    """Return which stages would run, and how many."""
    table = Table(title="plan", title_justify="left")
    for column in ("stage", "task", "fingerprint", "would"):
        table.add_column(column)
    for item in statuses:
        word = _would(item)
        style = "cyan" if word == "be reused" else "magenta"
        table.add_row(item.name, item.task, item.fingerprint[:12], Text(word, style))
    reused = sum(_would(item) == "be reused" for item in statuses)
    return Group(table, Text(f"{len(statuses) - reused} to run, {reused} reused", "bold"))


def status_table(statuses: Sequence[StageStatus]) -> Table:
    """Return the state of every stage."""
    table = Table(title="status", title_justify="left")
    for column in ("stage", "task", "fingerprint", "state"):
        table.add_column(column)
    for column in ("seconds", "rows", "peak memory"):
        table.add_column(column, justify="right")
    table.add_column("")
    for item in statuses:
        memory = item.peak_memory_bytes
        table.add_row(
            item.name,
            item.task,
            item.fingerprint[:12],
            Text(item.state, _COLOURS[item.state]),
            "" if item.seconds is None else f"{item.seconds:.1f}",
            "" if item.rows is None else str(item.rows),
            "" if memory is None else f"{memory / 2**20:.0f} MiB",
            Text(item.error or "", "red"),
        )
    return table


def doctor_table(checks: Sequence[Check]) -> Table:
    """Return the checks, failed ones in red."""
    table = Table(title="doctor", title_justify="left")
    for column in ("check", "", "found"):
        table.add_column(column)
    for check in checks:
        mark = Text("ok", "green") if check.ok else Text("no", "red")
        table.add_row(check.name, mark, Text(check.text))
    return table


def _would(item: StageStatus) -> str:
    known = {"ran": "be reused", "reused": "be reused", "running": "wait: it is running"}
    known |= {"failed": "run again", "interrupted": "go on"}
    return known.get(item.state, "run")


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}"
