"""A cluster that is not ours, with one core: what fits runs, what would wait for ever is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipelines.session import ray_session
from pipelines.stream import open_stream, records_of, run_streams
from seekr.errors import ConfigError
from tests.pipelines.running import end_shared_cluster
from tests.pipelines.streams import make_stream

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    end_shared_cluster()
    context = ray.init(address="local", num_cpus=1, include_dashboard=True, dashboard_port=None)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def stream_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(
        tmp_path_factory.mktemp("stream"),
        tasks=1,
        method={"name": "seqft"},
        train={"workers": {"min": 1, "max": 2}},
        evaluate={"cpus": 0},
    )


@pytest.mark.slow
def test_a_training_of_one_or_two_workers_runs_on_one_core(stream_path: Path, address: str) -> None:
    stream = open_stream(stream_path, [f"ray.address={address}"], writable=True)
    run_streams([stream], lambda *_: None, warn=pytest.fail)
    assert {str(stage) for stage in records_of(stream)} == {
        "ingest/upper",
        "train/upper",
        "evaluate/upper",
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train.workers=2", "needs 2 CPUs at once and the Ray cluster has 1;"),
        ("train.workers={min: 2, max: 3}", "needs 2 CPUs at once and the Ray cluster has 1;"),
        ("train.cpus_per_worker=2", "needs 2 CPUs at once"),
        ("train.gpus_per_worker=1", "needs 1 GPUs at once and the Ray cluster has 0;"),
        ("evaluate.cpus=1", "needs 2 CPUs at once"),
        ("general={tasks: [piqa], cpus: 3}", "needs 3 CPUs at once"),
        ("teach.actors=4 & method={name: rho1}", "needs 5 CPUs at once"),
    ],
)
def test_what_can_never_be_placed_is_refused(
    stream_path: Path, address: str, change: str, told: str
) -> None:
    config = open_stream(stream_path, [f"ray.address={address}", *change.split(" & ")]).config
    with (
        pytest.raises(ConfigError, match=r"lower train\.workers") as refused,
        ray_session([config]),
    ):
        pass
    assert told in str(refused.value)
