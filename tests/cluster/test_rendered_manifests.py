"""What is rendered is what Kubernetes and KubeRay take, the same every time."""

from __future__ import annotations

import copy
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel

from cluster.names import COMPONENT, STREAM_FILE
from cluster.needed import needed_secrets
from cluster.render import render
from cluster.versions import VERSIONS
from pipelines.cli import app
from pipelines.config import StreamConfig
from tests.cluster.crd_schemas import PLURALS, complaints, skip_without_schemas
from tests.cluster.rendered import NAMES, PASSWORD, manifests_of, rendered, stream

KUBERNETES = "1.33"


@pytest.mark.parametrize("name", NAMES)
def test_kuberays_own_schemas_take_what_is_rendered(name: str) -> None:
    skip_without_schemas()
    found = [item for item in manifests_of(name).all if item["kind"] in PLURALS]
    assert {item["kind"] for item in found} >= {"RayJob", "RayCluster"}
    assert {item["metadata"]["name"]: complaints(item) for item in found} == {
        item["metadata"]["name"]: [] for item in found
    }


def test_the_schemas_refuse_what_they_do_not_know() -> None:
    skip_without_schemas()
    job = copy.deepcopy(manifests_of("cpu dev").ray_job)
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["envs"] = []
    job["spec"]["concurrencyPolicy"] = "Forbid"
    job["spec"]["backoffLimit"] = "2"
    assert len(complaints(job)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_kubernetes_takes_the_rest(name: str) -> None:
    core = [item for item in manifests_of(name).all if item["kind"] not in PLURALS]
    assert len(core) > 5
    for item in core:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


def environments(job: dict[str, Any]) -> list[dict[str, str]]:
    """What the container of each group of pods has, the head's first."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"]["containers"][0] for group in groups]
    return [{item["name"]: item.get("value", "") for item in pod["env"]} for pod in pods]


@pytest.mark.parametrize("name", NAMES)
def test_all_of_ray_asks_a_node_that_is_silent_equally_often(name: str) -> None:
    """A host refuses to be asked more often than its own setting says."""
    first = "RAY_grpc_client_keepalive_time_ms"
    for found in environments(manifests_of(name).ray_job):
        assert (found[first], found["RAY_grpc_client_keepalive_timeout_ms"]) == ("30000", "30000")
    for found in environments(rendered(name, cluster={"env": {first: "60000"}}).ray_job):
        assert found[first] == "60000"


def test_the_validator_of_core_resources_refuses_what_it_does_not_know() -> None:
    policy = copy.deepcopy(manifests_of("cpu dev").of_kind("NetworkPolicy")[0])
    policy["spec"]["policytypes"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(policy, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_rendering_is_the_same_every_time(name: str) -> None:
    again = render(*stream(name))
    assert yaml.safe_dump(list(again.all), sort_keys=False) == yaml.safe_dump(
        list(manifests_of(name).all), sort_keys=False
    )


@pytest.mark.parametrize("name", NAMES)
def test_objects_have_one_namespace_and_names_of_their_own(name: str) -> None:
    config, _ = stream(name)
    assert config.cluster is not None
    found = manifests_of(name).all
    named = [(item["kind"], item["metadata"]["name"]) for item in found]
    assert len(set(named)) == len(named)
    assert {item["metadata"]["namespace"] for item in found} == {config.cluster.namespace}


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_that_pods_read_bears_the_same_identity(name: str) -> None:
    config, _ = stream(name)
    (text,) = [
        item["data"]["stream.yaml"]
        for item in manifests_of(name).of_kind("ConfigMap")
        if "stream.yaml" in item["data"]
    ]
    there = StreamConfig.model_validate(yaml.safe_load(text))
    assert bearing(there) == bearing(config)
    assert there.ray.address == "auto"
    assert there != config  # paths are others


@pytest.mark.parametrize("name", NAMES)
def test_a_cluster_section_bears_nothing(name: str) -> None:
    config, _ = stream(name)
    assert config.cluster is not None
    assert bearing(config) == bearing(config.model_copy(update={"cluster": None}))
    assert bearing(config.cluster) == {}


def test_workers_come_from_the_stream() -> None:
    groups = groups_of(manifests_of("elastic with spot").ray_job)
    assert groups == {"cpu": (1, 1, 1), "gpu": (1, 1, 1), "gpu-spot": (0, 0, 3)}
    groups = groups_of(
        rendered("elastic with spot", train={"workers": {"min": 16, "max": 64}}).ray_job
    )
    assert groups == {"cpu": (1, 1, 1), "gpu": (2, 2, 2), "gpu-spot": (0, 0, 6)}
    assert groups_of(manifests_of("one node of 8 GPUs").ray_job)["gpu"] == (1, 1, 1)
    many = rendered("cpu dev", train={"workers": 9, "cpus_per_worker": 2})
    assert groups_of(many.ray_job) == {"cpu": (5, 5, 5)}


def test_a_run_reads_the_stream_where_it_is_mounted() -> None:
    job = manifests_of("cpu dev").ray_job["spec"]
    assert job["entrypoint"] == f"seekr run {STREAM_FILE} --grace 105"
    spec = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {item["name"]: item["mountPath"] for item in spec["containers"][0]["volumeMounts"]}
    (volume,) = [item for item in spec["volumes"] if "configMap" in item]
    assert volume["configMap"]["name"] == "weekly-stream"
    assert f"{mounts[volume['name']]}/stream.yaml" == STREAM_FILE


def test_a_run_that_is_stopped_has_its_grace_and_ray_waits_longer() -> None:
    job = rendered("cpu dev", cluster={"job": {"grace_seconds": 600}}).ray_job["spec"]
    spec = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    environment = {item["name"]: item.get("value") for item in spec["containers"][0]["env"]}
    assert int(job["entrypoint"].rpartition(" ")[2]) < int(environment["RAY_JOB_STOP_WAIT_TIME_S"])
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    assert spec["terminationGracePeriodSeconds"] == 600


def test_a_stream_with_an_inbox_takes_in_what_has_arrived() -> None:
    found = rendered("CronJob", tasks_from="inbox/*", data_root="arrivals")
    assert found.ray_job["spec"]["entrypoint"].startswith(f"seekr tick {STREAM_FILE} --grace ")
    (text,) = [
        item["data"]["stream.yaml"]
        for item in found.of_kind("ConfigMap")
        if "stream.yaml" in item["data"]
    ]
    values = yaml.safe_load(text)
    assert (values["data_root"], values["tasks_from"]) == ("/mnt/seekr/arrivals", "inbox/*")


@pytest.mark.parametrize("name", ["cpu dev", "CronJob", "RayCronJob"])
@pytest.mark.parametrize("tasks_from", [None, "inbox/*"])
@pytest.mark.parametrize("gate", [None, {"max_forgetting": 0.05}])
def test_a_run_may_hold_a_model_back_without_being_tried_again_where_there_is_a_gate(
    name: str, tasks_from: str | None, gate: dict[str, float] | None
) -> None:
    found = rendered(name, tasks_from=tasks_from, gate=gate)
    jobs = [found.ray_job, *(item["spec"]["jobTemplate"] for item in found.of_kind("RayCronJob"))]
    for config in found.of_kind("ConfigMap"):
        jobs += [yaml.safe_load(config["data"][key]) for key in config["data"] if "rayjob" in key]
    verb, flag = "run" if tasks_from is None else "tick", " --held-back-ok" * (gate is not None)
    assert len(jobs) == 1 + (name != "cpu dev")
    assert [job.get("spec", job)["entrypoint"] for job in jobs] == [
        f"seekr {verb} {STREAM_FILE}{flag} --grace 105"
    ] * len(jobs)


def test_every_command_that_is_rendered_is_one_of_seekrs() -> None:
    commands = {item.callback.__name__ for item in app.registered_commands if item.callback}
    for changes in ({}, {"tasks_from": "inbox/*"}):
        entrypoint = rendered("cpu dev", **changes).ray_job["spec"]["entrypoint"]
        assert entrypoint.split()[1] in commands


def test_a_cron_job_creates_the_same_rayjob_with_its_queue() -> None:
    found = manifests_of("kueue")
    (cron,) = found.of_kind("CronJob")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    spec = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (volume,) = [item for item in spec["volumes"] if "configMap" in item]
    (created,) = [
        yaml.safe_load(item["data"]["rayjob.yaml"])
        for item in found.of_kind("ConfigMap")
        if item["metadata"]["name"] == volume["configMap"]["name"]
    ]
    assert created == found.ray_job
    assert created["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert created["spec"]["suspend"] is True


def test_a_ray_cron_job_has_the_rayjobs_spec() -> None:
    found = manifests_of("RayCronJob")
    (cron,) = found.of_kind("RayCronJob")
    assert cron["spec"]["jobTemplate"] == found.ray_job["spec"]
    assert found.of_kind("CronJob") == ()


def test_public_images_come_from_the_mirror() -> None:
    found = manifests_of("air-gapped")
    images = {
        container["image"]
        for item in (*found.of_kind("Deployment"), *found.of_kind("StatefulSet"))
        for container in item["spec"]["template"]["spec"]["containers"]
    }
    assert images == {
        f"registry.corp.example:5000/mirror/mlflow/mlflow:v{VERSIONS.mlflow}-full",
        f"registry.corp.example:5000/mirror/library/postgres:{VERSIONS.postgres}",
    }


def test_secrets_that_must_exist_are_known() -> None:
    assert needed_secrets(manifests_of("external MLflow").all) == {
        "gcs": ("json",),
        "mlflow": ("token",),
        "ray-token": ("auth_token",),
    }
    assert needed_secrets(manifests_of("weekly_7b.yaml").all) == {
        "registry": (".dockerconfigjson",),
        "seekr-mlflow": ("password",),
        "seekr-s3": ("access-key", "secret-key"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_drain_leaves_the_head_alone_by_a_number_of_pods(name: str) -> None:
    (head,) = [
        item
        for item in manifests_of(name).of_kind("PodDisruptionBudget")
        if item["metadata"]["labels"][COMPONENT] == "ray-head"
    ]
    assert head["spec"]["minAvailable"] == 1


def groups_of(job: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Replicas, fewest and most of every worker group."""
    return {
        group["groupName"]: (group["replicas"], group["minReplicas"], group["maxReplicas"])
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }


def bearing(value: Any) -> Any:
    """All fields that bear identity, of sections in sections too; the stream's name is a label."""
    if isinstance(value, tuple):
        return [bearing(item) for item in value]
    if not isinstance(value, BaseModel):
        return value
    found: dict[str, Any] = {}
    for name, field in type(value).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("execution"):
            continue
        inner = bearing(getattr(value, name))
        if inner != {}:
            found[name] = inner
    return found


def test_mlflow_answers_to_its_own_names_and_those_that_are_given() -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    deploy = {"deploy": {"hosts": ["mlflow.example.com"], "postgres": {"password": PASSWORD}}}
    (server,) = rendered("cpu dev", cluster={"mlflow": deploy}).of_kind("Deployment")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    options = dict(item.split("=", 1) for item in container["args"])
    hosts = options["--allowed-hosts"].split(",")
    for host in ("weekly-mlflow.seekr.svc:5000", "weekly-mlflow:5000", "mlflow.example.com"):
        assert is_allowed_host_header(hosts, host)
    assert is_allowed_host_header(hosts, "localhost:15000")  # a forwarded port
    assert not is_allowed_host_header(hosts, "evil.example.com")
    assert "@weekly-mlflow-db:5432/mlflow" in options["--backend-store-uri"]
    assert ":" not in options["--backend-store-uri"].partition("://")[2].partition("@")[0]


def test_mlflows_own_command_takes_the_arguments() -> None:
    from mlflow.cli import cli

    (server,) = manifests_of("air-gapped").of_kind("Deployment")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    _, name = container["command"]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    context = command.make_context(name, list(container["args"]))
    assert context.params["artifacts_destination"] == "/artifacts"
    assert context.params["port"] == 5000
