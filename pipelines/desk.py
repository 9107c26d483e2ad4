"""Between train stages and a group of workers: a desk for what is to do and what came of it, and the
loop of a worker.

This module imports next to nothing, since the desk's process and Ray Train's controller import it too
and should be there at once. What lies on the desk goes through unread.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import pickle
from collections.abc import Mapping
from typing import Any


class Desk:
    """One piece of work at a time, for all workers of a group."""

    def __init__(self) -> None:
        self._number, self._spec, self._result = 0, None, None
        self._done, self._starts, self._closed = 0, 0, False
        self._changed = asyncio.Condition()

    async def lay(self, spec: Any) -> Any:
        """Lay work down and wait for (what the first worker returned, whether the group is as new)."""
        async with self._changed:
            self._number, self._spec = self._number + 1, spec
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._done == self._number)
            return self._result, self._starts <= 1

    async def take(self, last: int, first_worker: bool) -> tuple[int, Any] | None:
        """Return the work after number `last` that is not done, when there is some; None at the end."""
        async with self._changed:
            self._starts += first_worker and last == 0
            await self._changed.wait_for(
                lambda: self._closed or self._number > max(last, self._done)
            )
            return None if self._closed else (self._number, self._spec)

    async def done(self, number: int, result: bytes) -> None:
        """Hand in the first worker's result."""
        async with self._changed:
            self._done, self._result = number, result
            self._changed.notify_all()

    async def close(self) -> None:
        """Send the workers home."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()


def serve(config: Mapping[str, Any]) -> None:
    """Entry point of `TorchTrainer`: a worker does what lies on the desk until it closes."""
    import ray.train

    desk = config["desk"]
    module, _, name = config["work"].partition(":")
    work = getattr(importlib.import_module(module), name)
    first = ray.train.get_context().get_world_rank() == 0
    number = 0
    while (taken := ray.get(desk.take.remote(number, first))) is not None:
        number, [spec] = taken
        result = work(ray.get(spec))
        gc.collect()  # a model and its hooks hold each other
        if first:
            ray.get(desk.done.remote(number, pickle.dumps(result)))
