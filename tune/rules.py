"""Which trials learn another task: rules that compare a trial with earlier ones after the same task.

Successive halving and median stopping as published decide on whatever has arrived, so the same search ends
differently when machines are faster or a driver was killed. Here trials are decided in the order of their
numbers: trial n after task k is compared with trials 0..n-1 after task k, and waits until each of them has
got there or has ended. The trial with the lowest number never waits, so nothing stalls, and what was decided
is a function of the figures alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipelines.section import Section
from tune.words import count

Decision = Literal["go on", "stop", "wait"]


class Halving(Section):
    """Successive halving (ASHA): after a task only the best share of trials goes on."""

    by: Literal["asha"] = "asha"
    reduction: float = Field(default=2.0, gt=1)
    """One of how many goes on."""
    first: int = Field(default=2, ge=1)
    """Tasks that every trial learns."""

    def keeps(self, own: float, earlier: Sequence[float]) -> bool:
        """Return whether a value is among the best share of itself and the earlier ones."""
        better = sum(value > own for value in earlier)
        return better < math.ceil((len(earlier) + 1) / self.reduction)

    def reason(self, others: int) -> str:
        """Return why a value is not kept beside so many earlier ones."""
        return f"not among the best of {others + 1}"


class Median(Section):
    """Median stopping: a trial below the median of earlier ones after the same task ends."""

    by: Literal["median"] = "median"
    first: int = Field(default=2, ge=1)
    """Tasks that every trial learns."""
    at_least: int = Field(default=4, ge=1)
    """Earlier trials after the same task without which nobody is stopped."""

    def keeps(self, own: float, earlier: Sequence[float]) -> bool:
        """Return whether a value is not below the median of the earlier ones."""
        return len(earlier) < self.at_least or own >= statistics.median(earlier)

    def reason(self, others: int) -> str:
        """Return why a value is not kept beside so many earlier ones."""
        return f"below the median of {count(others, 'earlier trial')}"


Rule = Halving | Median


def decide(rule: Rule, tasks: int, own: float, earlier: Sequence[float | None]) -> Decision:
    """Return what becomes of a trial after a task.

    Args:
        own: its value, more is better.
        earlier: of every trial with a lower number, its value after the same task; NaN if it ended
            before it, None if that is not known yet.
    """
    if tasks < rule.first:
        return "go on"
    if any(value is None for value in earlier):
        return "wait"
    known = [value for value in earlier if value is not None and not math.isnan(value)]
    return "go on" if rule.keeps(own, known) else "stop"
