"""What runs at the moment, now and then: a search's steps take minutes, and silence looks like a fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions

from pipelines.watching import progress_text

INTERVAL = 15.0
# Set when a driver begins a stage, and gone with all else that is known of it at its end.
BEGUN = "begun"


@contextmanager
def heartbeat(
    monitor: Any, tell: Callable[[str], None], interval: float = INTERVAL
) -> Iterator[None]:
    """Tell of every running stage, a line each, as long as the block runs.

    Args:
        monitor: where drivers and workers post their numbers.
        interval: seconds between two times.
    """
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(interval):
            try:
                numbers: Any = ray.get(monitor.snapshot.remote(), timeout=2.0)
            except (ray.exceptions.RayError, TimeoutError):
                continue
            now = time.time()
            for key, found in sorted(numbers.items()):
                if BEGUN in found:
                    name = key.rpartition("/")[0]
                    tell(f"  running {name:<28} {progress_text(found, now - found[BEGUN])}")

    thread = threading.Thread(target=beat, name="seekr-tune-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(interval)
