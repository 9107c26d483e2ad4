"""A thread that writes a view beside the work it shows, and never in the work's way.

Jobs are queued and done one after the other; whoever queues them waits for nothing but the end, and for
that a bounded time. The first failure is told once and ends the writing, not the work: what a view shows
is kept elsewhere, and it can be written again from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

from pipelines.provenance import redact

CLOSE_SECONDS: Final = 60.0
_LONGEST: Final = 300
# Streams that run side by side share a sqlite file, which takes one writer at a time.
_ONE_WRITER = threading.Lock()
Writer = TypeVar("Writer")


class BackgroundWriter(Generic[Writer]):
    """Writes jobs in a thread; no method raises or waits, except `close`, which is bounded.

    Args:
        connect: makes what jobs write with, in the thread and before the first of them; None if nothing
            is to be written.
        name: the thread's.
        failed: told once why the view is incomplete, perhaps in the thread.
    """

    def __init__(
        self, connect: Callable[[], Writer] | None, *, name: str, failed: Callable[[str], None]
    ) -> None:
        self._connect, self._tell = connect, failed
        self._queue: SimpleQueue[Callable[[Writer], None] | None] = SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        if connect is not None:
            self._thread.start()

    def put(self, job: Callable[[Writer], None]) -> None:
        """Have something written when all before it is."""
        if self._connect is not None:
            self._queue.put(job)

    def close(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Wait until everything is written, at most `timeout` seconds. Closing twice is fine.

        Returns:
            Whether it is.
        """
        if self._connect is None:
            return True
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._fail(f"it was still being written {timeout:.0f} s after the end")
        return not self._failed

    def _work(self) -> None:
        assert self._connect is not None
        writer: Writer | None = None
        while (job := self._queue.get()) is not None:
            if self._failed:
                continue
            try:
                writer = self._connect() if writer is None else writer
                with _ONE_WRITER:
                    job(writer)
            except Exception as error:  # whatever it is, it must not end the work
                self._fail(in_short(error))

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._tell(reason)


def in_short(error: Exception) -> str:
    """Return an error's name and the beginning of what it says, on one line and without credentials."""
    text = redact(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:_LONGEST]}{'...' if len(text) > _LONGEST else ''}"
