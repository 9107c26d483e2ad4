"""A run on the screen: live lines on a terminal, plain ones anywhere else.

The terminal shows finished stages as lines that stay, running ones below with rows or steps, speed,
loss and time to go. Without a terminal every event is one line, and a long stage says every now and
then how far it is, so a log file of a nightly run can be read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pipelines.readable import size
from pipelines.stage import StageEvent

_PLAIN_INTERVAL = 15.0
_SHOWN = {
    "grad_norm": "norm {:.2g}",
    "learning_rate": "rate {:.1e}",
    "tokens_per_second": "{:.0f} tokens/s",
    "mfu": "MFU {:.0%}",
}
_MARKS = {
    "finished": ("ran", "green"),
    "reused": ("reused", "cyan"),
    "failed": ("failed", "red"),
    "stopped": ("stopped", "yellow"),
}


@dataclass(slots=True)
class _Running:
    name: str
    started: float
    told: float
    note: str = ""


@dataclass(slots=True)
class Watcher:
    """Shows a run's events. Use as a context manager and call with every event."""

    console: Console
    num_stages: int
    _running: dict[str, _Running] = field(default_factory=lambda: dict[str, _Running]())
    _numbers: dict[str, dict[str, Any]] = field(default_factory=lambda: dict[str, dict[str, Any]]())
    _done: int = 0
    _live: Live | None = None

    def __enter__(self) -> Watcher:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: StageEvent | None, monitor: Any) -> None:
        """Take one event, or None when nothing happened for a moment."""
        if event is not None:
            self._take(event)
        elif monitor is not None and self._running:
            self._poll(monitor)
        if self._live is not None:
            self._live.update(self._picture())

    def _take(self, event: StageEvent) -> None:
        name, key, now = str(event.stage), event.stage.key, time.monotonic()
        if event.kind in _MARKS:
            self._running.pop(key, None)
            self._numbers.pop(key, None)
            self._done += event.record is not None
            word, colour = _MARKS[event.kind]
            self._line(name, word, colour, _outcome(event))
            return
        note = f"waiting for {event.owner}" if event.kind == "waiting" else ""
        if event.kind == "resumed":
            note = f"attempt {event.attempt}"
        is_news = key not in self._running or note != self._running[key].note
        self._running[key] = _Running(name=name, started=now, told=now, note=note)
        if self._live is None and is_news:
            self._line(name, event.kind, "yellow", note)

    def _poll(self, monitor: Any) -> None:
        try:
            self._numbers = ray.get(monitor.snapshot.remote(), timeout=0.5)
        except (ray.exceptions.RayError, TimeoutError):
            return
        if self._live is not None:
            return
        now = time.monotonic()
        for key, running in self._running.items():
            if now - running.told >= _PLAIN_INTERVAL:
                running.told = now
                text = progress_text(self._of(key), now - running.started)
                self._line(running.name, "running", "yellow", text)

    def _line(self, name: str, word: str, colour: str, rest: str) -> None:
        count = f"[{self._done}/{self.num_stages}]"
        text = Text.assemble(f"{count:>9} ", (f"{word:<8}", colour), f" {name:<28} ", (rest, "dim"))
        console = self._live.console if self._live is not None else self.console
        console.print(text, soft_wrap=True)

    def _picture(self) -> Group:
        now = time.monotonic()
        table = Table.grid(padding=(0, 1))
        for key, running in self._running.items():
            text = running.note or progress_text(self._of(key), now - running.started)
            table.add_row(Spinner("dots"), Text(running.name, "bold"), Text(text, "dim"))
        return Group(table)

    def _of(self, key: str) -> Mapping[str, Any]:
        return self._numbers.get(key, {})


def progress_text(numbers: Mapping[str, Any], seconds: float) -> str:
    """Return what is known of a running stage: how far, how fast, and how long still.

    >>> progress_text({"steps_done": 10, "steps": 40, "loss": 1.5, "tokens_per_second": 900}, 5.0)
    'step 10/40, loss 1.500, 900 tokens/s, 5 s, about 15 s to go'
    """
    parts: list[str] = []
    share = 0.0
    for unit in ("step", "row"):
        done, whole = numbers.get(f"{unit}s_done"), numbers.get(f"{unit}s")
        if done is None:
            continue
        parts.append(f"{unit} {done}/{whole}" if whole else f"{unit} {done}")
        share = done / whole if whole else 0.0
    if "loss" in numbers:
        parts.append(f"loss {numbers['loss']:.3f}")
    for name, text in _SHOWN.items():
        if name in numbers:
            parts.append(text.format(numbers[name]))
    if "memory_bytes" in numbers:
        parts.append(size(numbers["memory_bytes"]))
    parts.append(f"{seconds:.0f} s")
    if 0.0 < share < 1.0:
        parts.append(f"about {seconds * (1 - share) / share:.0f} s to go")
    return ", ".join(parts)


def _outcome(event: StageEvent) -> str:
    if event.record is None:
        return event.error or ""
    record = event.record
    parts = [f"{record.seconds:.1f} s"]
    if record.rows is not None:
        parts.append(f"{record.rows} {'tokens' if record.stage == 'train' else 'rows'}")
    if "final_loss" in record.stats:
        parts.append(f"loss {record.stats['final_loss']:.3f}")
    return ", ".join(parts)
