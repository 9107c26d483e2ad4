"""A stream on three hosts that share nothing but a network and an S3 store: what a cable that is pulled, or
a head that is switched off, must not change.

Two training workers, on two hosts; one host more than they need, so the others go on without one that is
gone. Final weights are compared with those of a run on this machine alone, to the bit.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, Network, Process, require, wait_until
from tests.cluster.ray_hosts import RUN_SECONDS, SLOW_DASHBOARD, RayHosts, StoreHost
from tests.pipelines.running import Run, digests
from tests.pipelines.streams import make_stream, write_task

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(5400)]
TASKS = ("upper", "reverse")
TRAINER, SCORER = "ray::RayTrainWorker", "ray::ScoreHost"
ROWS, EPOCHS = 48, 12


@pytest.fixture(scope="module", autouse=True)
def needed() -> None:
    require()


@pytest.fixture(scope="module")
def stream_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings of 72 steps with a checkpoint every 4, and a scoring that takes its rows one by one."""
    path = make_stream(
        tmp_path_factory.mktemp("stream"),
        train={
            "epochs": EPOCHS,
            "micro_batch_size": 2,
            "workers": 2,
            "cpus_per_worker": 2,
            "checkpoint_every": 4,
        },
        replay={"ratio": 1.0},
        score={"actors": 2, "batch_size": 1},
        ray=None,
    )
    for task in TASKS:
        write_task(path.parent / "data" / task, task, train=ROWS)
    return path


@pytest.fixture(scope="module")
def alone(stream_path: Path) -> dict[str, str]:
    """The weights of a run on this machine, by stage key."""
    storage = stream_path.parent / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*SLOW_DASHBOARD)
        _run_alone(stream_path, storage)
    found = digests(storage)
    assert len(found) == len(TASKS)
    return found


def _run_alone(stream_path: Path, storage: Path) -> None:
    for _ in range(3):  # a machine that is too busy may lose its own Ray; running again goes on
        run = Run.start(stream_path, storage)
        try:
            if run.process.wait(RUN_SECONDS) == 0:
                break
        finally:
            run.end()
    else:
        pytest.fail(run.said()[-4000:])


@pytest.fixture(scope="module")
def network(alone: dict[str, str]) -> Iterator[Network]:
    """Made when nothing else runs: hosts that wait cost cores too."""
    with Network() as network:
        yield network


@pytest.fixture(scope="module")
def store(network: Network) -> StoreHost:
    return StoreHost.start(network, 2)


@pytest.fixture(scope="module")
def cluster(network: Network, store: StoreHost, stream_path: Path) -> RayHosts:
    cluster = RayHosts(network, 3)
    for host in cluster.hosts:
        for name in ("stream.yaml", "model", "data"):
            source = stream_path.parent / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, host.folder / name)
    return cluster


def start(cluster: RayHosts, store: StoreHost, prefix: str) -> Process:
    return cluster.run("stream.yaml", f"storage={store.at(prefix)}", log=f"{prefix}.log")


def ended_well(run: Process) -> None:
    assert run.wait(RUN_SECONDS) == 0, run.said()[-6000:]


def times_computed(run: Process) -> dict[str, int]:
    """How often each stage was computed, by what all runs with the log have said."""
    names = re.findall(r"\] ran +(\S+) ", run.said())
    return {name: names.count(name) for name in names}


def training(store: StoreHost, prefix: str, task: str, beyond: int = 0) -> bool:
    return store.newest_checkpoint(prefix, task) > beyond


def is_finished(store: StoreHost, prefix: str, stage: str) -> bool:
    return any(key.startswith(f"{stage}/") for key in store.finished(prefix))


def one_but_the_head(cluster: RayHosts, title: str) -> Host:
    found = [host for host in cluster.with_process(title) if host is not cluster.head]
    assert found, f"{title} runs on the head alone"
    return found[-1]


def test_three_hosts_end_with_the_bits_of_one(
    cluster: RayHosts, store: StoreHost, alone: dict[str, str]
) -> None:
    begun = time.monotonic()
    run = start(cluster, store, "whole")
    wait_until("a checkpoint", lambda: training(store, "whole", "upper"), RUN_SECONDS, every=0.5)
    assert len(cluster.with_process(TRAINER)) == 2, "both workers are on one host"
    ended_well(run)
    print(f"undisturbed: {time.monotonic() - begun:.0f} s")
    assert store.digests("whole") == alone
    assert set(times_computed(run).values()) == {1}


def test_a_host_that_is_cut_off_while_it_trains_and_while_it_scores_changes_no_bit(
    cluster: RayHosts, network: Network, store: StoreHost, alone: dict[str, str]
) -> None:
    begun = time.monotonic()
    run = start(cluster, store, "cut")
    wait_until("a training", lambda: training(store, "cut", "upper", 8), RUN_SECONDS, every=0.5)
    lost = one_but_the_head(cluster, TRAINER)
    network.cut(lost)
    saved, cut = store.newest_checkpoint("cut", "upper"), time.monotonic()
    left = [host for host in cluster.hosts if host is not lost]
    print(f"cut while it trains: noticed after {cluster.wait_for(*left):.1f} s")
    wait_until(
        "steps without it",
        lambda: training(store, "cut", "upper", saved) or is_finished(store, "cut", "train/upper"),
        RUN_SECONDS,
        every=0.5,
    )
    print(f"new steps were saved without it after {time.monotonic() - cut:.1f} s")
    assert run.running()
    network.mend(lost)
    print(f"back in the cluster after {cluster.wait_for(*cluster.hosts):.1f} s")

    wait_until("a scoring", lambda: cluster.with_process(SCORER), RUN_SECONDS)
    wait_until("another host", lambda: len(cluster.with_process(SCORER)) == 2, 60)
    lost = one_but_the_head(cluster, SCORER)
    time.sleep(2)  # its models are being opened, or it has begun
    assert cluster.with_process(SCORER), "the scoring ended before the cut: give it more rows"
    network.cut(lost)
    cut, scored = time.monotonic(), len(store.finished("cut"))
    assert not is_finished(store, "cut", "score/upper")
    left = [host for host in cluster.hosts if host is not lost]
    print(f"cut while it scores: noticed after {cluster.wait_for(*left):.1f} s")
    wait_until(
        "the scores", lambda: is_finished(store, "cut", "score/upper"), RUN_SECONDS, every=0.5
    )
    print(f"its rows were scored without it after {time.monotonic() - cut:.1f} s, {scored}")
    network.mend(lost)
    cluster.wait_for(*cluster.hosts)
    ended_well(run)
    print(f"cut twice: {time.monotonic() - begun:.0f} s")
    assert store.digests("cut") == alone
    assert set(times_computed(run).values()) == {1}


def test_a_head_that_is_switched_off_and_another_in_its_place_compute_nothing_twice(
    cluster: RayHosts, store: StoreHost, alone: dict[str, str]
) -> None:
    run = start(cluster, store, "head")
    wait_until("training", lambda: training(store, "head", "reverse", 8), RUN_SECONDS, every=0.5)
    before = store.finished("head")
    assert any(key.startswith("train/upper/") for key in before)
    off = time.monotonic()
    cluster.lose_head()
    assert not run.running()
    cluster.wait_for(*cluster.hosts)
    print(f"a cluster again after {time.monotonic() - off:.1f} s")
    saved = store.newest_checkpoint("head", "reverse")
    run = start(cluster, store, "head")
    wait_until(
        "steps beyond those of the head that is gone",
        lambda: training(store, "head", "reverse", saved) or not run.running(),
        RUN_SECONDS,
        every=0.5,
    )
    print(f"new steps were saved after {time.monotonic() - off:.1f} s")
    ended_well(run)
    assert before.items() <= store.finished("head").items(), "a finished stage was computed again"
    assert store.digests("head") == alone
    counts = times_computed(run)
    assert set(counts.values()) == {1}
    assert {key.rpartition("/")[0] for key in store.finished("head")} == set(counts)
