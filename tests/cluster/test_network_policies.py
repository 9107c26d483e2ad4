"""Who may talk to whom, by evaluating the rendered policies as a network plugin does."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from cluster.names import COMPONENT, INSTANCE
from cluster.render import Manifests
from tests.cluster.rendered import NAMES, manifests_of, rendered
from tests.cluster.test_cluster_policy import pods_of

Peer = dict[str, Any]
OPERATOR = {"namespace": "kuberay-system", "labels": {"app.kubernetes.io/name": "kuberay-operator"}}
PROMETHEUS = {"namespace": "monitoring", "labels": {"app": "prometheus"}}
DNS = {"namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}}
STRANGER = {"namespace": "other", "labels": {"app": "other"}}
WORLD = {"address": "93.184.216.34"}
METADATA = {"address": "169.254.169.254"}


def pod(component: str, instance: str = "weekly", namespace: str = "seekr") -> Peer:
    return {"namespace": namespace, "labels": {INSTANCE: instance, COMPONENT: component}}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    ranges = selector.get("matchExpressions", [])
    assert all(item["operator"] == "In" for item in ranges)
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(item["key"]) in item["values"] for item in ranges
    )


def is_peer(item: dict[str, Any], peer: Peer, home: str) -> bool:
    if "ipBlock" in item:
        address = ip_address(peer.get("address", "10.1.2.3"))
        block = item["ipBlock"]
        inside = address in ip_network(block["cidr"])
        return inside and not any(address in ip_network(out) for out in block.get("except", ()))
    if "address" in peer:
        return False
    if "namespaceSelector" in item:
        namespace = {"kubernetes.io/metadata.name": peer["namespace"]}
        if not selects(item["namespaceSelector"], namespace):
            return False
    elif peer["namespace"] != home:
        return False
    return selects(item.get("podSelector", {}), peer["labels"])


def allowed(found: Manifests, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection gets out of its source and into its target."""
    return _one_way(found, "egress", "to", source, target, port, protocol) and _one_way(
        found, "ingress", "from", target, source, port, protocol
    )


def _one_way(
    found: Manifests, way: str, key: str, mine: Peer, other: Peer, port: int, protocol: str
) -> bool:
    policies = [
        item
        for item in found.of_kind("NetworkPolicy")
        if mine.get("namespace") == item["metadata"]["namespace"]
        and selects(item["spec"]["podSelector"], mine["labels"])
    ]
    if not policies:  # nothing restricts it
        return True
    for policy in policies:
        assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        for rule in policy["spec"][way]:
            peers = rule.get(key)
            if peers is not None and not any(
                is_peer(item, other, policy["metadata"]["namespace"]) for item in peers
            ):
                continue
            ports = rule.get("ports")
            if ports is None or {"protocol": protocol, "port": port} in ports:
                return True
    return False


@pytest.mark.parametrize("name", NAMES)
def test_every_pod_is_under_a_policy(name: str) -> None:
    found = manifests_of(name)
    policies = found.of_kind("NetworkPolicy")
    for labels, _ in pods_of(list(found.all)):
        assert any(selects(item["spec"]["podSelector"], labels) for item in policies), labels


def test_rays_pods_talk_to_each_other_and_to_nobody_else() -> None:
    found = manifests_of("one node of 8 GPUs")
    head, worker = pod("ray-head"), pod("ray-worker")
    for port in (6379, 8265, 10001, 34567):
        assert allowed(found, worker, head, port)
        assert allowed(found, head, worker, port)
        assert not allowed(found, STRANGER, head, port)
        assert not allowed(found, pod("ray-head", instance="other"), head, port)
        assert not allowed(found, worker, STRANGER, port)
        assert not allowed(found, worker, WORLD, port)
    assert allowed(found, pod("submitter"), head, 8265)
    assert not allowed(found, pod("submitter"), head, 6379)
    assert not allowed(found, pod("submitter"), worker, 8265)


def test_the_operator_prometheus_and_people_come_in_where_they_need_to() -> None:
    head = pod("ray-head")
    found = manifests_of("cpu dev")
    assert allowed(found, OPERATOR, head, 8265)
    assert not allowed(found, OPERATOR, head, 6379)
    assert allowed(found, PROMETHEUS, head, 8080)
    assert not allowed(found, PROMETHEUS, head, 8265)
    tight = {"operator_namespace": "ray-operators", "client_namespaces": ["other"]}
    found = rendered("cpu dev", cluster={"network": tight})
    assert not allowed(found, OPERATOR, head, 8265)
    assert allowed(found, OPERATOR | {"namespace": "ray-operators"}, head, 8265)
    assert allowed(found, STRANGER, head, 8265)
    assert not allowed(found, STRANGER, head, 10001)


def test_names_are_resolved_and_https_goes_out_but_not_to_the_metadata_server() -> None:
    found, worker = manifests_of("cpu dev"), pod("ray-worker")
    assert allowed(found, worker, DNS, 53, "UDP")
    assert allowed(found, worker, {"address": "169.254.20.10"}, 53, "UDP")
    assert allowed(found, worker, WORLD, 443)
    assert not allowed(found, worker, WORLD, 80)
    assert not allowed(found, worker, METADATA, 443)
    assert not allowed(found, worker, METADATA, 80)


def test_an_air_gapped_cluster_lets_nothing_out() -> None:
    found = manifests_of("air-gapped")
    assert not allowed(found, pod("ray-worker"), WORLD, 443)
    assert not allowed(found, PROMETHEUS, pod("ray-head"), 8080)
    assert allowed(found, pod("ray-worker"), pod("mlflow"), 5000)


def test_what_the_stream_names_can_be_reached() -> None:
    worker = pod("ray-worker")
    found = manifests_of("S3 that is not Amazon's")
    assert allowed(found, worker, {"address": "10.2.3.4"}, 9000)
    assert allowed(found, pod("ray-head"), {"address": "10.2.3.4"}, 6379)
    assert allowed(found, pod("mlflow"), {"address": "10.2.3.4"}, 9000)
    assert allowed(manifests_of("external MLflow"), worker, WORLD, 8443)
    assert not allowed(manifests_of("cpu dev"), worker, WORLD, 8443)


def test_only_mlflow_reaches_its_database() -> None:
    found = manifests_of("weekly_7b.yaml")
    at = {"namespace": "training"}
    server, database = pod("mlflow", **at), pod("mlflow-db", **at)
    worker = pod("ray-worker", **at)
    assert allowed(found, worker, server, 5000)
    assert allowed(found, {**STRANGER, "namespace": "ingress"}, server, 5000)
    assert not allowed(found, STRANGER, server, 5000)
    assert allowed(found, server, database, 5432)
    assert not allowed(found, worker, database, 5432)
    assert not allowed(found, database, WORLD, 443)


def test_only_the_schedule_and_a_head_with_the_autoscaler_reach_the_api_server() -> None:
    api = {"address": "10.0.0.1"}
    closed = {"network": {"egress": []}}
    found = rendered("CronJob", cluster=closed)
    assert allowed(found, pod("schedule"), api, 443)
    assert not allowed(found, pod("ray-head"), api, 443)
    found = rendered("elastic with spot", cluster=closed)
    assert allowed(found, pod("ray-head"), api, 6443)
    assert not allowed(found, pod("ray-worker"), api, 6443)
