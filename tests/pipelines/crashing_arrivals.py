"""Kills a look into an inbox with SIGKILL between every two things it does, and looks again after each.

    python -m tests.pipelines.crashing_arrivals FOLDER

FOLDER holds a stream and its inbox, of which each attempt gets a copy of its own. Every attempt is a
process: the first is killed just before its n-th step, the second goes on. Prints, per n, what the register
says then. Ends when n is beyond the last step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipelines import store as stores
from pipelines.alerts import Teller  # noqa: F401  everything a tick imports is imported once, here
from pipelines.stream import open_stream
from tests.pipelines.inboxes import Arriving, Inbox


def main(folder: Path) -> None:
    """Try every point."""
    point = 0
    while True:
        point += 1
        copy = folder.with_name(f"{folder.name}-{point}")
        shutil.copytree(folder, copy)  # with the times of the files
        killed = in_a_process(lambda copy=copy, point=point: look(copy, point))
        again = in_a_process(lambda copy=copy: look(copy, None))
        found = in_a_process(lambda copy=copy: show(copy))
        if killed not in (0, -signal.SIGKILL) or again or found:
            sys.exit(f"point {point}: {killed}, {again}, {found}")
        shutil.rmtree(copy)
        if killed == 0:
            return


def look(folder: Path, point: int | None) -> None:
    """Look into the inbox once, and be killed at the point, if there is one."""
    if point is not None:
        kill_at(point)
    stream(folder).look()


def show(folder: Path) -> None:
    """Print the register, the stream's tasks and everything that lies beside the register."""
    found = stream(folder)
    register = found.register
    kept = {entry.folder for entry in register.accepted}
    files = [f.path for f in found.store.list(register.folder) if ".lease" not in f.path]
    print(
        json.dumps(
            {
                "verdicts": found.verdicts(),
                "tasks": [
                    task.name for task in open_stream(found.path, found.changes).config.tasks
                ],
                "digests": [entry.train_digest for entry in register.entries],
                "stray": [f for f in files if "/data/" in f and f.rpartition("/")[0] not in kept],
                "temporary": [f for f in files if stores.TEMPORARY_PREFIX in f],
            }
        ),
        flush=True,
    )


def stream(folder: Path) -> Arriving:
    inbox = Inbox(str(folder / "inbox"), fs.LocalFileSystem(), str(folder / "inbox"))
    return Arriving(folder / "stream.yaml", inbox, (f"storage={folder / 'store'}",))


def kill_at(point: int) -> None:
    """Let this process be killed before the n-th step: the opening, filling and naming of a file."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def between(real: Callable[..., Any], of: Callable[..., str]) -> Callable[..., Any]:
        def stepped(*args: Any, **options: Any) -> Any:
            counts = "/arrivals/" in of(*args)
            if counts:
                step()
            found = real(*args, **options)
            if counts:
                step()
            return found

        return stepped

    os.replace = between(os.replace, lambda source, target: str(target))
    stores.copy_hashed = between(
        stores.copy_hashed, lambda source, sink: str(getattr(sink, "name", ""))
    )


def in_a_process(work: Callable[[], None]) -> int:
    """Do it in a fork of this process; returns its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
