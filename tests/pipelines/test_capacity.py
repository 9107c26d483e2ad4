"""A cluster that becomes too small while stages run: said at once, waited for, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from pipelines.capacity import Capacity, ClusterTooSmall, needed_by
from pipelines.config import StreamConfig
from pipelines.session import needed_at_once
from pipelines.stage import Stage
from pipelines.stream import open_stream
from tests.pipelines.streams import make_stream


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StreamConfig:
    path = make_stream(
        tmp_path_factory.mktemp("stream"),
        train={"workers": {"min": 2, "max": 8}, "cpus_per_worker": 3},
        score={"actors": 3, "cpus": 2},
        evaluate={"actors": 2, "cpus": 0.5},
    )
    return open_stream(path).config


class Cluster:
    """What a cluster would answer; None does not."""

    def __init__(self, **has: float) -> None:
        self.has: Mapping[str, float] | None = has
        self.asked = 0

    def __call__(self) -> Mapping[str, float]:
        self.asked += 1
        if self.has is None:
            raise ConnectionError("no head")
        return self.has


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.capacity._ASK_SECONDS", 0.01)
    monkeypatch.setattr("pipelines.capacity._SILENT_SECONDS", 0.1)


def after_an_answer(cluster: Cluster) -> None:
    """Wait until what the cluster says now is known."""
    asked = cluster.asked
    while cluster.asked < asked + 3:
        time.sleep(0.005)


def running(config: StreamConfig, *names: str) -> dict[Stage, StreamConfig]:
    return {Stage(name=name, task="a"): config for name in names}


def test_what_stages_need_is_at_most_what_a_stream_needs_at_once(config: StreamConfig) -> None:
    at_once = needed_at_once(config)
    found = {name: needed_by(name, config) for name in ("train", "score", "evaluate", "ingest")}
    assert found["train"] == {"CPU": 6, "GPU": 0}
    assert found["score"] == {"CPU": 7, "GPU": 0}
    assert found["evaluate"] == {"CPU": 2, "GPU": 0}
    assert found["ingest"] == {"CPU": 1}
    for needed in found.values():
        assert all(amount <= at_once[name] for name, amount in needed.items())
    assert max(needed["CPU"] for needed in found.values()) == at_once["CPU"]


def test_a_loss_is_told_once_and_so_is_its_end(config: StreamConfig) -> None:
    told: list[str] = []
    cluster = Cluster(CPU=8)
    with Capacity(60, told.append, cluster) as capacity:
        after_an_answer(cluster)
        capacity.check(running(config, "score", "evaluate"))
        assert told == []
        cluster.has = {"CPU": 4}
        after_an_answer(cluster)
        for _ in range(3):
            capacity.check(running(config, "score", "evaluate"))
        assert told == [
            "the Ray cluster has 4 CPUs and score/a needs 7: waiting up to 60 s (ray.patience) for it"
        ]
        cluster.has = {"CPU": 7}
        after_an_answer(cluster)
        capacity.check(running(config, "score", "evaluate"))
        assert told[1:] == ["the Ray cluster has what running stages need again"]


def test_a_loss_that_hurts_no_running_stage_is_not_told(config: StreamConfig) -> None:
    cluster = Cluster(CPU=2)
    with Capacity(0, pytest.fail, cluster) as capacity:
        after_an_answer(cluster)
        capacity.check(running(config, "evaluate", "select"))
        capacity.check({})


def test_a_loss_that_lasts_ends_the_run_with_a_sentence(config: StreamConfig) -> None:
    cluster = Cluster(CPU=6, GPU=0)
    with Capacity(0.05, lambda _: None, cluster) as capacity:
        after_an_answer(cluster)
        capacity.check(running(config, "score"))
        time.sleep(0.06)
        with pytest.raises(ClusterTooSmall) as refused:
            capacity.check(running(config, "score"))
    text = str(refused.value)
    assert text.startswith(
        "the Ray cluster has 6 CPUs and score/a needs 7, and that has not changed"
    )
    assert "for 0.05 s (ray.patience)" in text and "Run the same command again" in text


def test_a_head_that_does_not_answer_is_told_and_waited_for(config: StreamConfig) -> None:
    told: list[str] = []
    cluster = Cluster(CPU=8)
    with Capacity(0.05, told.append, cluster) as capacity:
        after_an_answer(cluster)
        cluster.has = None
        capacity.check(running(config, "score"))
        time.sleep(0.2)
        capacity.check(running(config, "score"))
        assert told and told[0].startswith("the Ray cluster's head does not answer: waiting up to")
        time.sleep(0.06)
        with pytest.raises(ClusterTooSmall, match="head does not answer, and that has not changed"):
            capacity.check(running(config, "score"))
