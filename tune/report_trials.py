"""The report's tables of trials and references: who tried what, how far it got, and what it misses."""

from __future__ import annotations

from typing import Any

from tune.ledger import Entry
from tune.report_tables import SHOWN, STATES, View
from tune.words import DASH, Wanted, count, difference, figure_name, short_setting


def references(view: View) -> list[dict[str, Any]]:
    """Return what constraints compare with."""
    shown = list(dict.fromkeys([*view.search.goal.measures, *_constrained(view)]))
    return [
        {
            "name": entry.key.removeprefix("reference-"),
            "state": SHOWN.get(entry.state, entry.state),
            "figures": [(figure_name(name), _written(entry, name)) for name in shown],
            "settings": ", ".join(f"{f}={short_setting(v)}" for f, v in entry.settings.items()),
            "reason": entry.reason,
        }
        for entry in view.plan.ledger.of("reference")
    ]


def trial_rows(view: View) -> list[dict[str, Any]]:
    """Return the table of all trials: first those that may be chosen, the best on top, then by state."""
    ranks = {entry.key: rank for rank, entry in enumerate(view.best)}
    order = sorted(
        view.trials,
        key=lambda e: (ranks.get(e.key, len(ranks)), STATES.index(e.state), e.number),
    )
    return [
        {
            "number": entry.number,
            "state": SHOWN.get(entry.state, entry.state),
            "css": "ran" if entry.state == "finished" else "",
            "best": ranks.get(entry.key) == 0,
            "tasks": f"{entry.tasks} of {view.plan.steps}",
            "values": [one.written(one.of(entry.figures)) for one in view.wanted],
            "constraints": [_kept(view, entry, i) for i in range(len(view.search.constraints))],
            "settings": [
                short_setting(entry.settings[field]) if field in entry.settings else DASH
                for field in view.search.space
            ],
            "reason": "; ".join(filter(None, [*_copies(entry), entry.reason])),
        }
        for entry in order
    ]


def _kept(view: View, entry: Entry, which: int) -> dict[str, str]:
    missed = view.plan.missed(entry)[which]
    if missed == float("inf"):
        return {"text": DASH, "css": ""}
    if missed <= 0:
        return {"text": "met", "css": "good"}
    measure = view.search.constraints[which].measure
    return {"text": f"missed by {difference(measure, missed).removeprefix('+')}", "css": "bad"}


def _copies(entry: Entry) -> list[str]:
    return [f"from trial {c.source} after {count(c.tasks, 'task')}" for c in entry.copied]


def _constrained(view: View) -> list[str]:
    return [constraint.measure for constraint in view.search.constraints]


def _written(entry: Entry, name: str) -> str:
    one = Wanted(measure=name, better="max")
    return one.written(one.of(entry.figures))
