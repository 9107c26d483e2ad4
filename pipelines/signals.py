"""What may interrupt a training from outside: a stop that the driver asks for, and preemption.

The first worker asks the run's monitor twice a second, beside the training. What it has heard when a
step ends all learn with that step's loss, so they save and leave after the same step.
Whether a node is about to be taken away is a question that all workers must put to Ray Train at the
same time, so the first one says when.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
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
        self._asks = rank == 0
        self._closed = threading.Event()
        self._stop = self._told = False
        self._looked = time.monotonic()
        if self._asks and report.monitor is not None:
            ask = threading.Thread(target=self._ask, args=(report.monitor,), daemon=True)
            ask.start()

    def wishes(self) -> Iterator[bool]:
        """Yield whether a stop was asked for, and whether it is time to look for preemption.

        Each is decided when it is taken: at the end of a step, however long the step is.
        """
        yield self._stop
        yield self._asks and time.monotonic() - self._looked >= _PREEMPTION_SECONDS

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

    def close(self) -> None:
        """Stop asking: the process may stay for another training."""
        self._closed.set()

    def _ask(self, monitor: Any) -> None:
        while not (self._stop or self._closed.is_set()):
            try:
                self._stop = bool(ray.get(monitor.stopping.remote()))
            except ray.exceptions.RayError:
                return  # a monitor that is gone stops nobody
            self._closed.wait(_STOP_SECONDS)
