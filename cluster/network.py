"""Who may talk to whom: a NetworkPolicy per kind of pod, each in and out, everything else closed.

Ray's pods talk to each other on any port. The operator asks the dashboard how a job does, Prometheus reads
metrics, people come from the namespaces that are named. Out of the cluster go what `cluster.network.egress`
allows and the ports of what the stream itself names: MLflow, Redis, an object store.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from cluster.names import DATABASE, HEAD, MLFLOW, RAY, SUBMITTER, TRIGGER, Scene
from cluster.ray_cluster import DASHBOARD_PORT, METRICS_PORT

MLFLOW_PORT, DATABASE_PORT = 5000, 5432
# Of the dashboard and of the autoscaler, on the head.
_HEAD_METRICS = (44217, 44227)
# Of the API server, which has no label: behind its Service and on its hosts.
_API_PORTS = (443, 6443)
_NAMESPACE = "kubernetes.io/metadata.name"
# Where NodeLocal DNSCache answers, on every node that has one.
_NODE_DNS = "169.254.20.10/32"


def network_policies(scene: Scene) -> list[dict[str, Any]]:
    """Return the policies."""
    cluster = scene.cluster
    deployed = cluster.mlflow is not None and cluster.mlflow.deploy is not None
    found = [_ray(scene, deployed=deployed)]
    if cluster.autoscaler is not None:
        found.append(_policy(scene, "head-api", (HEAD,), [], [_to_api()]))
    if cluster.job.submission == "K8sJobMode":
        out = [_out(_pods(scene, HEAD), DASHBOARD_PORT), _dns()]
        found.append(_policy(scene, "submitter", (SUBMITTER,), [], out))
    if cluster.schedule is not None and cluster.schedule.kind == "CronJob":
        found.append(_policy(scene, "schedule", (TRIGGER,), [], [_dns(), _to_api()]))
    return found + (_mlflow(scene) if deployed else [])


def _ray(scene: Scene, *, deployed: bool) -> dict[str, Any]:
    network = scene.cluster.network
    operator = {
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        "namespaceSelector": _namespace(network.operator_namespace),
    }
    clients = [{"namespaceSelector": _namespace(name)} for name in network.client_namespaces]
    inward = [
        {"from": _pods(scene, *RAY)},
        _in([*_pods(scene, SUBMITTER), operator, *clients], DASHBOARD_PORT),
    ]
    if scene.cluster.metrics and network.monitoring_namespace is not None:
        monitoring = {"namespaceSelector": _namespace(network.monitoring_namespace)}
        inward.append(_in([monitoring], METRICS_PORT, *_HEAD_METRICS))
    cluster = scene.cluster
    named = [cluster.storage.object_store.endpoint]
    if cluster.mlflow is not None:
        named.append(cluster.mlflow.uri)
    if cluster.redis is not None:
        named.append(f"redis://{cluster.redis.address.rpartition('//')[2]}")
    outward = [{"to": _pods(scene, *RAY)}, _dns(), *_outside(scene, named)]
    if deployed:
        outward.append(_out(_pods(scene, MLFLOW), MLFLOW_PORT))
    return _policy(scene, "ray", RAY, inward, outward)


def _mlflow(scene: Scene) -> list[dict[str, Any]]:
    network, server = scene.cluster.network, scene.cluster.mlflow
    clients = [{"namespaceSelector": _namespace(name)} for name in network.client_namespaces]
    outward = [_out(_pods(scene, DATABASE), DATABASE_PORT), _dns()]
    if server is not None and server.deploy is not None and server.deploy.artifacts is not None:
        outward += _outside(scene, [scene.cluster.storage.object_store.endpoint])
    inward = [_in([*_pods(scene, *RAY), *clients], MLFLOW_PORT)]
    return [
        _policy(scene, "mlflow", (MLFLOW,), inward, outward),
        _policy(
            scene, "mlflow-db", (DATABASE,), [_in(_pods(scene, MLFLOW), DATABASE_PORT)], [_dns()]
        ),
    ]


def _outside(scene: Scene, named: list[str | None]) -> list[dict[str, Any]]:
    """Return what may be reached outside: what is allowed, and the ports of named addresses."""
    rules: list[dict[str, Any]] = []
    for item in scene.cluster.network.egress:
        block: dict[str, Any] = {"cidr": item.cidr}
        if item.without:
            block["except"] = list(item.without)
        rules.append(_out([{"ipBlock": block}], *item.ports))
    ports = {_port(address) for address in named if address is not None}
    return [*rules, {"ports": _ports(*sorted(ports))}] if ports else rules


def _port(address: str) -> int:
    parts = urlsplit(address)
    return parts.port or (80 if parts.scheme == "http" else 443)


def _policy(
    scene: Scene,
    part: str,
    components: tuple[str, ...],
    inward: list[dict[str, Any]],
    outward: list[dict[str, Any]],
) -> dict[str, Any]:
    spec = {
        "podSelector": scene.selector(*components),
        "policyTypes": ["Ingress", "Egress"],
        "ingress": inward,
        "egress": outward,
    }
    return scene.object("networking.k8s.io/v1", "NetworkPolicy", part, components[0], spec=spec)


def _pods(scene: Scene, *components: str) -> list[dict[str, Any]]:
    return [{"podSelector": scene.selector(*components)}]


def _namespace(name: str | None) -> dict[str, Any]:
    return {} if name is None else {"matchLabels": {_NAMESPACE: name}}


def _in(sources: list[dict[str, Any]], *ports: int) -> dict[str, Any]:
    return {"from": sources, "ports": _ports(*ports)}


def _out(targets: list[dict[str, Any]], *ports: int) -> dict[str, Any]:
    return {"to": targets, "ports": _ports(*ports)}


def _ports(*ports: int, protocol: str = "TCP") -> list[dict[str, Any]]:
    return [{"protocol": protocol, "port": port} for port in ports]


def _dns() -> dict[str, Any]:
    ports = _ports(53, protocol="UDP") + _ports(53)
    servers = [{"namespaceSelector": _namespace("kube-system")}, {"ipBlock": {"cidr": _NODE_DNS}}]
    return {"to": servers, "ports": ports}


def _to_api() -> dict[str, Any]:
    return {"ports": _ports(*_API_PORTS)}
