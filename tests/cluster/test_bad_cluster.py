"""A cluster section that could not work is refused when the stream is read, with what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.names import scene
from pipelines.cluster_values import cron_fields, quantity
from pipelines.load import load_config
from seekr.errors import ConfigError
from tests.cluster.rendered import GPUS, ON_GPUS, ONE_NODE, values_of

ELASTIC = {"train": ONE_NODE | {"workers": {"min": 8, "max": 32}}}
KUEUE = {"kueue": {"queue": "research"}}
RULE = {"policy": "DeleteCluster", "when": "FAILED", "after": 60}
DEPLOY = {"postgres": {"password": {"name": "db", "key": "password"}}}


def refusal(folder: Path, name: str = "cpu dev", /, **changes: Any) -> str:
    """What is said about a changed stream."""
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump(values_of(name, **changes)), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    return str(error.value)


# A cluster section's fields, and what the message must have; the field comes first.
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "an image without a tag": (
        {"image": "registry.example.com/seekr"},
        "cluster.image: .*fixed tag",
    ),
    "the latest image": ({"image": "seekr:latest"}, "cluster.image: .*`latest` may change"),
    "no image": ({"image": None}, "cluster.image: "),
    "an unknown field": ({"imagePullSecrets": []}, "cluster.imagePullSecrets: unknown field"),
    "a near field": ({"autoscale": {}}, "did you mean 'autoscaler'"),
    "a name in capitals": ({"name": "Weekly"}, "cluster.name: a DNS label is needed"),
    "a name of 37 characters": ({"name": "a" * 37}, "cluster.name: .*at most 36"),
    "a namespace with a dot": ({"namespace": "a.b"}, "cluster.namespace: a DNS label"),
    "memory in words": ({"head": {"memory": "8 GB"}}, "cluster.head.memory: .*quantity.*'8 GB'"),
    "no memory": ({"head": {"memory": "0Gi"}}, "cluster.head.memory: a quantity above 0"),
    "half a core": ({"cpu_workers": {"cpu": 2.5}}, "cluster.cpu_workers.cpu: must be an integer"),
    "a size without a number": (
        {"storage": {"claim": {"size": "Gi", "name": None}}},
        "cluster.storage.claim.size: a Kubernetes quantity",
    ),
    "a claim made and found": (
        {"storage": {"claim": {"size": "5Gi"}}},
        "cluster.storage.claim: .*both are given",
    ),
    "one key of two": (
        {"storage": {"object_store": {"access_key": {"name": "s3", "key": "id"}}}},
        "cluster.storage.object_store: secret_key is missing",
    ),
    "a secret in env": (
        {"env": {"HF_TOKEN": "hf_abc"}},
        "cluster.env: HF_TOKEN looks like a secret.*secret_env.HF_TOKEN",
    ),
    "a variable that is none": ({"env": {"A-B": "1"}}, "cluster.env.*environment variable"),
    "a secret's value instead of its name": (
        {"secret_env": {"HF_TOKEN": "hf_abc"}},
        "cluster.secret_env.HF_TOKEN: ",
    ),
    "six fields of a schedule": (
        {"schedule": {"cron": "0 0 3 * * 1"}},
        "cluster.schedule.cron: 6 fields instead of 5",
    ),
    "an hour that is none": (
        {"schedule": {"cron": "0 24 * * 1"}},
        "cluster.schedule.cron: hour '24': a number from 0 to 23",
    ),
    "Sunday as 7": ({"schedule": {"cron": "0 3 * * 7"}}, "day of week '7'.*0 to 6 or sun"),
    "a day that never comes": ({"schedule": {"cron": "0 3 31 feb *"}}, "day 31 never comes"),
    "a zone in the schedule": (
        {"schedule": {"cron": "CRON_TZ=UTC 0 3 * * 1"}},
        "cluster.schedule.cron: .*cluster.schedule.time_zone",
    ),
    "a zone that is none": (
        {"schedule": {"cron": "0 3 * * 1", "time_zone": "Berlin"}},
        "cluster.schedule.time_zone: .*Europe/Berlin",
    ),
    "both kinds of MLflow": (
        {"mlflow": {"uri": "https://mlflow.example.com", "deploy": DEPLOY}},
        "cluster.mlflow: .*both are given",
    ),
    "no kind of MLflow": ({"mlflow": {}}, "cluster.mlflow: .*neither is given"),
    "credentials in an address": (
        {"mlflow": {"uri": "https://me:secret@mlflow.example.com"}},
        "cluster.mlflow.uri: .*without credentials",
    ),
    "Redis without a port": ({"redis": {"address": "redis"}}, "cluster.redis.address: "),
    "addresses that are none": (
        {"network": {"egress": [{"cidr": "10.0.0.0/33"}]}},
        "cluster.network.egress.0.cidr: a range of addresses",
    ),
    "a port that is none": (
        {"network": {"egress": [{"cidr": "10.0.0.0/8", "ports": [70000]}]}},
        "70000 is no TCP port",
    ),
    "a submission that is none": (
        {"job": {"submission": "InteractiveMode"}},
        "cluster.job.submission: must be 'K8sJobMode'",
    ),
    "no time to start": ({"job": {"starting_seconds": 0}}, "cluster.job.starting_seconds: "),
    "root": ({"user": 0}, "cluster.user: "),
    "a folder that is relative": ({"folder": "data"}, "cluster.folder: an absolute folder"),
    "spot pods that nothing tells apart": (
        {"gpu_workers": GPUS | {"capacity": "spot"}},
        "cluster.gpu_workers: capacity is spot.*are empty",
    ),
    "spot labels without spot": (
        {"gpu_workers": GPUS | {"spot_node_selector": {"a": "b"}}},
        "cluster.gpu_workers: capacity is on_demand.*are given",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_bad_field_is_named(case: str, tmp_path: Path) -> None:
    section, expected = FIELDS[case]
    assert re.search(expected, refusal(tmp_path, cluster=section)), refusal(
        tmp_path, cluster=section
    )


@pytest.mark.parametrize(
    "section",
    [
        {"env": {"HF_TOKEN": "s3cr3t"}},
        {"secret_env": {"HF_TOKEN": "s3cr3t"}},
        {"mlflow": {"uri": "https://me:s3cr3t@mlflow.example.com"}},
        {"storage": {"object_store": {"endpoint": "http://me:s3cr3t@minio:9000"}}},
        {"storage": {"object_store": {"access_key": "s3cr3t"}}},
        {"redis": {"address": "redis://:s3cr3t@redis:6379"}},
        {"redis": {"address": "redis:6379", "password": "s3cr3t"}},
        {"mlflow": {"deploy": {"postgres": {"password": "s3cr3t"}}}},
    ],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(
    section: dict[str, Any], tmp_path: Path
) -> None:
    assert "s3cr3t" not in refusal(tmp_path, cluster=section)


# What does not go together: the stream that is changed, the changes, what the message must have.
TOGETHER: dict[str, tuple[str, dict[str, Any], str]] = {
    "autoscaler and kueue": (
        "kueue",
        {"cluster": {"autoscaler": {}}},
        "cluster.autoscaler and cluster.kueue are both set: .*keep one",
    ),
    "kueue and elastic workers": (
        "kueue",
        ELASTIC,
        "the number of pods is fixed.*from 1 to 4 pods.*train.workers one number",
    ),
    "elastic workers without the autoscaler": (
        "one node of 8 GPUs",
        ELASTIC,
        "from 1 to 4 pods.*nothing would add them.*cluster.autoscaler",
    ),
    "kueue and deletion rules": (
        "kueue",
        {"cluster": {"job": {"deletion": [RULE]}}},
        "cluster.job.deletion and cluster.kueue.*shutdownAfterJobFinishes.*keep_seconds",
    ),
    "kueue and RayCronJob": (
        "kueue",
        {"cluster": {"schedule": {"kind": "RayCronJob"}}},
        "cannot carry the label.*kind CronJob",
    ),
    "a deletion rule twice": (
        "cpu dev",
        {"cluster": {"job": {"deletion": [RULE, RULE]}}},
        "DeleteCluster on FAILED twice",
    ),
    "deletion rules out of order": (
        "cpu dev",
        {"cluster": {"job": {"deletion": [RULE, RULE | {"policy": "DeleteSelf", "after": 1}]}}},
        "DeleteSelf after 1 seconds and DeleteCluster after 60",
    ),
    "DeleteWorkers and the autoscaler": (
        "elastic with spot",
        {"cluster": {"job": {"deletion": [RULE | {"policy": "DeleteWorkers"}]}}},
        "DeleteWorkers and cluster.autoscaler",
    ),
    "GPUs that no pod has": (
        "cpu dev",
        ON_GPUS,
        "cluster.gpu_workers is null, and train asks for 1 GPUs per process",
    ),
    "GPUs that nobody uses": (
        "cpu dev",
        {"cluster": {"gpu_workers": GPUS}},
        "cluster.gpu_workers is set, and no stage asks for a GPU",
    ),
    "more GPUs per worker than a pod has": (
        "one node of 8 GPUs",
        {"train": {"gpus_per_worker": 16}},
        "train asks for 16 GPUs per process and a pod of cluster.gpu_workers has 8",
    ),
    "too few cores beside the GPUs": (
        "one node of 8 GPUs",
        {"cluster": {"gpu_workers": {"cpu": 16}}},
        "train asks for 4 cores per process.*has 16.*raise cluster.gpu_workers.cpu to 32",
    ),
    "more cores per process than a pod has": (
        "cpu dev",
        {"evaluate": {"cpus": 9}},
        "evaluate asks for 9 cores per process and a pod of cluster.cpu_workers has 4",
    ),
    "spot beside a fixed number": (
        "elastic with spot",
        {"train": {"workers": 8}},
        "capacity is both, and the number of pods with GPUs is always 1",
    ),
    "spot without retries": (
        "elastic with spot",
        {"train": {"max_failures": 0}},
        "train.max_failures 0.*raise train.max_failures",
    ),
    "a variable of the operator": (
        "cpu dev",
        {"cluster": {"env": {"RAY_ADDRESS": "x"}}},
        "sets RAY_ADDRESS, which is set for you",
    ),
    "a token by hand": (
        "cpu dev",
        {"cluster": {"secret_env": {"RAY_AUTH_TOKEN": {"name": "a", "key": "b"}}}},
        "RAY_AUTH_TOKEN.*cluster.token_secret",
    ),
    "a variable twice": (
        "cpu dev",
        {"cluster": {"env": {"A": "1"}, "secret_env": {"A": {"name": "a", "key": "b"}}}},
        "A is in cluster.env and in cluster.secret_env",
    ),
    "a folder of the pods' own": (
        "cpu dev",
        {"cluster": {"folder": "/tmp/data"}},
        "/tmp/data, and pods have volumes of their own",
    ),
    "a folder that the claim hides": (
        "cpu dev",
        {"cluster": {"image_folders": ["/mnt/seekr/models"]}},
        "the claim at cluster.folder /mnt/seekr hides",
    ),
    "a stream's name that makes none": (
        "cpu dev",
        {"name": "7b.weekly"},
        "cluster.name is null, and the stream's name '7b.weekly'.*set cluster.name",
    ),
    "a stream's name that is too long": ("cpu dev", {"name": "w" * 37}, "at most 36"),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_what_does_not_go_together_is_told(case: str, tmp_path: Path) -> None:
    name, changes, expected = TOGETHER[case]
    assert re.search(expected, refusal(tmp_path, name, **changes)), refusal(
        tmp_path, name, **changes
    )


def test_a_streams_name_is_made_fit(tmp_path: Path) -> None:
    path = tmp_path / "stream.yaml"
    path.write_text(yaml.safe_dump(values_of("cpu dev", name="Weekly_7B.v2")), encoding="utf-8")
    assert scene(load_config(path)).name == "weekly-7b-v2"


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("0 3 * * mon", ({0}, {3}, set(range(1, 32)), set(range(1, 13)), {1})),
        ("*/20 1-3 1,15 JAN-mar ?", ({0, 20, 40}, {1, 2, 3}, {1, 15}, {1, 2, 3}, set(range(7)))),
        (
            "5/25 * * * 0-6/3",
            ({5, 30, 55}, set(range(24)), set(range(1, 32)), set(range(1, 13)), {0, 3, 6}),
        ),
    ],
)
def test_a_schedule_is_read_as_the_controllers_read_it(
    text: str, fields: tuple[set[int], ...]
) -> None:
    assert cron_fields(text) == tuple(map(frozenset, fields))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@daily",
        "* * * *",
        "60 * * * *",
        "5-1 * * * *",
        "*/0 * * * *",
        "a * * * *",
        "1- * * * *",
    ],
)
def test_a_schedule_that_controllers_would_refuse_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        cron_fields(text)


@given(
    st.integers(1, 10**6), st.sampled_from(["", "m", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"])
)
def test_quantities_scale_as_kubernetes_scales_them(number: int, unit: str) -> None:
    from kubernetes.utils import parse_quantity

    assert quantity(f"{number}{unit}") == parse_quantity(f"{number}{unit}")
