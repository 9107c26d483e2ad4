"""From a stream to all that it needs on Kubernetes: plain manifests, the same every time.

`render` returns them; `Manifests.write` lays them out for kustomize. What KubeRay would refuse after
the API server has taken it is checked here (see `rules`), so that nothing is found out on the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.access import access
from cluster.kustomize import write_kustomization
from cluster.mlflow import mlflow_server
from cluster.names import HEAD, Scene, scene
from cluster.network import network_policies
from cluster.placement import placed_stream
from cluster.ray_cluster import ray_cluster
from cluster.ray_job import ray_job
from cluster.rules import violations
from cluster.schedule import schedule
from cluster.storage import claims, disruption_budgets, text_map
from pipelines.config import StreamConfig
from pipelines.load import load_config
from pipelines.stream_values import read_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifests:
    """What a stream needs on Kubernetes.

    Attributes:
        base: what every way of running it shares: the stream, accounts, policies, storage, MLflow.
        ray_job: one run on a cluster of its own.
        ray_cluster: a cluster that stays.
        scheduled: the schedule, and what it alone needs; empty where the stream has none.
    """

    base: tuple[dict[str, Any], ...]
    ray_job: dict[str, Any]
    ray_cluster: dict[str, Any]
    scheduled: tuple[dict[str, Any], ...]

    @property
    def all(self) -> tuple[dict[str, Any], ...]:
        """Everything. Applied at once it would run the stream in three ways: `write` keeps them apart."""
        return (*self.base, self.ray_job, self.ray_cluster, *self.scheduled)

    def of_kind(self, kind: str) -> tuple[dict[str, Any], ...]:
        """Return those of a kind, such as `NetworkPolicy`."""
        return tuple(item for item in self.all if item["kind"] == kind)

    @property
    def overlays(self) -> dict[str, tuple[dict[str, Any], ...]]:
        """What each way of running the stream adds to the base, by its name."""
        found: dict[str, tuple[dict[str, Any], ...]] = {
            "job": (self.ray_job,),
            "cluster": (self.ray_cluster,),
        }
        return found | ({"schedule": self.scheduled} if self.scheduled else {})

    def write(self, folder: Path) -> list[Path]:
        """Write a kustomize base and its overlays, and return the files.

        Files of an earlier rendering are replaced or, where they are not needed any more, removed. Files
        of others are never touched.

        Raises:
            ConfigError: a file of somebody else is in the way, or the folder cannot be written.
        """
        return write_kustomization(folder, self.base, self.overlays)


def render(config: StreamConfig, stream_text: str) -> Manifests:
    """Return the manifests of a stream.

    Args:
        config: the stream, validated.
        stream_text: the YAML that it was read from, with overrides in it (see `read_stream`).

    Raises:
        ConfigError: there is no cluster section, or a path or address that pods could not use.
    """
    found = scene(config)
    manifests = Manifests(
        base=tuple(_base(found, stream_text)),
        ray_job=ray_job(found),
        ray_cluster=ray_cluster(found),
        scheduled=tuple(schedule(found)),
    )
    broken = violations(manifests.all)
    if broken:
        raise AssertionError(f"rendered manifests break rules of the operator: {broken}")
    return manifests


def read_stream(path: Path, overrides: Sequence[str] = ()) -> tuple[StreamConfig, str]:
    """Return a stream and its YAML with overrides in it, as `render` takes them.

    Raises:
        ConfigError: as `pipelines.load.load_config`.
    """
    config = load_config(path, overrides)
    if not overrides:
        return config, path.read_text(encoding="utf-8")
    return config, yaml.safe_dump(read_values(path, overrides), sort_keys=False)


def _base(found: Scene, stream_text: str) -> list[dict[str, Any]]:
    stream = text_map(found, "stream", HEAD, {"stream.yaml": placed_stream(found, stream_text)})
    return [
        *access(found),
        stream,
        *claims(found),
        *network_policies(found),
        *disruption_budgets(found),
        *mlflow_server(found),
    ]
