"""What a search saved by sharing: stages that several trials have in common are computed once.

Counted from the ledger and the stages' records: what every entry would have cost alone, all its stages
summed up, against each stage once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pipelines.figures import Segment, stacked_bars
from pipelines.readable import duration
from tune.ledger import Entry, Kind
from tune.report_words import count

_KINDS: Final[tuple[Kind, ...]] = ("reference", "trial", "confirm")
_CALLED: Final = {"reference": "references", "trial": "trials", "confirm": "confirmations"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """The account.

    Attributes:
        alone: seconds of all entries' stages, by kind of entry, if nobody shared.
        spent: seconds of each stage once, counted for the first kind that has it.
        asked: stages of all entries, one by one.
        stages: different ones.
        computed: those that this search computed; the others were in the store.
        again: how often one was computed that had been before.
    """

    alone: Mapping[Kind, float]
    spent: Mapping[Kind, float]
    asked: int
    stages: int
    computed: int
    again: int

    @classmethod
    def of(cls, entries: Sequence[Entry], seconds: Mapping[str, float]) -> Sharing:
        """Count.

        Args:
            seconds: of each stage, by its key.
        """
        alone: dict[Kind, float] = dict.fromkeys(_KINDS, 0.0)
        spent: dict[Kind, float] = dict.fromkeys(_KINDS, 0.0)
        seen: set[str] = set()
        for kind in _KINDS:
            for entry in entries:
                if entry.kind == kind:
                    alone[kind] += sum(seconds.get(key, 0.0) for key in sorted(entry.stages))
                    spent[kind] += sum(seconds.get(key, 0.0) for key in sorted(entry.stages - seen))
                    seen |= entry.stages
        ran = Counter(key for entry in entries for result in entry.results for key in result.ran)
        return cls(
            alone=alone,
            spent=spent,
            asked=sum(len(entry.stages) for entry in entries),
            stages=len(seen),
            computed=len(ran),
            again=ran.total() - len(ran),
        )

    @property
    def saved(self) -> float | None:
        """The share of compute that was saved; None if there is none."""
        alone = sum(self.alone.values())
        return 1 - sum(self.spent.values()) / alone if alone > 0 else None


def sharing_section(sharing: Sharing) -> dict[str, Any] | None:
    """Return the report's words and bars; None before anything is computed."""
    if sharing.saved is None:
        return None
    alone, spent = sum(sharing.alone.values()), sum(sharing.spent.values())
    scale, unit = (
        (3600, "hours") if alone > 5400 else (60, "minutes") if alone > 90 else (1, "seconds")
    )
    kinds: list[Kind] = [kind for kind in _KINDS if sharing.alone[kind] > 0]
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
        "legend": [{"css": f"s{_KINDS.index(kind)}", "label": _CALLED[kind]} for kind in kinds],
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
    return Segment(label=label, value=seconds / scale, colour=_KINDS.index(kind))
