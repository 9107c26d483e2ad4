"""The Ray cluster: a head that runs no work, workers without GPUs, workers with GPUs.

How many workers there are follows from the stream (see `pipelines.cluster_layout`). With the autoscaler
a group goes from the fewest to the most that the stream's stages ask for; without it the number is fixed.
"""

from __future__ import annotations

from typing import Any

from cluster.names import HEAD, STREAM_FOLDER, WORKER, Scene
from cluster.pods import (
    CONTAINER_SECURITY,
    common_spec,
    object_store_bytes,
    ray_environment,
    ray_volumes,
    resources,
    scratch,
    tolerations,
)
from cluster.versions import VERSIONS
from pipelines.cluster_config import (
    AutoscalerConfig,
    GpuWorkersConfig,
    PodConfig,
    TolerationConfig,
)
from pipelines.cluster_layout import Span
from pipelines.cluster_services import RedisConfig

METRICS_PORT, DASHBOARD_PORT = 8080, 8265
_HEAD_PORTS = {
    "gcs-server": 6379,
    "dashboard": DASHBOARD_PORT,
    "client": 10001,
    "metrics": METRICS_PORT,
}


def ray_cluster(scene: Scene) -> dict[str, Any]:
    """Return a RayCluster that stays, to which jobs are submitted."""
    return scene.object("ray.io/v1", "RayCluster", "", HEAD, spec=ray_cluster_spec(scene))


def ray_cluster_spec(scene: Scene) -> dict[str, Any]:
    """Return the spec of a RayCluster, as RayJobs have it too."""
    cluster = scene.cluster
    auth = {"mode": "token"}
    if cluster.token_secret is not None:
        auth["secretName"] = cluster.token_secret
    spec: dict[str, Any] = {
        "rayVersion": VERSIONS.ray,
        "authOptions": auth,
        "headGroupSpec": _head(scene),
        "workerGroupSpecs": _groups(scene),
    }
    if cluster.autoscaler is not None:
        spec |= _autoscaling(scene, cluster.autoscaler)
    if cluster.redis is not None:
        spec["gcsFaultToleranceOptions"] = _fault_tolerance(cluster.redis)
    return spec


def _autoscaling(scene: Scene, autoscaler: AutoscalerConfig) -> dict[str, Any]:
    # The operator adds the container and its volume for logs; /tmp and HOME are the head's own.
    _, mounts = scratch(scene.cluster.head.scratch, "/tmp")
    options = {
        "version": "v2",
        "upscalingMode": autoscaler.upscaling,
        "idleTimeoutSeconds": autoscaler.idle_seconds,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": CONTAINER_SECURITY,
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "RAY_AUTH_MODE", "value": "token"}],
        "volumeMounts": mounts,
        "resources": resources(cpu="500m", memory="1Gi"),
    }
    return {"enableInTreeAutoscaling": True, "autoscalerOptions": options}


def _fault_tolerance(redis: RedisConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"backend": "redis", "redisAddress": redis.address}
    for name, secret in (("redisUsername", redis.username), ("redisPassword", redis.password)):
        if secret is not None:
            reference = {"name": secret.name, "key": secret.key}
            options[name] = {"valueFrom": {"secretKeyRef": reference}}
    return options


def _head(scene: Scene) -> dict[str, Any]:
    pod = scene.cluster.head
    ports = [{"name": name, "containerPort": port} for name, port in _HEAD_PORTS.items()]
    template = _template(scene, pod, HEAD, ports=ports)
    template["spec"]["volumes"].append(
        {"name": "stream", "configMap": {"name": scene.called("stream")}}
    )
    template["spec"]["containers"][0]["volumeMounts"].append(
        {"name": "stream", "mountPath": STREAM_FOLDER, "readOnly": True}
    )
    # A pod that a node's autoscaler moves would take the run with it.
    template["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] = "false"
    start = {
        "dashboard-host": "0.0.0.0",
        "num-cpus": "0",
        "num-gpus": "0",
        "object-store-memory": object_store_bytes(pod),
    }
    return {"serviceType": "ClusterIP", "rayStartParams": start, "template": template}


def _groups(scene: Scene) -> list[dict[str, Any]]:
    cluster, pods = scene.cluster, scene.pods
    groups = [_group(scene, "cpu", cluster.cpu_workers, pods.cpu, {})]
    gpu, span = cluster.gpu_workers, pods.gpu
    if gpu is None or span is None:
        return groups
    if gpu.capacity == "on_demand":
        return [*groups, _gpu_group(scene, "gpu", gpu, span, spot=False)]
    if gpu.capacity == "spot":
        return [*groups, _gpu_group(scene, "gpu-spot", gpu, span, spot=True)]
    kept = Span(fewest=span.fewest, most=span.fewest)
    added = Span(fewest=0, most=span.most - span.fewest)
    return [
        *groups,
        _gpu_group(scene, "gpu", gpu, kept, spot=False),
        _gpu_group(scene, "gpu-spot", gpu, added, spot=True),
    ]


def _gpu_group(
    scene: Scene, name: str, pod: GpuWorkersConfig, span: Span, *, spot: bool
) -> dict[str, Any]:
    taint = TolerationConfig(key=pod.resource)
    changes: dict[str, Any] = {"tolerations": (taint, *pod.tolerations)}
    if spot:
        changes["node_selector"] = {**pod.node_selector, **pod.spot_node_selector}
        changes["tolerations"] += pod.spot_tolerations
    labels = {"ray.io/market-type": "spot" if spot else "on-demand"}
    if pod.accelerator is not None:
        labels["ray.io/accelerator-type"] = pod.accelerator
    return _group(scene, name, pod.model_copy(update=changes), span, labels)


def _group(
    scene: Scene, name: str, pod: PodConfig, span: Span, labels: dict[str, str]
) -> dict[str, Any]:
    gpus = pod.gpus if isinstance(pod, GpuWorkersConfig) else 0
    start = {
        "num-cpus": str(pod.cpu),
        "num-gpus": str(gpus),
        "object-store-memory": object_store_bytes(pod),
    }
    ports = [{"name": "metrics", "containerPort": METRICS_PORT}]
    return {
        "groupName": name,
        **({"labels": labels} if labels else {}),
        "replicas": span.fewest,
        "minReplicas": span.fewest,
        "maxReplicas": span.most,
        "rayStartParams": start,
        "template": _template(scene, pod, WORKER, ports=ports),
    }


def _template(
    scene: Scene, pod: PodConfig, component: str, *, ports: list[dict[str, Any]]
) -> dict[str, Any]:
    cluster = scene.cluster
    volumes, mounts = ray_volumes(scene, pod)
    container = {
        "name": component,
        "image": cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": ports,
        "env": ray_environment(scene),
        "resources": _amounts(pod),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }
    # The autoscaler in the head's pod talks to the API server; nothing else does.
    token = component == HEAD and cluster.autoscaler is not None
    spec = common_spec(
        scene,
        user=cluster.user,
        account=scene.called("head" if component == HEAD else "worker"),
        token=token,
    )
    spec |= {
        "terminationGracePeriodSeconds": cluster.job.grace_seconds,
        "containers": [container],
        "volumes": volumes,
    }
    if pod.node_selector:
        spec["nodeSelector"] = dict(pod.node_selector)
    if pod.tolerations:
        spec["tolerations"] = tolerations(pod.tolerations)
    return {
        "metadata": {"labels": scene.labels(component), "annotations": _scraping(scene)},
        "spec": spec,
    }


def _amounts(pod: PodConfig) -> dict[str, Any]:
    amounts = {"cpu": str(pod.cpu), "memory": pod.memory, "ephemeral-storage": pod.scratch}
    if isinstance(pod, GpuWorkersConfig):
        amounts[pod.resource] = str(pod.gpus)
    return resources(**amounts)


def _scraping(scene: Scene) -> dict[str, str]:
    if not scene.cluster.metrics:
        return {}
    return {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(METRICS_PORT),
        "prometheus.io/path": "/metrics",
    }
