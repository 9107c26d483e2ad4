"""What may interrupt a training from outside: a stop that the driver asks for, and preemption.

A worker hears of a stop by asking the run's monitor now and then, without waiting for the answer. What
one worker has heard all learn with the next step's loss, so they save and leave after the same step.
Whether a node is about to be taken away is a question that all workers must put to Ray Train at the
same time, so the first one says when.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import ray.train

from pipelines.monitor import Reporter

_STOP_SECONDS = 0.5
_PREEMPTION_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What all workers know after a step."""

    stop: bool
    preempted: bool


class Signals:
    """One worker's ear.

    Args:
        report: whose monitor is asked; None as its monitor hears nothing.
        rank: the first worker asks, for all.
    """

    def __init__(self, report: Reporter, rank: int) -> None:
        self._monitor, self._asks = report.monitor, rank == 0
        self._answer: Any = None
        self._stop = self._told = False
        self._asked = self._looked = time.monotonic()

    def wishes(self) -> tuple[bool, bool]:
        """Return (stop was asked for, it is time to look for preemption); never waits."""
        now = time.monotonic()
        if not self._asks:
            return False, False
        if self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            if ready:
                self._stop, self._answer = self._stop or _value(self._answer), None
        elif self._monitor is not None and now - self._asked >= _STOP_SECONDS:
            self._answer, self._asked = self._monitor.stopping.remote(), now
        return self._stop, now - self._looked >= _PREEMPTION_SECONDS

    def heard(self, wishes: Sequence[bool]) -> Heard:
        """Return what follows from all workers' wishes; called on all workers after every step."""
        stop, look = wishes
        preempted = False
        if look:
            self._looked = time.monotonic()
            # Once per notice: the node stays marked until it is gone.
            coming = ray.train.get_preemption_info() is not None
            preempted, self._told = coming and not self._told, coming
        return Heard(stop=stop, preempted=preempted)


def _value(answer: Any) -> bool:
    try:
        return bool(ray.get(answer))
    except ray.exceptions.RayError:
        return False  # a monitor that is gone stops nobody
