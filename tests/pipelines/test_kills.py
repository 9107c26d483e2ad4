"""What `kill -9` must not change: the final weights to the bit, and what was finished before it.

Every run is a process of its own with a local Ray of its own, as a scheduler would start it. Drivers,
training workers and scoring actors are killed at random moments of a stream that checkpoints often.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.pipelines.running import RUN_SECONDS, Run, digests, finished, wait_for
from tests.pipelines.streams import make_stream

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]
DRIVER_KILLS, WORKER_KILLS, SCORER_KILLS = 6, 4, 2
SLOW_TRAINING = {"epochs": 60, "checkpoint_every": 20, "max_failures": 10}


@pytest.fixture(scope="module")
def stream_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    return make_stream(folder, train=SLOW_TRAINING, replay={"ratio": 0.5})


@pytest.fixture(scope="module")
def undisturbed(stream_path: Path) -> Path:
    storage = stream_path.parent / "undisturbed"
    assert Run.start(stream_path, storage).wait() == 0
    assert len(digests(storage)) == 2
    return storage


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
    wanted = {"ray::RayTrainWorker": WORKER_KILLS, "ray::ScoreHost": SCORER_KILLS}
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
    assert killed["ray::ScoreHost"] >= 1


@pytest.mark.parametrize("title", ["ray::ScoreHost", "ray::EvaluateHost"])
def test_a_run_that_is_asked_to_end_waits_for_nothing_that_begins_again(
    stream_path: Path, undisturbed: Path, title: str
) -> None:
    storage = stream_path.parent / f"asked-{title[5:]}"
    # What is before the stage is taken from the run that was not disturbed.
    shutil.copytree(undisturbed, storage)
    for stage in ("score", "select", "teach", "evaluate"):
        shutil.rmtree(storage / stage)
    run = Run.start(stream_path, storage)
    assert wait_for(run, [title]) is not None, run.said()
    asked = time.monotonic()
    assert run.signal(signal.SIGTERM) == 143, run.said()
    assert time.monotonic() - asked < 20
    last = run.said().strip().splitlines()[-1]
    assert "was left, it begins again. Run the same command again to go on" in last
    assert not list(storage.glob("*/*/*/failure.json"))
    assert not list(storage.glob("*/*/*/.lease/claim-*")), "a lease is left"
    assert Run.start(stream_path, storage).wait() == 0
    assert digests(storage) == digests(undisturbed)


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
