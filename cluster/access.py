"""Who may do what: an account per kind of pod, and roles with no more than what is called.

Pods do not get their account's credentials, but for the head under the autoscaler, whose role the operator
makes, and the pod that a schedule starts. `submit` is for people and pipelines outside.
"""

from __future__ import annotations

from typing import Any

from cluster.names import DATABASE, HEAD, MLFLOW, SUBMITTER, TRIGGER, WORKER, Scene

_RBAC = "rbac.authorization.k8s.io"
_FOLLOW = [
    {
        "apiGroups": ["ray.io"],
        "resources": ["rayjobs"],
        "verbs": ["create", "delete", "get", "list", "watch"],
    },
    {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    # `ray job stop` is called where the cluster's token is: only so can trainings save.
    {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["create", "get"]},
]
# Whether what a run needs is there, and as the stream says.
_LOOK = [
    {
        "apiGroups": [""],
        "resources": ["persistentvolumeclaims", "serviceaccounts", "services"],
        "verbs": ["get"],
    },
    {"apiGroups": ["apps"], "resources": ["deployments", "statefulsets"], "verbs": ["get"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["get"]},
    {"apiGroups": ["policy"], "resources": ["poddisruptionbudgets"], "verbs": ["get"]},
    {"apiGroups": [_RBAC], "resources": ["rolebindings", "roles"], "verbs": ["get"]},
]
_START = [
    {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "delete", "list"]},
]


def access(scene: Scene) -> list[dict[str, Any]]:
    """Return accounts, roles and bindings."""
    identity = dict(scene.cluster.service_account_annotations)
    found = [
        _account(scene, "head", HEAD, identity),
        _account(scene, "worker", WORKER, identity),
        _account(scene, "submit", SUBMITTER, {}),
        *_granted(scene, "submit", SUBMITTER, [*_FOLLOW, *_LOOK, _stream(scene)]),
    ]
    schedule, mlflow = scene.cluster.schedule, scene.cluster.mlflow
    if schedule is not None and schedule.kind == "CronJob":
        found.append(_account(scene, "schedule", TRIGGER, {}))
        found += _granted(scene, "schedule", TRIGGER, _START)
    if mlflow is not None and mlflow.deploy is not None:
        found.append(_account(scene, "mlflow", MLFLOW, identity))
        found.append(_account(scene, "mlflow-db", DATABASE, {}))
    return found


def _stream(scene: Scene) -> dict[str, Any]:
    """Return the right to submit the stream as it has become: its ConfigMap, and no other."""
    return {
        "apiGroups": [""],
        "resources": ["configmaps"],
        "resourceNames": [scene.called("stream")],
        "verbs": ["get", "patch"],
    }


def _account(
    scene: Scene, part: str, component: str, annotations: dict[str, str]
) -> dict[str, Any]:
    account = scene.object(
        "v1", "ServiceAccount", part, component, automountServiceAccountToken=False
    )
    if annotations:
        account["metadata"]["annotations"] = annotations
    return account


def _granted(
    scene: Scene, part: str, component: str, rules: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    name = scene.called(part)
    subject = {"kind": "ServiceAccount", "name": name, "namespace": scene.cluster.namespace}
    reference = {"apiGroup": _RBAC, "kind": "Role", "name": name}
    return [
        scene.object(f"{_RBAC}/v1", "Role", part, component, rules=rules),
        scene.object(
            f"{_RBAC}/v1", "RoleBinding", part, component, subjects=[subject], roleRef=reference
        ),
    ]
