"""The report on confirmation: do the best trials beat the stream as it is, where nothing was searched?

Both run on the same order and seeds, so they are compared seed by seed, and the standard error is that of
the differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from seekr.statistics import mean_and_error
from tune.ledger import Entry
from tune.report_tables import View, confirmations
from tune.words import DASH, Wanted, count, difference

_SURE: Final = 2.0  # standard errors


def confirmation_tables(view: View) -> list[dict[str, Any]]:
    """Return a table for each order and seeds on which something was confirmed."""
    return [_table(view, group) for group in confirmations(view)]


def compared(wanted: Wanted, ours: Entry, plain: Entry) -> tuple[float, float | None] | None:
    """Return how much larger a figure is than the stream's as it is, and the standard error over seeds."""
    own, other = wanted.of(ours.figures), wanted.of(plain.figures)
    if own is None or other is None or len(own.values) != len(other.values):
        return None
    return mean_and_error([a - b for a, b in zip(own.values, other.values, strict=True)])


def verdict(view: View, group: Sequence[Entry]) -> str:
    """Return in a sentence whether the best trial beats the stream as it is."""
    if not view.best:
        return "No trial may be chosen, so nothing is compared with the stream as it is."
    number = view.best[0].number
    done = {entry.number: entry for entry in group if entry.state == "finished"}
    if number not in done:
        return f"Trial {number}, the best, has not been confirmed here."
    if -1 not in done:
        return "The stream as it is has not been run here, so nothing can be compared yet."
    return " ".join(_said(one, number, done[number], done[-1]) for one in view.wanted)


def _said(one: Wanted, number: int, ours: Entry, plain: Entry) -> str:
    found = compared(one, ours, plain)
    if found is None:
        return f"{one.title} is not known of both, so it cannot be compared."
    value, error = found
    by = difference(one.measure, value, error)
    if value * one.sign <= 0:
        return f"Trial {number} does not beat the stream as it is: {one.title} {by}."
    words = f"Trial {number} beats the stream as it is: {one.title} {by}"
    if error is None:
        return f"{words}, on a single seed, so how sure this is cannot be told."
    if abs(value) <= _SURE * error:
        return f"{words}, which is within twice its standard error and may be chance."
    return f"{words}, more than twice its standard error."


def _table(view: View, group: Sequence[Entry]) -> dict[str, Any]:
    plain = next((entry for entry in group if entry.number < 0), None)
    rows = []
    for entry in group:
        found = [
            None if plain is None or entry is plain else compared(one, entry, plain)
            for one in view.wanted
        ]
        rows.append(
            {
                "name": "the stream as it is" if entry.number < 0 else f"trial {entry.number}",
                "best": bool(view.best) and entry.number == view.best[0].number,
                "state": "still open" if entry.state == "open" else entry.state,
                "css": "ran" if entry.state == "finished" else "",
                "values": [one.written(one.of(entry.figures)) for one in view.wanted],
                "differences": [
                    {
                        "text": DASH if pair is None else difference(one.measure, *pair),
                        "css": "" if pair is None else _css(pair[0] * one.sign),
                    }
                    for one, pair in zip(view.wanted, found, strict=True)
                ],
                "reason": entry.reason,
            }
        )
    first = group[0]
    return {
        "order": ", ".join(first.order or ()),
        "seeds": f"{count(len(first.seeds), 'seed')} ({', '.join(map(str, first.seeds))})",
        "rows": rows,
        "verdict": verdict(view, group),
    }


def _css(better: float) -> str:
    return "good" if better > 0 else "bad" if better < 0 else ""
