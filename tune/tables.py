"""A search on the terminal: its trials, its best, and what the stream as it is reaches beside them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from pipelines.readable import duration
from tune.ledger import Entry
from tune.plan import Plan, title
from tune.sharing import KINDS, Sharing
from tune.words import figure_name, short_setting, with_error

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
        table.add_column(figure_name(name), justify="right")
    table.add_column("state")
    best = {entry.key for entry in plan.best()[:1]}
    for entry in [*plan.ledger.of("reference"), *plan.ledger.of("trial")]:
        settings = {**(entry.learnt[-1] if entry.learnt else {}), **entry.settings}
        cells = [title(entry)]
        cells += [
            short_setting(settings[field]) if field in settings else "" for field in search.space
        ]
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
        table.add_column(figure_name(name), justify="right")
    for entry in entries:
        name = title(entry).removeprefix("confirming ")
        table.add_row(name, *[_figure(entry, column) for column in _columns(plan)])
    return table


def summary(plan: Plan) -> dict[str, Any]:
    """Return all of it for a program to read."""
    account = Sharing.of_ledger(plan.ledger)
    return {
        "search": plan.search.name,
        "best": [entry.key for entry in plan.best()],
        "sharing": {**asdict(account), "saved": account.saved},
        "entries": [
            {
                "key": entry.key,
                "state": entry.state,
                "reason": entry.reason,
                "settings": entry.settings,
                "learnt": list(entry.learnt),
                "copied": [asdict(copied) for copied in entry.copied],
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
            for kind in KINDS
            for entry in plan.ledger.of(kind)
        ],
    }


def sharing_line(sharing: Sharing) -> str:
    """Return what sharing saved, as a sentence."""
    alone, spent = sum(sharing.alone.values()), sum(sharing.spent.values())
    share = spent / alone if alone else 1.0
    return (
        f"{sharing.stages} stages stood for {sharing.asked}: {duration(spent)} instead of "
        f"{duration(alone)} ({share:.0%})"
    )


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
    return "" if value is None else with_error(name, value.mean, value.error)


def _state(plan: Plan, entry: Entry) -> str:
    if entry.state == "finished" and any(short > 0 for short in plan.missed(entry)):
        return "misses a constraint" if entry.kind == "trial" else "finished"
    return "running" if entry.state == "open" and entry.results else entry.state
