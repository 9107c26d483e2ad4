"""What is made on a cluster, by name: one stream's objects, the labels that tell them apart, and folders.

Every name begins with the stream's, so several streams live in one namespace, and labels say what a pod
is for. Policies select by these labels, never by those that the operator adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.cluster_config import ClusterConfig
from pipelines.cluster_layout import Layout, layout
from pipelines.cluster_rules import cluster_name
from seekr.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.config import StreamConfig

INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"
HEAD, WORKER, SUBMITTER, TRIGGER = "ray-head", "ray-worker", "submitter", "schedule"
MLFLOW, DATABASE = "mlflow", "mlflow-db"
STARTED_BY = "app.kubernetes.io/managed-by"
"""Label of the RayJobs that a schedule has created, with the schedule's component."""
RAY = (HEAD, WORKER)

STREAM_FOLDER = "/etc/seekr"
STREAM_FILE = f"{STREAM_FOLDER}/stream.yaml"
HOME = "/home/seekr"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A stream and all that manifests are made of.

    Attributes:
        config: the stream.
        cluster: its cluster section.
        name: of what is made.
        pods: how many workers there are.
    """

    config: StreamConfig
    cluster: ClusterConfig
    name: str
    pods: Layout

    def called(self, part: str = "") -> str:
        """Return the name of a part: `weekly`, `weekly-head`."""
        return f"{self.name}-{part}" if part else self.name

    def labels(self, component: str) -> dict[str, str]:
        """Return the labels of an object that belongs to a component."""
        return {
            "app.kubernetes.io/part-of": "seekr",
            INSTANCE: self.name,
            COMPONENT: component,
        }

    def selector(self, *components: str) -> dict[str, Any]:
        """Return a label selector for the pods of components."""
        return {
            "matchLabels": {INSTANCE: self.name},
            "matchExpressions": [
                {"key": COMPONENT, "operator": "In", "values": list(components)},
            ],
        }

    def object(
        self, api: str, kind: str, part: str, component: str, **fields: Any
    ) -> dict[str, Any]:
        """Return an object of the namespace; `fields` are what it has beside its metadata."""
        metadata = {
            "name": self.called(part),
            "namespace": self.cluster.namespace,
            "labels": self.labels(component),
        }
        return {"apiVersion": api, "kind": kind, "metadata": metadata, **fields}

    @property
    def command(self) -> str:
        """What runs on the head, without a character that a shell would read, as two of them do.

        A stream with an inbox takes in first what has arrived. One with a gate ends with 0 also where that
        has held the newest model back: the operator would try it again on a new cluster.
        """
        verb = "run" if self.config.tasks_from is None else "tick"
        gated = "" if self.config.gate is None else " --held-back-ok"
        return f"seekr {verb} {STREAM_FILE}{gated}"

    def host(self, part: str) -> str:
        """Return the name by which a Service is reached from anywhere in the cluster."""
        return f"{self.called(part)}.{self.cluster.namespace}.svc"


def scene(config: StreamConfig) -> Scene:
    """Return what manifests of a stream are made of.

    Raises:
        ConfigError: it has no cluster section.
    """
    cluster = config.cluster
    if cluster is None:
        raise ConfigError(
            f"stream {config.name} has no cluster section, so there is nothing to render; add one with at "
            "least `cluster: {image: registry.example.com/seekr:1.0}`, see docs/cluster.md"
        )
    return Scene(
        config=config, cluster=cluster, name=cluster_name(config), pods=layout(config, cluster)
    )
