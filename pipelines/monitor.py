"""How a running stage tells what it is doing: small numbers, sent and forgotten.

One actor per run keeps the newest numbers of every running stage. Workers and actors anywhere post to
it without waiting; the driver polls it for the live view. Losing a post loses a line on a screen,
never a result. This module must stay light: every process that reports imports it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from pipelines.placement import beside_driver

# Seconds between two posts of one reporter.
POST_INTERVAL = 0.5
# Between two packets of steps.
STEPS_INTERVAL = 2.0


class Monitor:
    """The actor: per stage the newest fields, and sums over reporters of `rows_done`."""

    def __init__(self) -> None:
        self._stages: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, dict[str, int]] = {}
        self._steps: dict[str, list[dict[str, Any]]] = {}
        self._stopping = False

    def post(self, stage: str, reporter: str, fields: dict[str, Any]) -> None:
        """Merge fields of one reporter; its `rows_done` is added to the other reporters'."""
        rows = fields.pop("rows_done", None)
        if rows is not None:
            self._rows.setdefault(stage, {})[reporter] = rows
            fields["rows_done"] = sum(self._rows[stage].values())
        self._stages.setdefault(stage, {}).update(fields)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return the newest fields of all stages."""
        return self._stages

    def add_steps(self, stage: str, steps: list[dict[str, Any]]) -> None:
        """Keep training steps until they are taken."""
        self._steps.setdefault(stage, []).extend(steps)

    def take_steps(self) -> dict[str, list[dict[str, Any]]]:
        """Return the steps of all stages that have come since the last time, and forget them."""
        found, self._steps = self._steps, {}
        return found

    def stop(self) -> None:
        """Ask all running stages to save what they have and end."""
        self._stopping = True

    def stopping(self) -> bool:
        """Return whether they were asked to."""
        return self._stopping

    def clear(self, stage: str) -> None:
        """Forget a stage that has ended."""
        self._stages.pop(stage, None)
        self._rows.pop(stage, None)


def start_monitor() -> Any:
    """Start the actor on the driver's node; it takes no resources."""
    return ray.remote(Monitor).options(**beside_driver()).remote()


@dataclass(slots=True)
class Reporter:
    """Posts for one process of one stage, at most twice a second. Picklable."""

    monitor: Any
    stage: str
    name: str = "driver"
    _last: float = field(default=0.0, repr=False)
    _handed: float = field(default=0.0, repr=False)
    _rows: int = field(default=0, repr=False)
    _steps: list[dict[str, Any]] = field(default_factory=lambda: list[dict[str, Any]](), repr=False)

    def post(self, *, force: bool = False, **fields: Any) -> None:
        """Send fields; dropped when the last post is too recent, unless forced."""
        now = time.monotonic()
        if self.monitor is None or (not force and now - self._last < POST_INTERVAL):
            return
        self._last = now
        self.monitor.post.remote(self.stage, self.name, dict(fields))

    def add_step(self, entry: Mapping[str, Any]) -> None:
        """Hand on a training step's numbers, in packets."""
        self._steps.append(dict(entry))
        now = time.monotonic()
        if self.monitor is not None and now - self._handed >= STEPS_INTERVAL:
            self._handed = now
            self.monitor.add_steps.remote(self.stage, self._steps)
            self._steps = []

    def add_rows(self, count: int) -> None:
        """Count rows that this process has finished."""
        self._rows += count
        self.post(rows_done=self._rows)

    def named(self, name: str) -> Reporter:
        """Return a reporter of the same stage for another process."""
        return Reporter(self.monitor, self.stage, name)
