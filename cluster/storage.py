"""What stays: the claim that pods share, and the stream itself. And which pods a drain leaves alone."""

from __future__ import annotations

from typing import Any

from cluster.names import HEAD, WORKER, Scene


def claims(scene: Scene) -> list[dict[str, Any]]:
    """Return the claim that all pods mount, where it does not exist yet."""
    claim = scene.cluster.storage.claim
    if claim is None or claim.size is None:
        return []
    return [
        claim_of(
            scene,
            "data",
            HEAD,
            size=claim.size,
            storage_class=claim.storage_class,
            mode=claim.access_mode,
        )
    ]


def claim_of(
    scene: Scene, part: str, component: str, *, size: str, storage_class: str | None, mode: str
) -> dict[str, Any]:
    """Return a persistent volume claim."""
    return scene.object(
        "v1",
        "PersistentVolumeClaim",
        part,
        component,
        spec=claim_spec(size=size, storage_class=storage_class, mode=mode),
    )


def claim_spec(*, size: str, storage_class: str | None, mode: str) -> dict[str, Any]:
    """Return the spec of a claim; no class means the cluster's default."""
    spec: dict[str, Any] = {
        "accessModes": [mode],
        "resources": {"requests": {"storage": size}},
    }
    return spec if storage_class is None else spec | {"storageClassName": storage_class}


def text_map(scene: Scene, part: str, component: str, files: dict[str, str]) -> dict[str, Any]:
    """Return a ConfigMap of files."""
    return scene.object("v1", "ConfigMap", part, component, data=files)


def disruption_budgets(scene: Scene) -> list[dict[str, Any]]:
    """Return what a drain has to leave alone: the head, and all workers but one.

    The budgets count pods, as Kubernetes knows no scale of a RayCluster and refuses shares of one.
    """
    pods = scene.pods
    workers = pods.cpu.fewest + (0 if pods.gpu is None else pods.gpu.fewest)
    found = [_budget(scene, "head", HEAD, 1)]
    return [*found, _budget(scene, "worker", WORKER, workers - 1)] if workers > 1 else found


def _budget(scene: Scene, part: str, component: str, count: int) -> dict[str, Any]:
    spec = {
        "minAvailable": count,
        "selector": scene.selector(component),
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return scene.object("policy/v1", "PodDisruptionBudget", part, component, spec=spec)
