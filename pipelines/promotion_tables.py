"""What has arrived and what was decided, as tables and lines for a terminal and as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipelines.arrivals import Arrival
from pipelines.artifact import StageRef
from pipelines.decisions import Check, Decision, Decisions

_COLOURS = {
    "accepted": "green", "duplicate": "cyan", "quarantined": "red", "withdrawn": "magenta",
    "erased": "yellow",
    "promoted": "green", "held back": "yellow", "rolled back": "magenta",
}  # fmt: skip
_MARKS = {True: ("holds", "green"), False: ("fails", "red"), None: ("not applied", "cyan")}
_SHORT, _NUM_BAD_ROWS = 12, 3


def arrivals_table(arrivals: Sequence[Arrival]) -> Table:
    """Return the register: what came through the inbox, and what became of it."""
    table = Table(title="arrivals", title_justify="left")
    for column in ("#", "name", "", "rows", "noted", "why, or from where"):
        table.add_column(column, justify="right" if column in ("#", "rows") else "left")
    for item in arrivals:
        table.add_row(
            str(item.number),
            item.name,
            Text(item.verdict, _COLOURS[item.verdict]),
            "" if item.rows is None else str(item.rows),
            moment(item.noted_at),
            Text(_why(item)),
        )
    return table


def _why(item: Arrival) -> str:
    """Why something is no task, with the first of its bad rows; or where a task came from."""
    shown = item.bad_rows[:_NUM_BAD_ROWS]
    lines = [f"{row['file'].rpartition('/')[2]}:{row['line']}: {row['reason']}" for row in shown]
    more = len(item.bad_rows) - len(shown)
    return "\n".join([item.reason or item.place, *lines, *([f"and {more} more"] if more else [])])


def decisions_table(decisions: Decisions) -> Group:
    """Return all decisions, oldest first, and who is the champion."""
    table = Table(title="decisions", title_justify="left")
    for column in ("#", "when", "by", "model", "", "why"):
        table.add_column(column)
    for item in decisions.entries:
        table.add_row(
            str(item.number),
            moment(item.at),
            "gate" if item.kind == "gate" else item.user,
            f"{item.model.task} {item.model.fingerprint[:_SHORT]}",
            Text(item.verdict, _COLOURS[item.verdict]),
            Text(item.reason),
        )
    return Group(table, Text(champion_line(decisions), "bold"))


def checks_table(checks: Sequence[Check]) -> Table:
    """Return every bound of the gate with its figure."""
    table = Table(title="gate", title_justify="left")
    for column in ("bound", "of", "figure", "limit", "", "figures behind it"):
        table.add_column(column, justify="right" if column in ("figure", "limit") else "left")
    for check in checks:
        figure = "" if check.figure is None else f"{check.figure:.4f}"
        mark = Text(*_MARKS[check.holds])
        table.add_row(check.bound, check.of, figure, f"{check.limit:g}", mark, Text(check.why))
    return table


def decision_group(decision: Decision) -> Group:
    """Return what the gate said of a model, and by which figures."""
    line = f"{decision.model.task} is {decision.verdict}: {decision.reason}"
    return Group(checks_table(decision.checks), Text(line, _COLOURS[decision.verdict]))


def champion_line(decisions: Decisions) -> str:
    """Return who is the champion since when and why, in one line."""
    champion, since = decisions.champion, decisions.since
    if champion is None or since is None:
        return "champion: none yet"
    return (
        f"champion: the model after {champion.task} ({champion.fingerprint[:_SHORT]}) since "
        f"{moment(since.at)}, {since.verdict}: {since.reason}"
    )


def told_of(
    model: StageRef, tasks: Sequence[str], arrivals: Sequence[Arrival], decisions: Decisions
) -> Iterator[str]:
    """Yield lines about a model: which of its tasks arrived from where, and what was decided."""
    for item in arrivals:
        if item.verdict == "accepted" and item.name in tasks:
            noted = f"arrival {item.number}, {moment(item.noted_at)}"
            yield f"{item.name} arrived from {item.place} ({noted})"
        if item.verdict == "erased" and item.name in tasks:
            yield f"{item.name}: {item.reason}"
    for item in decisions.about(model):
        words = item.verdict if item.model == model else f"no longer the champion, {item.kind}"
        yield f"{moment(item.at)} {words}: {item.reason}"
    if decisions.champion == model:
        yield "it is the champion"


def operations_json(arrivals: Sequence[Arrival], decisions: Decisions) -> dict[str, Any]:
    """Return arrivals, champion and decisions as plain values."""
    champion = decisions.champion
    return {
        "arrivals": [asdict(item) for item in arrivals],
        "champion": None if champion is None else champion.key,
        "decisions": [item.to_json() for item in decisions.entries],
    }


def moment(iso: str) -> str:
    """A time of a record to the minute."""
    return iso[:16].replace("T", " ")
