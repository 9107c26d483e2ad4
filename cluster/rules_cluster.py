"""What KubeRay refuses about a RayCluster beyond its schema, as the operator's validation has it.

Feature gates stand at their defaults: what a gate that is off would allow is refused. Each rule yields a
sentence per breach; none means that the operator would take the spec.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Spec = dict[str, Any]
Complaints = Iterator[str]

_TOKEN_SINCE, _PRIORITY_SINCE = (2, 52), (2, 56)
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_AUTOSCALER_ENV = "RAY_enable_autoscaler_v2"
# Gates that are off by default, and the field that each of them opens.
_GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}


def cluster_violations(spec: Spec, annotations: dict[str, str]) -> Complaints:
    """Yield what is wrong with the spec of a RayCluster.

    Args:
        spec: of a RayCluster, or `rayClusterSpec` of a RayJob.
        annotations: of the object that holds it.
    """
    for rule in RULES:
        yield from rule(spec)
    yield from _annotations(spec, annotations)


def _groups(spec: Spec) -> Iterator[tuple[str, Spec]]:
    yield "head", spec["headGroupSpec"]
    for group in spec.get("workerGroupSpecs", ()):
        yield f"group {group['groupName']}", group


def _containers(group: Spec) -> list[Spec]:
    return group["template"].get("spec", {}).get("containers", [])


def _variables(group: Spec) -> dict[str, Any]:
    found = _containers(group)
    return {item["name"]: item.get("value") for item in (found[0].get("env", []) if found else [])}


def _autoscales(spec: Spec) -> bool:
    return bool(spec.get("enableInTreeAutoscaling"))


def _second_autoscaler(spec: Spec) -> bool:
    if not _autoscales(spec):
        return False
    chosen = spec.get("autoscalerOptions", {}).get("version")
    by_variable = _variables(spec["headGroupSpec"]).get(_AUTOSCALER_ENV) in ("1", "true")
    return chosen == "v2" or (chosen is None and by_variable)


def _version(spec: Spec) -> tuple[int, ...]:
    found = re.match(r"v?(\d+)\.(\d+)", spec.get("rayVersion", ""))
    return tuple(map(int, found.groups())) if found else ()


def _has_containers(spec: Spec) -> Complaints:
    for name, group in _groups(spec):
        if not _containers(group):
            yield f"{name} has no container"


def _resources_once(spec: Spec) -> Complaints:
    for name, group in _groups(spec):
        params = group.get("rayStartParams", {})
        if group.get("resources") and any(key in params for key in _RESOURCE_PARAMS):
            yield f"{name} has resources in rayStartParams and in resources"


def _labels(spec: Spec) -> Complaints:
    for name, group in _groups(spec):
        if "labels" in group.get("rayStartParams", {}):
            yield f"{name} has labels in rayStartParams"
        for key, value in group.get("labels", {}).items():
            if not _LABEL.fullmatch(key.rpartition("/")[2]) or (
                value and not _LABEL.fullmatch(value)
            ):
                yield f"{name} has the label {key}={value}, which is none"


def _replicas(spec: Spec) -> Complaints:
    for group in spec.get("workerGroupSpecs", ()):
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        name = f"group {group['groupName']}"
        if low is None or high is None:
            if not _autoscales(spec):
                yield f"{name} lacks minReplicas or maxReplicas, without the autoscaler"
            continue
        if low < 0 or high < 0:
            yield f"{name} has negative replicas"
        if low > high:
            yield f"{name} has minReplicas {low} above maxReplicas {high}"


def _autoscaler(spec: Spec) -> Complaints:
    options, variables = spec.get("autoscalerOptions", {}), _variables(spec["headGroupSpec"])
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if any(item["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for item in options.get("env", ())):
        yield "autoscalerOptions.env sets KUBERAY_GEN_AUTOSCALER_START_CMD, which is the operator's"
    if not _autoscales(spec) and variables.get(_AUTOSCALER_ENV) in ("1", "true"):
        yield f"{_AUTOSCALER_ENV} is set without enableInTreeAutoscaling"
    if _autoscales(spec) and "version" in options and _AUTOSCALER_ENV in variables:
        yield f"autoscalerOptions.version and {_AUTOSCALER_ENV} are both set"
    for name, group in _groups(spec):
        policy = group["template"].get("spec", {}).get("restartPolicy", "Never")
        if _second_autoscaler(spec) and policy != "Never":
            yield f"{name} has restartPolicy {policy} under autoscaler v2, which needs Never or none"
        if _autoscales(spec) and group.get("suspend"):
            yield f"{name} is suspended under the autoscaler"


def _group_options(spec: Spec) -> Complaints:
    for group in spec.get("workerGroupSpecs", ()):
        name, idle = f"group {group['groupName']}", group.get("idleTimeoutSeconds")
        if idle is not None and idle < 0:
            yield f"{name} has a negative idleTimeoutSeconds"
        if idle is not None and not _second_autoscaler(spec):
            yield f"{name} has idleTimeoutSeconds without autoscaler v2"
        if group.get("priority") and not _second_autoscaler(spec):
            yield f"{name} has a priority without autoscaler v2"
        if group.get("priority") and _version(spec) < _PRIORITY_SINCE:
            yield f"{name} has a priority, which needs rayVersion 2.56"


def _fault_tolerance(spec: Spec) -> Complaints:
    options, head = spec.get("gcsFaultToleranceOptions"), spec["headGroupSpec"]
    variables, params = _variables(head), head.get("rayStartParams", {})
    if "redis-username" in params or "REDIS_USERNAME" in variables:
        yield "the head sets a Redis user itself; gcsFaultToleranceOptions.redisUsername does that"
    if options is None:
        if "RAY_REDIS_ADDRESS" in variables:
            yield "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions"
        return
    if "redis-password" in params or "REDIS_PASSWORD" in variables:
        yield "the head sets Redis's password itself, beside gcsFaultToleranceOptions"
    if "RAY_REDIS_ADDRESS" in variables:
        yield "the head sets RAY_REDIS_ADDRESS itself, beside gcsFaultToleranceOptions"
    if options.get("backend", "redis") == "rocksdb":
        yield "the gate GCSFaultToleranceEmbeddedStorage of the backend rocksdb is off"
    elif "storage" in options:
        yield "gcsFaultToleranceOptions.storage is for the backend rocksdb alone"


def _authentication(spec: Spec) -> Complaints:
    options = spec.get("authOptions")
    by_kubernetes = bool(options and options.get("enableK8sTokenAuth"))
    if options is None or options.get("mode", "token") != "token":
        yield "token authentication is off" + (
            " and enableK8sTokenAuth on, which needs it" if by_kubernetes else ""
        )
        return
    if _version(spec) < _TOKEN_SINCE:
        yield f"token authentication needs rayVersion 2.52, found {spec.get('rayVersion')!r}"
    if by_kubernetes and options.get("secretName"):
        yield "enableK8sTokenAuth and authOptions.secretName are both set"


def _gates(spec: Spec) -> Complaints:
    for field, gate in _GATED.items():
        if field in spec:
            yield f"{field} needs the gate {gate}, which is off by default"


def _annotations(spec: Spec, annotations: dict[str, str]) -> Complaints:
    if "gcsFaultToleranceOptions" in spec:
        for name in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
            if annotations.get(name):
                yield f"the annotation {name} and gcsFaultToleranceOptions are both set"


RULES: tuple[Callable[[Spec], Complaints], ...] = (
    _has_containers,
    _resources_once,
    _labels,
    _replicas,
    _autoscaler,
    _group_options,
    _fault_tolerance,
    _authentication,
    _gates,
)
