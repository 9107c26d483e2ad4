"""What every pod has in common: who it runs as, what it may write, what it is told.

A pod runs as no root, with a root file system that cannot be written, no capabilities and the runtime's
seccomp profile, so that namespaces under the `restricted` standard admit it. What Ray and torch write
goes to two volumes that die with the pod: a disk of limited size and shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.names import HOME, Scene
from cluster.submission import STOP_WAIT
from pipelines.cluster_config import PodConfig, TolerationConfig
from pipelines.cluster_services import SecretKey
from pipelines.cluster_values import quantity

KEY_FOLDER = "/var/run/secrets/seekr"
# Of a pod's memory. Ray's objects live in shared memory, and NCCL and data loaders need some beside them.
_SHARED, _OBJECTS = 3, 4

CONTAINER_SECURITY: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "privileged": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
}


def pod_security(user: int) -> dict[str, Any]:
    """Return a pod's security context; volumes belong to the user's group."""
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def resources(**amounts: str) -> dict[str, Any]:
    """Return requests and equal limits, so that a pod is evicted last."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def environment(
    values: Mapping[str, str], secrets: Mapping[str, SecretKey]
) -> list[dict[str, Any]]:
    """Return environment variables, those that come from Secrets by reference."""
    plain = [{"name": name, "value": value} for name, value in values.items()]
    referred = [
        {
            "name": name,
            "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}},
        }
        for name, secret in secrets.items()
    ]
    return plain + referred


def tolerations(items: tuple[TolerationConfig, ...]) -> list[dict[str, str]]:
    """Return what pods put up with."""
    return [
        {
            "key": item.key,
            **(
                {"operator": "Exists"}
                if item.value is None
                else {"operator": "Equal", "value": item.value}
            ),
            **({} if item.effect is None else {"effect": item.effect}),
        }
        for item in items
    ]


def common_spec(scene: Scene, *, user: int, account: str, token: bool = False) -> dict[str, Any]:
    """Return what every pod's spec begins with; `token` mounts the account's credentials."""
    cluster = scene.cluster
    spec: dict[str, Any] = {
        "serviceAccountName": account,
        "automountServiceAccountToken": token,
        "enableServiceLinks": False,
        "securityContext": pod_security(user),
    }
    if cluster.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in cluster.pull_secrets]
    if cluster.priority_class is not None:
        spec["priorityClassName"] = cluster.priority_class
    return spec


def ray_environment(scene: Scene) -> list[dict[str, Any]]:
    """Return the environment of the Ray containers."""
    cluster, store = scene.cluster, scene.cluster.storage.object_store
    values = {
        "HOME": HOME,
        "USER": "seekr",  # which the image's list of users need not know
        # Set here as well as by the operator: one that did not know the setting must not go without.
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        # Of a node that is gone without a word, Ray's processes would wait seven minutes for an answer.
        "RAY_grpc_client_keepalive_time_ms": "30000",
        "RAY_grpc_client_keepalive_timeout_ms": "30000",
        # Ray alone would give a run that is stopped three seconds.
        STOP_WAIT: str(cluster.job.grace_seconds),
    }
    if cluster.offline:
        values |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return environment(
        values | store_values(scene) | dict(cluster.env),
        {**store_secrets(scene), **cluster.secret_env},
    ) + (
        []
        if store.service_account_file is None
        else [{"name": "GOOGLE_APPLICATION_CREDENTIALS", "value": f"{KEY_FOLDER}/key.json"}]
    )


def store_values(scene: Scene) -> dict[str, str]:
    """Return the variables, none of them secret, by which an S3 store is found."""
    store = scene.cluster.storage.object_store
    region = {} if store.region is None else {"AWS_REGION": store.region}
    endpoint = {} if store.endpoint is None else {"AWS_ENDPOINT_URL": store.endpoint}
    return region | endpoint


def store_secrets(scene: Scene) -> dict[str, SecretKey]:
    """Return the variables with which an S3 store is opened."""
    store = scene.cluster.storage.object_store
    if store.access_key is None or store.secret_key is None:
        return {}
    return {"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key}


def key_volume(scene: Scene) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return volumes and mounts of a key file for Google Cloud Storage, if one is named."""
    key = scene.cluster.storage.object_store.service_account_file
    if key is None:
        return [], []
    items = [{"key": key.key, "path": "key.json"}]
    secret = {"secretName": key.name, "items": items, "defaultMode": 0o440}
    mount = {"name": "store-key", "mountPath": KEY_FOLDER, "readOnly": True}
    return [{"name": "store-key", "secret": secret}], [mount]


def scratch(size: str, *folders: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a volume of limited size that dies with the pod, and its mounts at the folders."""
    volume = {"name": "scratch", "emptyDir": {"sizeLimit": size}}
    mounts = [
        {"name": "scratch", "mountPath": folder, "subPath": folder.strip("/").replace("/", "-")}
        for folder in folders
    ]
    return [volume], mounts


def ray_volumes(scene: Scene, pod: PodConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return volumes and mounts of a Ray pod: scratch, shared memory, the claim, a key file."""
    volumes, mounts = scratch(pod.scratch, "/tmp", HOME)
    shared = {"medium": "Memory", "sizeLimit": str(int(quantity(pod.memory)) // _SHARED)}
    volumes.append({"name": "shared-memory", "emptyDir": shared})
    mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    if scene.cluster.storage.claim is not None:
        claim = scene.cluster.storage.claim.name or scene.called("data")
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "data", "mountPath": scene.cluster.folder})
    key_volumes, key_mounts = key_volume(scene)
    return volumes + key_volumes, mounts + key_mounts


def object_store_bytes(pod: PodConfig) -> str:
    """Return how much of a pod's shared memory Ray's objects may take."""
    return str(int(quantity(pod.memory)) // _OBJECTS)
