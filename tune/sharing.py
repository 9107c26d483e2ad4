"""What a search saved by sharing: stages that several trials have in common are computed once.

Counted from the ledger and the stages' records: what every entry would have cost alone, all its stages
summed up, against each stage once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tune.ledger import Entry, Kind, Ledger

KINDS: Final[tuple[Kind, ...]] = ("reference", "trial", "confirm")


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
        alone: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        spent: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        seen: set[str] = set()
        for kind in KINDS:
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

    @classmethod
    def of_ledger(cls, ledger: Ledger) -> Sharing:
        """Count all entries of a search."""
        return cls.of(list(ledger.entries.values()), ledger.seconds())

    @property
    def saved(self) -> float | None:
        """The share of compute that was saved; None if there is none."""
        alone = sum(self.alone.values())
        return 1 - sum(self.spent.values()) / alone if alone > 0 else None
