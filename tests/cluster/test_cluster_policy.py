"""Every pod of every overlay runs without rights that it does not need, and nothing holds a secret."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.names import COMPONENT
from pipelines.cluster_values import secretive
from tests.cluster.rendered import NAMES, manifests_of

Value = Any
OVERLAYS = [
    pytest.param(name, overlay, id=f"{name}/{overlay}")
    for name in NAMES
    for overlay in manifests_of(name).overlays
]
# The pods that call the API server.
WITH_CREDENTIALS = {"schedule"}


def walk(value: Value) -> Iterator[dict[str, Any]]:
    """Every mapping below a value, and itself."""
    if isinstance(value, dict):
        yield value
    items = value.values() if isinstance(value, dict) else ()
    for item in value if isinstance(value, list) else items:
        yield from walk(item)


def pods_of(manifests: list[Value]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Labels and spec of every pod template, wherever it is."""
    return [
        (item["metadata"]["labels"], item["spec"])
        for item in walk(manifests)
        if "metadata" in item and "containers" in (item.get("spec") or {})
    ]


def complaints(manifests: list[Value]) -> list[str]:
    """What a platform's policy has against manifests."""
    found: list[str] = []
    for labels, spec in pods_of(manifests):
        found += [f"{labels[COMPONENT]}: {text}" for text in of_pod(labels[COMPONENT], spec)]
    for item in walk(manifests):
        if "autoscalerOptions" in item:
            found += of_container(item["autoscalerOptions"] | {"image": "its:own"})
        if "rayVersion" in item and item.get("authOptions", {}).get("mode") != "token":
            found.append("token authentication is off")
        if item.get("kind") == "Secret":
            found.append("a Secret is rendered")
        if item.get("kind") in ("ClusterRole", "ClusterRoleBinding"):
            found.append("a role goes beyond the namespace")
        if "verbs" in item and "*" in [*item["verbs"], *item.get("resources", ())]:
            found.append("a role allows everything")
        value = item.get("value")
        if isinstance(value, str) and value[:1] != "/" and secretive(item.get("name", "")):
            found.append(f"{item['name']} is written out")
    return found


def of_pod(component: str, spec: dict[str, Any]) -> Iterator[str]:
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser", 0) == 0:
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "no seccomp profile"
    if any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the node's namespaces"
    if any("hostPath" in volume for volume in spec.get("volumes", ())):
        yield "mounts the node's disk"
    for volume in spec.get("volumes", ()):
        if "emptyDir" in volume and not volume["emptyDir"].get("sizeLimit"):
            yield f"volume {volume['name']} has no limit"
    autoscaler = component == "ray-head" and spec["automountServiceAccountToken"]
    if (
        spec["automountServiceAccountToken"]
        and component not in WITH_CREDENTIALS
        and not autoscaler
    ):
        yield "gets credentials that it does not need"
    if spec.get("serviceAccountName", "default") == "default":
        yield "runs as the namespace's account"
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        yield from of_container(container)
        names = {item["name"]: item.get("value") for item in container.get("env", ())}
        if component.startswith("ray-") and names.get("RAY_AUTH_MODE") != "token":
            yield "Ray without a token"


def of_container(container: dict[str, Any]) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("privileged"):
        yield "privileged"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    if security.get("capabilities") != {"drop": ["ALL"]}:
        yield "has capabilities"
    if not security.get("readOnlyRootFilesystem"):
        yield "may write to its image"
    if not security.get("runAsNonRoot") or security.get("runAsUser") == 0:
        yield "may run as root"
    for bound in ("requests", "limits"):
        if not {"cpu", "memory"} <= set(container.get("resources", {}).get(bound, ())):
            yield f"has no {bound}"
    if ":" not in container["image"].rpartition("/")[2] or container["image"].endswith(":latest"):
        yield "image is not pinned"


@pytest.mark.parametrize(("name", "overlay"), OVERLAYS)
def test_every_pod_of_every_overlay_keeps_the_policy(name: str, overlay: str) -> None:
    found = manifests_of(name)
    manifests = [*found.base, *found.overlays[overlay]]
    assert pods_of(manifests)
    assert complaints(manifests) == []


@pytest.mark.parametrize("name", NAMES)
def test_only_a_head_with_the_autoscaler_and_the_schedule_get_credentials(name: str) -> None:
    found = manifests_of(name)
    scales = found.ray_cluster["spec"].get("enableInTreeAutoscaling", False)
    expected = {"schedule"} if found.of_kind("CronJob") else set()
    expected |= {"ray-head"} if scales else set()
    given = {
        labels[COMPONENT]
        for labels, spec in pods_of(list(found.all))
        if spec["automountServiceAccountToken"]
    }
    assert given == expected


def pod(manifests: list[Value]) -> dict[str, Any]:
    return pods_of(manifests)[0][1]


def container(manifests: list[Value]) -> dict[str, Any]:
    return pod(manifests)["containers"][0]


BREACHES: dict[str, Callable[[list[Value]], object]] = {
    "may run as root": lambda found: pod(found)["securityContext"].update(runAsUser=0),
    "no seccomp profile": lambda found: pod(found)["securityContext"].pop("seccompProfile"),
    "shares the node's namespaces": lambda found: pod(found).update(hostNetwork=True),
    "mounts the node's disk": lambda found: pod(found)["volumes"].append({"hostPath": {}}),
    "has no limit": lambda found: pod(found)["volumes"][0]["emptyDir"].pop("sizeLimit"),
    "credentials": lambda found: pod(found).update(automountServiceAccountToken=True),
    "namespace's account": lambda found: pod(found).pop("serviceAccountName"),
    "Ray without a token": lambda found: container(found).update(env=[]),
    "privileged": lambda found: container(found)["securityContext"].update(privileged=True),
    "may gain privileges": lambda found: container(found)["securityContext"].pop(
        "allowPrivilegeEscalation"
    ),
    "has capabilities": lambda found: container(found)["securityContext"].pop("capabilities"),
    "may write to its image": lambda found: container(found)["securityContext"].pop(
        "readOnlyRootFilesystem"
    ),
    "has no limits": lambda found: container(found)["resources"].pop("limits"),
    "image is not pinned": lambda found: container(found).update(image="registry:5000/seekr"),
    "token authentication is off": lambda found: found[0]["spec"].update(authOptions={}),
    "a Secret is rendered": lambda found: found.append({"kind": "Secret"}),
    "is written out": lambda found: container(found)["env"].append(
        {"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}
    ),
    "allows everything": lambda found: found.append({"verbs": ["*"]}),
    "beyond the namespace": lambda found: found.append({"kind": "ClusterRole"}),
}


@pytest.mark.parametrize("text", BREACHES)
def test_the_walk_sees_a_breach(text: str) -> None:
    manifests: list[Value] = [copy.deepcopy(manifests_of("cpu dev").ray_cluster)]
    if text == "credentials":
        manifests = [copy.deepcopy(manifests_of("weekly_7b.yaml").of_kind("Deployment")[0])]
    BREACHES[text](manifests)
    assert any(text in complaint for complaint in complaints(manifests))
