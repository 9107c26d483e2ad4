"""What a schedule's pod does: create the RayJob of this tick, unless a run of the stream is under way.

    python -m cluster.trigger RAYJOB.yaml

The RayJob is named after the tick, so a pod that is tried again finds that it was created already.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from cluster.names import INSTANCE

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
_ENDED = ("Complete", "Failed", "ValidationFailed")


def start(api: Any, manifest: dict[str, Any], tick: str) -> str:
    """Create the RayJob of a tick, unless one of the same stream is under way, and say what was done.

    Args:
        api: a `kubernetes.client.CustomObjectsApi`.
        manifest: the RayJob; its own name is replaced.
        tick: the new name.

    Raises:
        kubernetes.client.ApiException: the API server refuses.
    """
    from kubernetes.client import ApiException

    metadata = manifest["metadata"]
    place = (GROUP, VERSION, metadata["namespace"], PLURAL)
    selector = f"{INSTANCE}={metadata['labels'][INSTANCE]}"
    for found in api.list_namespaced_custom_object(*place, label_selector=selector)["items"]:
        name = found["metadata"]["name"]
        status = (found.get("status") or {}).get("jobDeploymentStatus", "")
        if name != tick and status not in _ENDED:
            return f"RayJob {name} is under way ({status or 'new'}): nothing is started"
    body = manifest | {"metadata": metadata | {"name": tick}}
    try:
        api.create_namespaced_custom_object(*place, body=body)
    except ApiException as error:
        if error.status != 409:
            raise
        return f"RayJob {tick} exists already: nothing is started"
    return f"RayJob {tick} is created"


def main() -> None:
    """Read the manifest that is named, and start it with the pod's own rights."""
    from kubernetes import client, config

    config.load_incluster_config()
    manifest = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    name = manifest["metadata"]["name"]
    tick = os.environ.get("SEEKR_TICK") or f"{name}-{int(time.time()) // 60}"
    print(start(client.CustomObjectsApi(), manifest, tick), flush=True)


if __name__ == "__main__":
    main()
