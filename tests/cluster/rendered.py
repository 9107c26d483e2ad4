"""Streams with a cluster section, one per way of running on Kubernetes, and what is rendered of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cluster.render import Manifests, render
from pipelines.config import StreamConfig

EXAMPLES = Path(__file__).parents[2] / "examples" / "cluster"
ONE_NODE = {"workers": 8, "gpus_per_worker": 1, "cpus_per_worker": 4, "strategy": "fsdp"}
POOL = {"actors": 8, "gpus": 1, "cpus": 4}
GPUS = {"gpus": 8, "cpu": 64, "memory": "512Gi", "scratch": "300Gi"}
CLAIM = {"claim": {"name": "shared"}}
PASSWORD = {"name": "mlflow-db", "key": "password"}

BASE: dict[str, Any] = {
    "name": "weekly",
    "model": {"path": "models/llama"},
    "tasks": [{"name": "a", "train": "data/a/train.jsonl", "test": "data/a/test.jsonl"}],
    "method": {"name": "seekr"},
    "cluster": {"image": "registry.example.com/seekr:0.1.0", "storage": CLAIM},
}
ON_GPUS = {"train": ONE_NODE, "score": POOL, "teach": POOL, "evaluate": POOL}
# What each adds to BASE; a mapping is merged, None removes.
SECTIONS: dict[str, dict[str, Any]] = {
    "cpu dev": {},
    "one node of 8 GPUs": ON_GPUS | {"cluster": {"gpu_workers": GPUS | {"accelerator": "H100"}}},
    "elastic with spot": ON_GPUS
    | {
        "train": ONE_NODE | {"workers": {"min": 8, "max": 32}},
        "cluster": {
            "gpu_workers": GPUS
            | {
                "capacity": "both",
                "spot_node_selector": {"karpenter.sh/capacity-type": "spot"},
                "spot_tolerations": [{"key": "spot", "effect": None}],
            },
            "autoscaler": {},
        },
    },
    "kueue": ON_GPUS
    | {
        "cluster": {
            "gpu_workers": GPUS,
            "kueue": {"queue": "research", "priority_class": "low"},
            "schedule": {"cron": "30 2 * * 1-5"},
        }
    },
    "RayCronJob": {
        "cluster": {"schedule": {"cron": "0 3 * * mon", "kind": "RayCronJob", "time_zone": "UTC"}}
    },
    "CronJob": {"cluster": {"schedule": {"cron": "*/30 4-6 1,15 * *", "suspend": True}}},
    "air-gapped": {
        "cluster": {
            "registry": "registry.corp.example:5000/mirror",
            "pull_secrets": ["corp"],
            "offline": True,
            "network": {"egress": [], "monitoring_namespace": None},
            "mlflow": {"deploy": {"postgres": {"password": PASSWORD}}},
            "job": {"submission": "HTTPMode"},
        }
    },
    "external MLflow": {
        "storage": "gs://bucket/seekr",
        "cluster": {
            "mlflow": {"uri": "https://mlflow.example.com:8443"},
            "secret_env": {"MLFLOW_TRACKING_TOKEN": {"name": "mlflow", "key": "token"}},
            "env": {"NCCL_DEBUG": "WARN"},
            "token_secret": "ray-token",
            "priority_class": "training",
            "storage": {"object_store": {"service_account_file": {"name": "gcs", "key": "json"}}},
            "job": {"submission": "SidecarMode"},
        },
    },
    "S3 that is not Amazon's": {
        "storage": "s3://bucket/seekr?endpoint_override=minio.storage:9000&scheme=http",
        "cluster": {
            "storage": {
                "object_store": {
                    "endpoint": "http://minio.storage:9000",
                    "access_key": {"name": "minio", "key": "user"},
                    "secret_key": {"name": "minio", "key": "password"},
                }
            },
            "mlflow": {
                "deploy": {"artifacts": "s3://bucket/mlflow", "postgres": {"password": PASSWORD}}
            },
            "redis": {"address": "redis:6379", "username": PASSWORD, "password": PASSWORD},
        },
    },
}
EXAMPLE_NAMES = tuple(sorted(path.name for path in EXAMPLES.glob("*.yaml")))
NAMES = (*SECTIONS, *EXAMPLE_NAMES)


def values_of(name: str, /, **changes: Any) -> dict[str, Any]:
    """Return a stream's YAML as plain values; `changes` are merged into it."""
    if name in EXAMPLE_NAMES:
        values = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    else:
        values = merged(BASE, SECTIONS[name])
    return merged(values, changes)


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with changes laid over them, section by section."""
    found = copy.deepcopy(dict(values))
    for key, value in changes.items():
        mine = found.get(key)
        both = isinstance(value, Mapping) and isinstance(mine, dict)
        found[key] = merged(mine, value) if both and mine is not None else copy.deepcopy(value)
    return found


def stream(name: str, /, **changes: Any) -> tuple[StreamConfig, str]:
    """Return a stream and its YAML, as `render` takes them."""
    values = values_of(name, **changes)
    return StreamConfig.model_validate(values), yaml.safe_dump(values, sort_keys=False)


@cache
def manifests_of(name: str) -> Manifests:
    """Return what is rendered of a stream. Shared: copy before changing."""
    return render(*stream(name))


def rendered(name: str, /, **changes: Any) -> Manifests:
    """Return what is rendered of a changed stream."""
    return render(*stream(name, **changes))
