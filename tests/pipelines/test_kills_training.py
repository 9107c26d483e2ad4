"""Kills in the middle of sharded trainings: workers, nodes, the driver asked to end. The bits stay.

`seekr run` is a process of its own; two workers train under FSDP2 and under ZeRO-3 with a checkpoint
every few steps. Kills come at random moments after new steps have been saved, so every one costs
something. A training that ends with as many workers as it began with has the weights of one that was
never disturbed, to the bit. One that had fewer for a while has added numbers up in another order: no
weight may differ by more than `MOVED`.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster
from safetensors.numpy import load_file

from tests.pipelines.running import (
    Run,
    digests,
    newest_checkpoint,
    wait_for,
    wait_for_steps,
)
from tests.pipelines.streams import make_stream

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]
STEPS = 120
WORKER_KILLS, STOPS, NODE_KILLS = 5, 3, 2
# Updates of AdamW are up to the learning rate, 1e-4 here. Sums in another order make rounding errors
# that such updates enlarge where a gradient is near 0.
MOVED = 5e-4
STRATEGIES = ("fsdp", "deepspeed")
KILLS: Counter[str] = Counter()
LAST_LINE = "Run the same command again to go on"


@pytest.fixture(scope="module")
def stream_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task whose training has 120 steps of eight passes, and a checkpoint every four of them."""
    return make_stream(
        tmp_path_factory.mktemp("kills"),
        tasks=1,
        method={"name": "seqft"},
        train={
            "epochs": STEPS // 5,
            "micro_batch_size": 1,
            "learning_rate": 1e-4,
            "workers": 2,
            "checkpoint_every": 4,
            "max_failures": 20,
        },
        evaluate={"cpus": 0},
    )


@pytest.fixture
def start(stream_path: Path) -> Iterator[Callable[..., Run]]:
    """Return what starts a run, and see to it that none is left."""
    runs: list[Run] = []

    def start(storage: Path, *changes: str) -> Run:
        runs.append(Run.start(stream_path, storage, *changes))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


@pytest.fixture(scope="module")
def undisturbed(stream_path: Path) -> Callable[[str], Path]:
    """Return what gives the storage of a run under a strategy that nobody disturbed."""

    @functools.cache
    def storage(strategy: str) -> Path:
        found = stream_path.parent / f"undisturbed-{strategy}"
        run = Run.start(stream_path, found, f"train.strategy={strategy}")
        assert run.wait() == 0, run.said()[-3000:]
        assert len(digests(found)) == 1
        return found

    return storage


def weights(storage: Path) -> dict[str, Any]:
    (path,) = storage.glob("train/*/*/model/model.safetensors")
    return load_file(path)


def largest_difference(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float(abs(ours[name] - theirs[name]).max()) for name in ours)


def assert_finished(run: Run, storage: Path) -> None:
    assert run.wait() == 0, run.said()[-4000:]
    assert not list(storage.glob("train/*/*/checkpoints/*")), "checkpoints are left"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_workers_are_replaced_and_the_weights_are_the_same_to_the_bit(
    start: Callable[..., Run], undisturbed: Callable[[str], Path], tmp_path: Path, strategy: str
) -> None:
    draw, storage = random.Random(5), tmp_path / "store"
    run = start(storage, f"train.strategy={strategy}")
    seen = 0
    for _ in range(WORKER_KILLS):
        assert wait_for_steps(run, storage, beyond=seen), run.said()[-4000:]
        time.sleep(draw.uniform(0.0, 1.5))
        victim = wait_for(run, ["ray::RayTrainWorker"])
        assert victim is not None, "the training ended before all kills: give it more steps"
        victim.kill()
        KILLS[f"worker, {strategy}"] += 1
        seen = newest_checkpoint(storage)
        victim.wait(30)
    assert_finished(run, storage)
    assert digests(storage) == digests(undisturbed(strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_that_is_asked_to_end_saves_and_goes_on_to_the_same_bits(
    start: Callable[..., Run],
    undisturbed: Callable[[str], Path],
    stream_path: Path,
    tmp_path: Path,
    strategy: str,
) -> None:
    draw, storage = random.Random(6), tmp_path / "store"
    changes, saved = (f"train.strategy={strategy}",), 0
    for number in range(STOPS):
        run = start(storage, *changes)
        assert wait_for_steps(run, storage, beyond=saved), run.said()[-4000:]
        time.sleep(draw.uniform(0.0, 1.5))
        by_hand = number == 1  # Ctrl-C, which a terminal sends to all processes
        asked = time.monotonic()
        code = run.signal(signal.SIGINT if by_hand else signal.SIGTERM, to_all=by_hand)
        assert code == (130 if by_hand else 143), run.said()[-4000:]
        assert time.monotonic() - asked < 40
        KILLS[f"driver, {strategy}"] += 1
        last = run.said().strip().splitlines()[-1]
        assert LAST_LINE in last and f"of {STEPS}" in last, last
        said = int(last.partition("saved after step ")[2].split()[0])
        assert newest_checkpoint(storage) == said > saved
        saved = said
        assert status(stream_path, storage)["train"] == "interrupted"
        assert not list(storage.glob("*/*/*/.lease/claim-*")), "a lease is left"
        assert not list(storage.glob("train/*/*/failure.json"))
    run = start(storage, *changes)
    assert_finished(run, storage)
    assert digests(storage) == digests(undisturbed(strategy))


def status(path: Path, storage: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "pipelines.cli", "status", str(path), "--json"]
    done = subprocess.run(
        [*command, "--set", f"storage={storage}"], capture_output=True, text=True, check=True
    )
    return {stage["name"]: stage["state"] for stage in json.loads(done.stdout)["stages"]}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head and a node of one core each."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder  # where nobody else looks for a cluster
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0}
    started = Cluster(initialize_head=True, head_node_args=head)
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()
    if before is None:
        del os.environ["RAY_TMPDIR"]
    else:
        os.environ["RAY_TMPDIR"] = before
    shutil.rmtree(folder, ignore_errors=True)


def kill_node(cluster: Cluster, node: Any = None) -> None:
    """`kill -9` of the raylet of a node, else of the only one but the head; its workers end too."""
    node = node or next(iter(cluster.worker_nodes))
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    raylet.kill()
    cluster.remove_node(node, allow_graceful=False)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lost_node_that_comes_back_changes_no_bit(
    start: Callable[..., Run],
    undisturbed: Callable[[str], Path],
    cluster: Cluster,
    tmp_path: Path,
    strategy: str,
) -> None:
    draw, storage = random.Random(7), tmp_path / "store"
    run = start(storage, f"train.strategy={strategy}", f"ray.address={cluster.address}")
    seen = 0
    for _ in range(NODE_KILLS):
        assert wait_for_steps(run, storage, beyond=seen), run.said()[-4000:]
        time.sleep(draw.uniform(0.0, 1.5))
        assert run.running(), "the training ended before all kills: give it more steps"
        kill_node(cluster)
        KILLS[f"node, {strategy}"] += 1
        seen = newest_checkpoint(storage)
        time.sleep(draw.uniform(0.0, 4.0))
        cluster.add_node(num_cpus=1)
    assert_finished(run, storage)
    assert digests(storage) == digests(undisturbed(strategy))


def test_a_training_that_had_fewer_workers_for_a_while_agrees_within_rounding(
    start: Callable[..., Run], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    storage, saved = tmp_path / "store", 0
    for strategy, workers in (("fsdp", 2), ("deepspeed", 1)):
        run = start(storage, f"train.strategy={strategy}", f"train.workers={workers}")
        assert wait_for_steps(run, storage, beyond=saved), run.said()[-4000:]
        assert run.signal(signal.SIGTERM) == 143
        KILLS["driver, workers change"] += 1
        saved = newest_checkpoint(storage)
        assert 0 < saved < STEPS
    assert_finished(start(storage, "train.strategy=fsdp", "train.workers=2"), storage)
    moved = largest_difference(storage, undisturbed("fsdp"))
    print(f"largest difference of a weight after 2 -> 1 -> 2 workers: {moved:.2e}")
    assert 0.0 <= moved < MOVED


def test_an_elastic_training_goes_on_with_the_node_that_is_left(
    start: Callable[..., Run], undisturbed: Callable[[str], Path], cluster: Cluster, tmp_path: Path
) -> None:
    storage = tmp_path / "store"
    elastic = ("train.strategy=fsdp", "train.workers={min: 1, max: 2}")
    run = start(storage, *elastic, f"ray.address={cluster.address}")
    assert wait_for_steps(run, storage, beyond=8), run.said()[-4000:]
    kill_node(cluster)
    KILLS["node, elastic"] += 1
    assert_finished(run, storage)
    moved = largest_difference(storage, undisturbed("fsdp"))
    print(f"largest difference of a weight after 2 -> 1 workers: {moved:.2e}")
    assert 0.0 <= moved < MOVED


def test_a_node_that_is_announced_to_go_is_saved_for_and_no_failure(
    start: Callable[..., Run], cluster: Cluster, tmp_path: Path
) -> None:
    storage, deadline = tmp_path / "store", 30
    longer = ("train.strategy=fsdp", f"train.epochs={STEPS}")
    whole = start(tmp_path / "whole", *longer)
    assert_finished(whole, tmp_path / "whole")
    # The only checkpoint is the one that is saved because of the notice.
    seldom = ("train.checkpoint_every=10000", "train.max_failures=0")
    run = start(storage, *longer, *seldom, f"ray.address={cluster.address}")
    wait_for_training(run)
    (node,) = cluster.worker_nodes
    drain(cluster, node.node_id, deadline)
    announced = time.monotonic()
    assert wait_for_steps(run, storage, beyond=0), run.said()[-4000:]
    cluster.add_node(num_cpus=1)
    time.sleep(max(0.0, deadline - (time.monotonic() - announced)))
    assert run.running(), "the training ended before the node did: give it more steps"
    kill_node(cluster, node)
    KILLS["node, announced"] += 1
    assert_finished(run, storage)
    assert digests(storage) == digests(tmp_path / "whole")


def drain(cluster: Cluster, node_id: str, deadline: int) -> None:
    """Announce that a node will be taken away, as autoscalers do for spot machines."""
    command = [str(Path(sys.executable).parent / "ray"), "drain-node"]
    command += ["--address", str(cluster.address), "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
    command += ["--deadline-remaining-seconds", str(deadline)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def wait_for_training(run: Run) -> None:
    """Wait until steps are taken, which a run says every 15 seconds."""
    while "step " not in run.said():
        assert run.running(), run.said()[-4000:]
        time.sleep(0.2)


def test_a_second_signal_ends_at_once_and_nothing_that_was_saved_is_lost(
    start: Callable[..., Run], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    storage = tmp_path / "store"
    run = start(storage, "train.strategy=fsdp")
    assert wait_for_steps(run, storage, beyond=0), run.said()[-4000:]
    run.process.send_signal(signal.SIGTERM)
    while "once more ends at once" not in run.said():  # two at the same moment would be one
        time.sleep(0.02)
    run.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert run.wait() == 143
    assert time.monotonic() - asked < 5
    KILLS["driver, twice"] += 1
    run.wait_for_children()
    assert newest_checkpoint(storage) > 0
    assert_finished(start(storage, "train.strategy=fsdp"), storage)
    assert digests(storage) == digests(undisturbed("fsdp"))


def test_there_were_enough_kills() -> None:
    print(dict(KILLS))
    assert sum(KILLS.values()) >= 20, f"run the whole file: {dict(KILLS)}"
