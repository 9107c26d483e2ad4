"""Training steps on their way from a worker to MLflow while the training runs.

A worker hands its steps to the run's monitor in small packets; the driver fetches what has gathered
every few seconds, without waiting. Steps that are lost on the way (a monitor that dies, a driver that
is killed) are completed from the history that the stage stores at its end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions

Steps = Sequence[Mapping[str, Any]]
_FETCH_SECONDS = 3.0


class LiveSteps:
    """Fetches steps on the driver."""

    def __init__(self) -> None:
        self._answer: Any = None
        self._fetched = time.monotonic()

    def fetch(self, monitor: Any) -> dict[str, Steps]:
        """Return steps by the key of their stage, nothing where none have come; never waits."""
        if monitor is None:
            return {}
        if self._answer is None:
            if time.monotonic() - self._fetched >= _FETCH_SECONDS:
                self._answer = monitor.take_steps.remote()
            return {}
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            return {}
        answer, self._answer, self._fetched = self._answer, None, time.monotonic()
        try:
            return ray.get(answer)
        except ray.exceptions.RayError:
            return {}
