"""The report's sections on continual operation: what has arrived, and which model users get and why."""

from __future__ import annotations

from typing import Any

from pipelines.decisions import Decision
from pipelines.promotion_tables import champion_line, moment
from pipelines.results import StreamView


def arrivals_section(view: StreamView) -> list[dict[str, str]]:
    """A row per entry of the register; empty for a stream without an inbox."""
    return [
        {
            "number": str(item.number),
            "name": item.name,
            "verdict": item.verdict,
            "rows": "" if item.rows is None else str(item.rows),
            "noted": moment(item.noted_at),
            "why": item.reason or item.place,
        }
        for item in view.arrivals
    ]


def promotion_section(view: StreamView) -> dict[str, Any] | None:
    """The champion, all decisions, and the bounds of the last one by the gate; None without any."""
    entries = view.decisions.entries
    if not entries:
        return None
    judged = [entry for entry in entries if entry.kind == "gate"]
    return {
        "champion": champion_line(view.decisions),
        "rows": [_row(entry) for entry in reversed(entries)],
        "judged": judged[-1].model.task if judged else None,
        "checks": _checks(judged[-1]) if judged else [],
    }


def _row(entry: Decision) -> dict[str, str]:
    return {
        "number": str(entry.number),
        "at": moment(entry.at),
        "by": "gate" if entry.kind == "gate" else entry.user,
        "model": entry.model.task,
        "fingerprint": entry.model.fingerprint,
        "verdict": entry.verdict,
        "css": "bad" if entry.held_back else "good",
        "reason": entry.reason,
    }


def _checks(entry: Decision) -> list[dict[str, str]]:
    words = {True: ("holds", "good"), False: ("fails", "bad"), None: ("not applied", "")}
    return [
        {
            "bound": check.bound,
            "of": check.of,
            "figure": "" if check.figure is None else f"{check.figure:.4f}",
            "limit": f"{check.limit:g}",
            "holds": words[check.holds][0],
            "css": words[check.holds][1],
            "why": check.why,
        }
        for check in entry.checks
    ]
