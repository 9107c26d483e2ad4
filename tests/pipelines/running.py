"""`seekr run` in a process of its own, as a scheduler would start it, for tests that kill it; and
streams that run in this process to their end."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.state import list_actors

from pipelines.artifact import Artifact
from pipelines.session import ray_session
from pipelines.stage import find
from pipelines.stream import open_stream, run_streams

RUN_SECONDS = 1200


def workers_started() -> int:
    """Return how many training workers the cluster of this process has ever started."""
    actors: list[Any] = list_actors(ray.get_runtime_context().gcs_address, limit=10_000)
    return sum(actor.class_name.startswith("RayTrainWorker") for actor in actors)


Find = Callable[[str], Artifact]
# Enough for any stream of the tests.
_SHARED_CPUS = 12
_shared: list[ExitStack] = []


def shared_cluster(path: Path) -> None:
    """Let streams of this process run on one cluster: a fresh one takes half a minute of a core.

    Args:
        path: any stream; what it says of the cluster but its size holds.
    """
    if not _shared:
        stack = ExitStack()
        config = open_stream(path, [f"ray.num_cpus={_SHARED_CPUS}"]).config
        stack.enter_context(ray_session([config]))
        _shared.append(stack)


def end_shared_cluster() -> None:
    """End it, for tests that want one of their own; nothing if there is none."""
    while _shared:
        _shared.pop().close()
    ray.shutdown()


def run_to_end(path: Path, *changes: str) -> Find:
    """Run a stream without any warning, on the shared cluster; returns a function from a stage's name to
    its artifact."""
    shared_cluster(path)
    stream = open_stream(path, changes, writable=True)
    run_streams([stream], lambda *_: None, warn=pytest.fail)
    records = {str(stage): find(stream.store, stage) for stage in stream.stages}

    def found(name: str) -> Artifact:
        record = records[name]
        assert record is not None
        return Artifact(store=stream.store, record=record)

    return found


@dataclass(slots=True)
class Run:
    """One `seekr run` in a session of its own; what it says is added to the log beside its storage."""

    process: subprocess.Popen[str]
    log: Path

    @classmethod
    def start(cls, path: Path, storage: Path, *changes: str) -> Run:
        command = [sys.executable, "-m", "pipelines.cli", "run", str(path)]
        for change in (f"storage={storage}", *changes):
            command += ["--set", change]
        log = storage.parent / f"{storage.name}.log"
        with log.open("a") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, text=True, start_new_session=True
            )
        return cls(process, log)

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> int:
        return self.process.wait(timeout=RUN_SECONDS)

    def said(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.wait_for_children()

    def signal(self, number: int, *, to_all: bool = False) -> int:
        """Send a signal, as a terminal does to all processes if so; returns the exit code."""
        if to_all:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        code = self.wait()
        self.wait_for_children()
        return code

    def wait_for_children(self) -> None:
        """Wait until Ray's processes, which go with the driver, are gone: the next run must not
        meet them."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.children():
            time.sleep(0.2)

    def children(self, title: str = "") -> list[psutil.Process]:
        """Processes of the run's session whose title begins like that."""
        found = []
        for process in psutil.process_iter():
            try:
                same = os.getsid(process.pid) == self.process.pid
                if same and title in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.Error, ProcessLookupError):
                continue
        return found

    def end(self) -> None:
        """See that nothing of it is left when a test has failed."""
        if self.running():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def digests(storage: Path) -> dict[str, str]:
    """Of every final model's weights, by stage key."""
    return {
        str(path.parent.parent.relative_to(storage)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(storage.glob("train/*/*/model/model.safetensors"))
    }


def finished(storage: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in storage.glob("*/*/*/record.json")}


def newest_checkpoint(storage: Path) -> int:
    """Steps done in the newest checkpoint of a training that runs, 0 if there is none."""
    folders = storage.glob("train/*/*/checkpoints/step-*")
    return max((int(folder.name.split("-")[1]) for folder in folders), default=0)


def wait_for(run: Run, titles: Sequence[str]) -> psutil.Process | None:
    """Return a process of the run with one of the titles, or None if the run ends first."""
    while run.running():
        for title in titles:
            if found := run.children(title):
                return random.choice(found)
        time.sleep(0.05)
    return None


def wait_for_steps(run: Run, storage: Path, beyond: int) -> bool:
    """Wait for a checkpoint beyond a step; returns whether there is one before the run ends."""
    while run.running():
        if newest_checkpoint(storage) > beyond:
            return True
        time.sleep(0.05)
    return False
