"""The report on what sharing saved: the account in words, and its bars."""

from __future__ import annotations

from typing import Any, Final

from pipelines.figures import Segment, stacked_bars
from pipelines.readable import duration
from tune.ledger import Kind
from tune.sharing import KINDS, Sharing
from tune.words import count

_CALLED: Final = {"reference": "references", "trial": "trials", "confirm": "confirmations"}


def sharing_section(sharing: Sharing) -> dict[str, Any] | None:
    """Return the report's words and bars; None before anything is computed."""
    if sharing.saved is None:
        return None
    alone, spent = sum(sharing.alone.values()), sum(sharing.spent.values())
    scale, unit = (
        (3600, "hours") if alone > 5400 else (60, "minutes") if alone > 90 else (1, "seconds")
    )
    kinds: list[Kind] = [kind for kind in KINDS if sharing.alone[kind] > 0]
    rows = [
        (name, [_segment(kind, own[kind], scale) for kind in kinds])
        for name, own in (("each on its own", sharing.alone), ("as it was", sharing.spent))
    ]
    found = sharing.stages - sharing.computed
    return {
        "alone": duration(alone),
        "spent": duration(spent),
        "saved": f"{100 * sharing.saved:.1f} %",
        "asked": count(sharing.asked, "stage"),
        "stages": f"{sharing.stages:,}",
        "computed": f"{sharing.computed:,}",
        "found": f"{found:,} of them {'was' if found == 1 else 'were'} in the store before."
        if found
        else "",
        "again": sharing.again,
        "again_text": _again(sharing.again),
        "legend": [{"css": f"s{KINDS.index(kind)}", "label": _CALLED[kind]} for kind in kinds],
        "chart": stacked_bars(
            rows,
            title="Compute time with and without sharing",
            unit=f"{unit} of compute",
            width=1036,
            totals=[duration(alone), duration(spent)],
        ),
    }


def _again(times: int) -> str:
    if times == 0:
        return "No stage was computed twice."
    return f"{count(times, 'stage')} {'was' if times == 1 else 'were'} computed a second time."


def _segment(kind: Kind, seconds: float, scale: float) -> Segment:
    label = f"{_CALLED[kind]}: {duration(seconds)}"
    return Segment(label=label, value=seconds / scale, colour=KINDS.index(kind))
