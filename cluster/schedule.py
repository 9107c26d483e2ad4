"""When a stream is run again: a CronJob that creates a RayJob, or KubeRay's own RayCronJob.

A RayCronJob starts a run whether or not one is under way, and what it creates has no labels, so Kueue never
sees it. Hence the default: a CronJob whose pod looks first (see `trigger`). Either way two runs at once
would share the work by their leases; this saves the cluster of the second.
"""

from __future__ import annotations

from typing import Any

import yaml

from cluster.names import TRIGGER, Scene
from cluster.pods import CONTAINER_SECURITY, common_spec, environment, resources, scratch
from cluster.ray_job import ray_job, ray_job_spec
from cluster.storage import text_map
from pipelines.cluster_services import ScheduleConfig

JOB_FOLDER = "/etc/seekr"
JOB_FILE = "rayjob.yaml"
_TRIGGER_SECONDS, _TRIGGER_RETRIES = 600, 4


def schedule(scene: Scene) -> list[dict[str, Any]]:
    """Return the schedule and what it needs; nothing where the stream has none."""
    settings = scene.cluster.schedule
    if settings is None:
        return []
    if settings.kind == "RayCronJob":
        spec = {
            "schedule": settings.cron,
            "timeZone": settings.time_zone,
            "suspend": settings.suspend,
            "jobTemplate": ray_job_spec(scene),
        }
        return [scene.object("ray.io/v1", "RayCronJob", "", TRIGGER, spec=spec)]
    manifest = yaml.safe_dump(ray_job(scene), sort_keys=False, width=100)
    return [text_map(scene, "rayjob", TRIGGER, {JOB_FILE: manifest}), _cron_job(scene, settings)]


def _cron_job(scene: Scene, settings: ScheduleConfig) -> dict[str, Any]:
    job = {
        "backoffLimit": _TRIGGER_RETRIES,
        "activeDeadlineSeconds": _TRIGGER_SECONDS,
        "template": {
            "metadata": {"labels": scene.labels(TRIGGER)},
            "spec": _trigger(scene, settings),
        },
    }
    return scene.object(
        "batch/v1",
        "CronJob",
        "",
        TRIGGER,
        spec={
            "schedule": settings.cron,
            "timeZone": settings.time_zone,
            "suspend": settings.suspend,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": settings.starting_deadline,
            "successfulJobsHistoryLimit": settings.history,
            "failedJobsHistoryLimit": settings.history,
            "jobTemplate": {"metadata": {"labels": scene.labels(TRIGGER)}, "spec": job},
        },
    )


def _trigger(scene: Scene, settings: ScheduleConfig) -> dict[str, Any]:
    """Return the pod that creates the RayJob, named as the tick that it belongs to."""
    volumes, mounts = scratch("100Mi", "/tmp")
    volumes.append({"name": "rayjob", "configMap": {"name": scene.called("rayjob")}})
    mounts.append({"name": "rayjob", "mountPath": JOB_FOLDER, "readOnly": True})
    tick = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    container = {
        "name": TRIGGER,
        "image": scene.cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "cluster.trigger", f"{JOB_FOLDER}/{JOB_FILE}"],
        "env": [
            *environment({"HOME": "/tmp", "SEEKR_HISTORY": str(settings.history)}, {}),
            {"name": "SEEKR_TICK", "valueFrom": tick},
        ],
        "resources": resources(cpu="100m", memory="512Mi"),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }
    account = scene.called("schedule")
    spec = common_spec(scene, user=scene.cluster.user, account=account, token=True)
    return spec | {"restartPolicy": "Never", "containers": [container], "volumes": volumes}
