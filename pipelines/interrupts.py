"""A run that is asked to end: SIGTERM from a scheduler, Ctrl-C from a person.

A first signal only sets a flag, which the run's main loop sees within a quarter of a second: trainings
save what they have and end, other stages, which begin again anyway, are left where they are. All of
it is bounded by a grace. A second signal ends the process at once, like `kill -9`, after which a run
goes on from the last regular checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from seekr.errors import SeekrError

# Kubernetes kills 30 s after it has asked.
GRACE_SECONDS = 25.0
# What closing Ray and MLflow may take beyond the grace.
_CLOSING_SECONDS = 4.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(SeekrError):
    """A run ended early because it was asked to; running again goes on. Exits like its signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupts:
    """What signals have asked of this process. A context manager; only the main thread may enter.

    Not entered it takes no signals, and nothing is ever asked. Once a run begins to stop, the process
    has to end: if it has not a little after the grace, whatever hangs, it is ended from within.

    Args:
        grace: seconds that trainings have to save.
        tell: called once, with what is going to happen, when a run begins to stop.
    """

    def __init__(
        self, grace: float = GRACE_SECONDS, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self._grace, self._tell = grace, tell
        self._number: int | None = None
        self._since = 0.0
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While in the block a signal waits to be asked for; outside it raises `Interrupted`.

        Enter it after Ray has started, which installs a handler of its own.
        """
        if self._before:
            self._listen()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @property
    def asked(self) -> bool:
        """Whether the run was asked to end."""
        return self._number is not None

    @property
    def expired(self) -> bool:
        """Whether it was, and the grace is over."""
        return self.asked and time.monotonic() - self._since > self._grace

    def announce(self, running: Sequence[str], release: Callable[[], None]) -> None:
        """Say what happens now, and see to it that it ends.

        Args:
            running: what is waited for.
            release: called before the process is ended from within, should closing take too long.
        """
        wait = (
            f"waiting up to {self._grace:g} s for {', '.join(running)} to save" if running else ""
        )
        self._tell(f"{self._name}: {wait or 'nothing has to be saved'}; once more ends at once")

        def end() -> None:
            release()
            os._exit(self._exit_code)

        timer = threading.Timer(self._grace + _CLOSING_SECONDS, end)
        timer.daemon = True
        timer.start()

    def error(self, happened: Sequence[str]) -> Interrupted:
        """Return what a run that was asked to end raises: a sentence per stage that was running."""
        assert self._number is not None
        return Interrupted(
            f"stopped by {self._name}: {'; '.join(happened) or 'no stage was running'}. Run the same "
            "command again to go on",
            self._number,
        )

    @property
    def _name(self) -> str:
        return signal.Signals(self._number or 0).name

    @property
    def _exit_code(self) -> int:
        return 128 + (self._number or 0)

    def _listen(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if sys.stderr.isatty():
                os.write(2, _SHOW_CURSOR)  # a live view hides it
            os._exit(self._exit_code)
        self._number, self._since = number, time.monotonic()
        if not self._deferred:
            raise self.error([])
