"""What a schedule's pod does: create the RayJob of this tick, unless a run of the stream is under way.

    python -m cluster.trigger RAYJOB.yaml

The RayJob is named after the tick, so a pod that is tried again finds that it was created already. Of those
that have ended, the oldest that a schedule had created are removed: nobody else would. Imports little, as
the pod is small.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from cluster.names import INSTANCE, STARTED_BY, TRIGGER

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
_SUCCEEDED = "Complete"
_ENDED = (_SUCCEEDED, "Failed", "ValidationFailed")
_CONFLICT, _GONE = 409, 404
Job = dict[str, Any]


def start(api: Any, manifest: Job, tick: str, history: int = 3) -> str:
    """Create the RayJob of a tick, unless one of the same stream is under way, and say what was done.

    Args:
        api: a `kubernetes.client.CustomObjectsApi`.
        manifest: the RayJob; its own name is replaced.
        tick: the new name.
        history: how many that a schedule has created, and that have ended, are kept per outcome.

    Raises:
        kubernetes.client.ApiException: the API server refuses.
    """
    from kubernetes.client import ApiException

    metadata = manifest["metadata"]
    place = (GROUP, VERSION, metadata["namespace"], PLURAL)
    selector = f"{INSTANCE}={metadata['labels'][INSTANCE]}"
    jobs: list[Job] = api.list_namespaced_custom_object(*place, label_selector=selector)["items"]
    for old in _beyond(history, jobs):
        try:
            api.delete_namespaced_custom_object(*place, old)
        except ApiException as error:
            if error.status != _GONE:
                raise
    for job in jobs:
        name, status = job["metadata"]["name"], _status(job)
        if name != tick and status not in _ENDED:
            return f"RayJob {name} is under way ({status or 'new'}): nothing is started"
    labels = metadata["labels"] | {STARTED_BY: TRIGGER}
    body = manifest | {"metadata": metadata | {"name": tick, "labels": labels}}
    try:
        api.create_namespaced_custom_object(*place, body=body)
    except ApiException as error:
        if error.status != _CONFLICT:
            raise
        return f"RayJob {tick} exists already: nothing is started"
    return f"RayJob {tick} is created"


def _beyond(history: int, jobs: list[Job]) -> list[str]:
    """Return the names of ended jobs of the schedule that are older than those to keep."""
    mine = [job for job in jobs if job["metadata"]["labels"].get(STARTED_BY) == TRIGGER]
    mine.sort(key=lambda job: job["metadata"].get("creationTimestamp", ""), reverse=True)
    good = [job for job in mine if _status(job) == _SUCCEEDED]
    bad = [job for job in mine if _status(job) in _ENDED and _status(job) != _SUCCEEDED]
    return [job["metadata"]["name"] for job in (*good[history:], *bad[history:])]


def _status(job: Job) -> str:
    return (job.get("status") or {}).get("jobDeploymentStatus", "")


def main() -> None:
    """Read the manifest that is named, and start it with the pod's own rights."""
    from kubernetes import client, config

    config.load_incluster_config()
    manifest = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    name = manifest["metadata"]["name"]
    tick = os.environ.get("SEEKR_TICK") or f"{name}-{int(time.time()) // 60}"
    history = int(os.environ.get("SEEKR_HISTORY", "3"))
    print(start(client.CustomObjectsApi(), manifest, tick, history), flush=True)


if __name__ == "__main__":
    main()
