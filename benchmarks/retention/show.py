"""Raw rows as a table and a figure: means over seeds with standard errors, per order and over both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.table import Table

from seekr.statistics import mean_and_error

Rows = Sequence[dict[str, Any]]
_HEADINGS = (
    *(
        "configuration",
        "runs",
        "OP order 1",
        "OP order 2",
        "OP",
        "BWT (T-1)",
        "BWT (T)",
        "new task",
    ),
    *("seconds", "peak MiB", "kept KiB", "borrowed KiB"),
)
_ON_SCREEN = ("configuration", "OP order 1", "OP order 2", "OP", "BWT (T-1)", "new task", "seconds")
_COLOURS = {"1": "#2f6f9f", "2": "#c9772b"}


def table(rows: Rows) -> Table:
    """Return it for a terminal: what fits 100 columns; the rest is in the Markdown table."""
    shown = Table(title="retention, mean and standard error over runs", title_justify="left")
    places = [_HEADINGS.index(heading) for heading in _ON_SCREEN]
    for index in places:
        heading = _HEADINGS[index]
        shown.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for line in _lines(rows):
        shown.add_row(*(line[index] for index in places))
    return shown


def markdown(rows: Rows) -> str:
    """Return it as a Markdown table."""
    lines = [_HEADINGS, tuple("---" if i == 0 else "---:" for i in range(len(_HEADINGS)))]
    lines += [tuple(line) for line in _lines(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure(rows: Rows, path: Path) -> None:
    """Draw OP of every run, and mean and standard error per configuration and order."""
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    canvas, axes = pyplot.subplots(figsize=(8.4, 0.55 * len(names) + 1.2))
    for place, name in enumerate(names):
        for offset, order in ((-0.16, "1"), (0.16, "2")):
            found = [
                row["op"] for row in rows if (row["configuration"], row["order"]) == (name, order)
            ]
            if not found:
                continue
            mean, error = mean_and_error(found)
            height, colour = place + offset, _COLOURS[order]
            axes.plot(found, [height] * len(found), "o", color=colour, alpha=0.35, markersize=4)
            label = f"order {order}" if place == 0 else None
            axes.errorbar(
                mean,
                height,
                xerr=error or 0,
                fmt="D",
                color=colour,
                capsize=3,
                markersize=5,
                label=label,
            )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("overall performance after six tasks; points are runs, bars standard errors")
    axes.grid(axis="x", alpha=0.3)
    if rows:
        axes.legend(loc="lower left", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})
    pyplot.close(canvas)


def _lines(rows: Rows) -> list[list[str]]:
    found: list[list[str]] = []
    for name in dict.fromkeys(row["configuration"] for row in rows):
        own = [row for row in rows if row["configuration"] == name]
        by_order = [[row["op"] for row in own if row["order"] == order] for order in ("1", "2")]
        learnt = [fmean([row["matrix"][i][i] for i in range(len(row["tasks"]))]) for row in own]
        found.append(
            [
                name,
                str(len(own)),
                *map(_percent, by_order),
                *(_percent([row[key] for row in own]) for key in ("op", "bwt", "bwt_t")),
                _percent(learnt),
                f"{fmean([row['seconds'] for row in own]):.0f}",
                f"{max(row['peak_memory_bytes'] for row in own) / 2**20:.0f}",
                f"{fmean([row['replay_bytes'] for row in own]) / 1024:.0f}",
                f"{fmean([row['borrowed_bytes'] for row in own]) / 1024:.0f}",
            ]
        )
    return found


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "n/a"
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f}" if error is None else f"{100 * mean:.1f} ± {100 * error:.1f}"
