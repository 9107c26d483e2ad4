"""What `kill -9` must not change: the final weights to the bit, and what was finished before it.

Every run is a process of its own with a local Ray of its own, as a scheduler would start it. Drivers,
training workers and scoring actors are killed at random moments of a stream that checkpoints often.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.pipelines.streams import make_stream

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]
DRIVER_KILLS, WORKER_KILLS, SCORER_KILLS = 6, 4, 2
SLOW_TRAINING = {"epochs": 60, "checkpoint_every": 20, "max_failures": 10}
RUN_SECONDS = 400


@pytest.fixture(scope="module")
def stream_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    return make_stream(folder, train=SLOW_TRAINING, replay={"ratio": 0.5})


@dataclass(slots=True)
class Run:
    """One `seekr run` in a process group of its own."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, path: Path, storage: Path) -> Run:
        command = [sys.executable, "-m", "pipelines.cli", "run", str(path)]
        command += ["--set", f"storage={storage}"]
        log = (storage.parent / f"{storage.name}.log").open("a")
        return cls(
            subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True)
        )

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> int:
        return self.process.wait(timeout=RUN_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        # Ray's processes go with the driver; the next run must not meet them.
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


def digests(storage: Path) -> dict[str, str]:
    """Of every final model's weights, by stage key."""
    return {
        str(path.parent.parent.relative_to(storage)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(storage.glob("train/*/*/model/model.safetensors"))
    }


def finished(storage: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in storage.glob("*/*/*/record.json")}


@pytest.fixture(scope="module")
def undisturbed(stream_path: Path) -> Path:
    storage = stream_path.parent / "undisturbed"
    assert Run.start(stream_path, storage).wait() == 0
    assert len(digests(storage)) == 2
    return storage


def wait_for(run: Run, titles: Sequence[str]) -> psutil.Process | None:
    """Return a process of the run with one of the titles, or None if the run ends first."""
    while run.running():
        for title in titles:
            if found := run.children(title):
                return random.choice(found)
        time.sleep(0.05)
    return None


def test_a_stream_whose_driver_is_killed_again_and_again_ends_with_the_same_bits(
    stream_path: Path, undisturbed: Path
) -> None:
    storage = stream_path.parent / "drivers"
    draw = random.Random(7)
    kills, untouched = 0, {}
    while kills < DRIVER_KILLS:
        run = Run.start(stream_path, storage)
        if kills % 2:
            # Every other time, in the middle of a training.
            wait_for(run, ["ray::RayTrainWorker"])
            time.sleep(draw.uniform(3.0, 12.0))
        else:
            time.sleep(draw.uniform(8.0, 25.0))
        if not run.running():
            break
        run.kill()
        kills += 1
        now = finished(storage)
        assert untouched.items() <= now.items(), "a finished stage was computed again"
        untouched = now
    assert Run.start(stream_path, storage).wait() == 0
    assert untouched.items() <= finished(storage).items()
    assert digests(storage) == digests(undisturbed)
    assert kills == DRIVER_KILLS, f"the stream ended after {kills} kills: make it longer"


def test_killed_training_workers_and_scoring_actors_are_replaced_with_the_same_bits(
    stream_path: Path, undisturbed: Path
) -> None:
    storage = stream_path.parent / "workers"
    draw = random.Random(11)
    run = Run.start(stream_path, storage)
    wanted = {"ray::RayTrainWorker": WORKER_KILLS, "ray::ScorerHost": SCORER_KILLS}
    killed = dict.fromkeys(wanted, 0)
    while run.running() and killed != wanted:
        titles = [title for title, count in wanted.items() if killed[title] < count]
        victim = wait_for(run, titles)
        if victim is None:
            break
        try:
            title = next(t for t in titles if t in " ".join(victim.cmdline()))
            time.sleep(draw.uniform(0.0, 2.0 if "Scorer" in title else 6.0))
            victim.kill()
        except (psutil.Error, StopIteration):
            continue
        killed[title] += 1
        time.sleep(0.5)
    assert run.wait() == 0, (storage.parent / "workers.log").read_text()[-3000:]
    assert digests(storage) == digests(undisturbed)
    assert killed["ray::RayTrainWorker"] == WORKER_KILLS
    assert killed["ray::ScorerHost"] >= 1


def test_two_runs_at_once_compute_nothing_twice(stream_path: Path, undisturbed: Path) -> None:
    storage = stream_path.parent / "both"
    first, second = Run.start(stream_path, storage), Run.start(stream_path, storage)
    assert (first.wait(), second.wait()) == (0, 0)
    assert digests(storage) == digests(undisturbed)
    log = (storage.parent / "both.log").read_text()
    for path in finished(storage):
        stage = "/".join(path.parts[-4:-2])
        ran = [line for line in log.splitlines() if " ran " in line and f" {stage} " in line]
        assert len(ran) == 1, f"{stage} was computed {len(ran)} times"


def test_the_same_stream_on_an_object_store_ends_with_the_same_bits(
    stream_path: Path, undisturbed: Path
) -> None:
    from tests.pipelines.s3_server import s3_server

    with s3_server() as server:
        uri = server.uri("stream")
        command = [sys.executable, "-m", "pipelines.cli", "run", str(stream_path)]
        done = subprocess.run(
            [*command, "--set", f"storage={uri}"],
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        from pipelines.store import Store

        store = Store.open(uri)
        for key, digest in digests(undisturbed).items():
            assert store.digest(f"{key}/model/model.safetensors") == digest
