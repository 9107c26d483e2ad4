"""The RayJob: one run of the stream on a cluster of its own, submitted, retried, bounded, cleaned up."""

from __future__ import annotations

from typing import Any

from cluster.names import HEAD, SUBMITTER, Scene
from cluster.pods import CONTAINER_SECURITY, common_spec, environment, resources, scratch
from cluster.ray_cluster import ray_cluster_spec
from cluster.submission import CLOSING_SECONDS

QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


def ray_job(scene: Scene) -> dict[str, Any]:
    """Return the RayJob."""
    job = scene.object("ray.io/v1", "RayJob", "", HEAD, spec=ray_job_spec(scene))
    kueue = scene.cluster.kueue
    if kueue is not None:
        job["metadata"]["labels"][QUEUE] = kueue.queue
        if kueue.priority_class is not None:
            job["metadata"]["labels"][PRIORITY] = kueue.priority_class
    return job


def ray_job_spec(scene: Scene) -> dict[str, Any]:
    """Return the spec of a RayJob, as a RayCronJob has it too."""
    settings = scene.cluster.job
    spec: dict[str, Any] = {
        "entrypoint": f"{scene.command} --grace {settings.grace_seconds - CLOSING_SECONDS}",
        "submissionMode": settings.submission,
        "backoffLimit": settings.retries,
        "preRunningDeadlineSeconds": settings.starting_seconds,
        "activeDeadlineSeconds": settings.active_seconds,
        "rayClusterSpec": ray_cluster_spec(scene),
    }
    if settings.submission == "K8sJobMode":
        spec["submitterConfig"] = {"backoffLimit": settings.submitter_retries}
        spec["submitterPodTemplate"] = _submitter(scene)
    if scene.cluster.kueue is not None:
        spec["suspend"] = True  # until Kueue admits it
    if settings.deletion:
        rules = [
            {
                "policy": rule.policy,
                "condition": {"jobStatus": rule.when, "ttlSeconds": rule.after},
            }
            for rule in settings.deletion
        ]
        spec["shutdownAfterJobFinishes"] = False
        spec["deletionStrategy"] = {"deletionRules": rules}
    else:
        spec["shutdownAfterJobFinishes"] = True
        spec["ttlSecondsAfterFinished"] = settings.keep_seconds
    return spec


def _submitter(scene: Scene) -> dict[str, Any]:
    """Return the pod that calls `ray job submit`; the operator adds the command and the token."""
    volumes, mounts = scratch("1Gi", "/tmp")
    container = {
        "name": "ray-job-submitter",
        "image": scene.cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "env": environment(
            {"HOME": "/tmp", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}, {}
        ),
        "resources": resources(cpu="500m", memory="1Gi"),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }
    spec = common_spec(scene, user=scene.cluster.user, account=scene.called("worker"))
    spec |= {"restartPolicy": "Never", "containers": [container], "volumes": volumes}
    return {"metadata": {"labels": scene.labels(SUBMITTER)}, "spec": spec}
