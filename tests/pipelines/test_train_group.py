"""Groups of training workers: kept for the next stage where that costs nobody anything, else ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.session import ray_session
from pipelines.stream import open_stream, run_streams
from pipelines.train_config import TrainConfig
from pipelines.train_group import Shape
from tests.pipelines.running import end_shared_cluster, workers_started
from tests.pipelines.streams import make_stream

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("stream"), tasks=3, method={"name": "seqft"})


@pytest.fixture(scope="module")
def cluster(path: Path) -> Iterator[None]:
    end_shared_cluster()
    with ray_session([open_stream(path, ["train.workers=2"]).config]):
        yield


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("short"), tasks=1, method={"name": "seqft"})


def run(path: Path, *changes: str) -> dict[str, bytes]:
    stream = open_stream(path, changes, writable=True)
    run_streams([stream], lambda *_: None, warn=pytest.fail)
    root = Path(stream.store.full_path("train"))
    return {
        str(file.parent.parent.parent.name): file.read_bytes()
        for file in sorted(root.glob("*/*/model/model.safetensors"))
    }


def test_all_tasks_of_a_local_stream_are_learnt_by_one_group(
    path: Path, cluster: None, tmp_path: Path
) -> None:
    together = run(path, f"storage={tmp_path / 'a'}")
    before = workers_started()
    again = run(path, f"storage={tmp_path / 'b'}")
    assert workers_started() == before == 1
    assert len(together) == 3 and again == together


@pytest.mark.slow
def test_another_shape_gets_another_group_and_the_same_weights(
    short: Path, cluster: None, tmp_path: Path
) -> None:
    first = run(short, f"storage={tmp_path / 'a'}", "train.max_failures=1")
    before = workers_started()
    second = run(short, f"storage={tmp_path / 'b'}", "train.max_failures=2")
    assert workers_started() == before + 1 and second == first


@pytest.mark.slow
def test_a_group_that_may_change_its_size_is_made_for_one_stage(
    short: Path, cluster: None, tmp_path: Path
) -> None:
    before = workers_started()
    run(short, f"storage={tmp_path / 'a'}", "train.workers={min: 1, max: 2}")
    middle = workers_started()
    run(short, f"storage={tmp_path / 'b'}", "train.workers={min: 1, max: 2}")
    assert before < middle < workers_started()


def test_a_shape_is_what_a_group_is_started_with() -> None:
    same = {"epochs": 3, "learning_rate": 0.1, "checkpoint_every": 7, "micro_batch_size": 2}
    assert Shape.of(TrainConfig(**same)) == Shape.of(TrainConfig())
    for other in (
        {"workers": 2},
        {"cpus_per_worker": 2},
        {"max_failures": 1},
        {"strategy": "fsdp"},
    ):
        assert Shape.of(TrainConfig(**other)) != Shape.of(TrainConfig())
