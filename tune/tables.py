"""A search on the terminal: its trials, its best, and what the stream as it is reaches beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tune.ledger import Entry
from tune.plan import Plan, title

_COLOURS = {"finished": "green", "open": "yellow", "stopped": "dim", "failed": "red"}


def trials_table(plan: Plan) -> Table:
    """Return one line per trial and reference: what it tried, how far it came and what it reached."""
    search, steps = plan.search, plan.steps
    table = Table(title=f"{search.name}: {', '.join(search.goal.measures)}", title_justify="left")
    table.add_column("trial")
    for field in search.space:
        table.add_column(field.rpartition(".")[2], justify="right")
    table.add_column("tasks", justify="right")
    for name in _columns(plan):
        table.add_column(name, justify="right")
    table.add_column("state")
    best = {entry.key for entry in plan.best()[:1]}
    for entry in [*plan.ledger.of("reference"), *plan.ledger.of("trial")]:
        settings = {**(entry.learnt[-1] if entry.learnt else {}), **entry.settings}
        cells = [title(entry)]
        cells += [short(settings[field]) if field in settings else "" for field in search.space]
        cells.append(f"{entry.tasks}/{steps}")
        cells += [_figure(entry, name) for name in _columns(plan)]
        cells.append(f"[{_COLOURS.get(entry.state, 'red')}]{_state(plan, entry)}[/]")
        table.add_row(*cells, style="bold" if entry.key in best else None)
    return table


def confirmation_table(plan: Plan) -> Table | None:
    """Return what was run once more, on another order and other seeds; None if nothing was."""
    entries = [entry for entry in plan.ledger.of("confirm") if entry.results]
    if not entries:
        return None
    order = ", ".join(entries[0].order or ())
    seeds = ", ".join(map(str, entries[0].seeds))
    table = Table(title=f"once more, on {order}; seeds {seeds}", title_justify="left")
    table.add_column("what")
    for name in _columns(plan):
        table.add_column(name, justify="right")
    for entry in entries:
        name = title(entry).removeprefix("confirming ")
        table.add_row(name, *[_figure(entry, column) for column in _columns(plan)])
    return table


def summary(plan: Plan) -> dict[str, Any]:
    """Return all of it for a program to read."""
    return {
        "search": plan.search.name,
        "best": [entry.key for entry in plan.best()],
        "sharing": sharing(plan),
        "entries": [
            {
                "key": entry.key,
                "state": entry.state,
                "reason": entry.reason,
                "settings": entry.settings,
                "learnt": list(entry.learnt),
                "copied": [{"tasks": c.tasks, "source": c.source} for c in entry.copied],
                "order": entry.order,
                "seeds": list(entry.seeds),
                "results": [
                    {
                        "tasks": result.tasks,
                        **{name: value.mean for name, value in result.figures.items()},
                    }
                    for result in entry.results
                ],
            }
            for kind in ("reference", "trial", "confirm")
            for entry in plan.ledger.of(kind)
        ],
    }


def sharing(plan: Plan) -> dict[str, float]:
    """Return what was spent, what trials would have cost alone, in seconds, and how often stages ran.

    `computed` counts how often a stage was computed, `stages` how many there are: equal if none was
    computed twice.
    """
    seconds, entries = plan.ledger.seconds(), list(plan.ledger.entries.values())
    alone = sum(seconds.get(key, 0.0) for entry in entries for key in entry.stages)
    spent = sum(seconds.values())
    return {
        "seconds": spent,
        "seconds_alone": alone,
        "share": spent / alone if alone else 1.0,
        "stages": len({key for entry in entries for key in entry.stages}),
        "asked_for": sum(len(entry.stages) for entry in entries),
        "computed": sum(len(result.ran) for entry in entries for result in entry.results),
    }


def sharing_line(found: Mapping[str, float]) -> str:
    """Return that as a sentence."""
    return (
        f"{found['stages']:.0f} stages stood for {found['asked_for']:.0f}: {found['seconds']:.0f} s "
        f"instead of {found['seconds_alone']:.0f} s ({found['share']:.0%})"
    )


def short(value: Any) -> str:
    """Return a setting as a few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return str(value.get("name", value))
    return "null" if value is None else str(value)


def _columns(plan: Plan) -> list[str]:
    wanted = [
        *plan.search.goal.measures,
        *(c.measure for c in plan.search.constraints),
        "op",
        "bwt",
    ]
    return [name for name in dict.fromkeys(wanted) if name in plan.measures]


def _figure(entry: Entry, name: str) -> str:
    value = entry.figures.get(name)
    if value is None:
        return ""
    # Scores are shares; shown as the points that papers give.
    factor = 100 if abs(value.mean) <= 1 and name not in ("seconds", "replay_bytes") else 1
    error = "" if value.error is None else f" ± {factor * value.error:.1f}"
    return f"{factor * value.mean:,.1f}{error}"


def _state(plan: Plan, entry: Entry) -> str:
    if entry.state == "finished" and any(short > 0 for short in plan.missed(entry)):
        return "misses a constraint" if entry.kind == "trial" else "finished"
    return "running" if entry.state == "open" and entry.results else entry.state
