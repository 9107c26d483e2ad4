"""How many pods there are: as few as hold each stage, and never fewer."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.rules import violations
from pipelines.cluster_layout import Span, layout
from pipelines.config import StreamConfig
from pipelines.demand import demands, needed_at_once
from tests.cluster.rendered import rendered, values_of


def pods(name: str, **changes: Any) -> tuple[Span, Span | None]:
    config = StreamConfig.model_validate(values_of(name, **changes))
    assert config.cluster is not None
    found = layout(config, config.cluster)
    return found.cpu, found.gpu


def span(fewest: int, most: int | None = None) -> Span:
    return Span(fewest=fewest, most=fewest if most is None else most)


def test_the_largest_stage_decides() -> None:
    assert pods("one node of 8 GPUs") == (span(1), span(1))
    assert pods("one node of 8 GPUs", score={"actors": 17}) == (span(1), span(3))
    assert pods("one node of 8 GPUs", teach={"actors": 9, "gpus": 0, "cpus": 1}) == (
        span(3),
        span(1),
    )


def test_workers_may_share_a_device_and_none_has_parts_of_two() -> None:
    shared = {"workers": 16, "gpus_per_worker": 0.5}
    assert pods("one node of 8 GPUs", train=shared) == (span(1), span(1))
    # 0.4 of a device: two on each, sixteen in a pod.
    uneven = {"workers": 17, "gpus_per_worker": 0.4, "cpus_per_worker": 2}
    assert pods("one node of 8 GPUs", train=uneven) == (span(1), span(2))


def test_a_pool_leaves_a_core_for_what_brings_its_rows() -> None:
    assert pods("cpu dev", evaluate={"actors": 3}) == (span(1), None)
    assert pods("cpu dev", evaluate={"actors": 4}) == (span(2), None)


def test_an_elastic_training_spans_pods_and_a_pool_raises_the_fewest() -> None:
    assert pods("elastic with spot") == (span(1), span(1, 4))
    assert pods("elastic with spot", score={"actors": 16}) == (span(1), span(2, 4))
    on_cpus = {"gpus_per_worker": 0, "workers": {"min": 1, "max": 9}}
    spot = {"gpu_workers": {"capacity": "spot"}}
    assert pods("elastic with spot", train=on_cpus, cluster=spot) == (span(1, 9), span(1))


@given(
    workers=st.integers(1, 70),
    per_worker=st.sampled_from([0.25, 0.5, 1, 2, 4, 8]),
    actors=st.integers(1, 40),
    gpus=st.sampled_from([1, 2, 4, 8]),
    cores=st.integers(2, 32),
)
def test_a_cluster_holds_every_stage_with_no_pod_too_many(
    workers: int, per_worker: float, actors: int, gpus: int, cores: int
) -> None:
    if per_worker > gpus:
        return
    changes: dict[str, Any] = {
        "train": {"workers": workers, "gpus_per_worker": per_worker, "cpus_per_worker": 1},
        "score": {"actors": actors, "gpus": 1, "cpus": 1},
        "teach": {"actors": actors, "gpus": 0, "cpus": 2},
        "evaluate": {"actors": 1, "gpus": 0, "cpus": 0.5},
        "cluster": {
            "gpu_workers": {"gpus": gpus, "cpu": gpus * 4, "memory": "64Gi"},
            "cpu_workers": {"cpu": cores},
        },
    }
    config = StreamConfig.model_validate(values_of("one node of 8 GPUs", **changes))
    assert config.cluster is not None
    found = layout(config, config.cluster)
    assert found.gpu is not None
    needed = needed_at_once(config)
    assert found.gpu.fewest * gpus >= needed["GPU"]
    assert found.gpu.fewest * gpus * 4 + found.cpu.fewest * cores >= needed["CPU"]
    # One pod fewer would not hold the stage that decides.
    exact = max(math.ceil(item.fewest * item.gpus / gpus) for item in demands(config))
    assert found.gpu.fewest == exact
    fit = cores // 2
    assert found.cpu.fewest == max(math.ceil(actors / fit), math.ceil((actors * 2 + 1) / cores))


@given(fewest=st.integers(1, 40), more=st.integers(0, 40))
def test_what_is_rendered_keeps_the_rules_for_any_number_of_workers(fewest: int, more: int) -> None:
    capacity = (
        {}
        if math.ceil((fewest + more) / 8) > math.ceil(max(fewest, 8) / 8)
        else {"gpu_workers": {"capacity": "spot"}}
    )
    found = rendered(
        "elastic with spot",
        train={"workers": {"min": fewest, "max": fewest + more}},
        cluster=capacity,
    )
    assert violations(found.all) == ()
    groups = found.ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1:]
    assert sum(group["minReplicas"] for group in groups) == math.ceil(max(fewest, 8) / 8)
    assert sum(group["maxReplicas"] for group in groups) == math.ceil(max(fewest + more, 8) / 8)
