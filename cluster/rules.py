"""What KubeRay, Kueue and Kubernetes refuse beyond the schemas, as checks over plain manifests.

The API server takes what the schema allows; the operator then says no in an event that nobody looks at,
and Kueue leaves a job waiting for ever. So the same rules are kept here, read in the released sources of
KubeRay (`validation.go`) and Kueue (`rayjob_webhook.go`), and every rendering is held against them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from cluster.ray_job import QUEUE
from cluster.rules_cluster import cluster_violations
from pipelines.cluster_values import cron_fields

MAX_CLUSTER_NAME, MAX_JOB_NAME, MAX_CRON_NAME = 53, 47, 36
_KUEUE_GROUPS = 7
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_STAGES = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")

Manifest = dict[str, Any]
Complaints = Iterator[str]


def violations(manifests: Iterable[Manifest]) -> tuple[str, ...]:
    """Return what is wrong with manifests, each with the object it is about; empty when all is well."""
    found: list[str] = []
    for manifest in manifests:
        check = _CHECKS.get(manifest["kind"])
        if check is not None:
            name = f"{manifest['kind']} {manifest['metadata']['name']}"
            found += [f"{name}: {complaint}" for complaint in check(manifest)]
    return tuple(found)


def _ray_cluster(manifest: Manifest) -> Complaints:
    yield from _name(manifest, MAX_CLUSTER_NAME)
    yield from cluster_violations(manifest["spec"], _annotations(manifest))


def _ray_job(manifest: Manifest) -> Complaints:
    yield from _name(manifest, MAX_JOB_NAME)
    yield from _job_spec(manifest["spec"], _annotations(manifest))
    if manifest["metadata"].get("labels", {}).get(QUEUE):
        yield from _kueue(manifest["spec"])


def _ray_cron_job(manifest: Manifest) -> Complaints:
    spec = manifest["spec"]
    yield from _name(manifest, MAX_CRON_NAME)
    try:
        cron_fields(spec["schedule"])
    except ValueError as error:
        yield f"schedule {spec['schedule']!r}: {error}"
    if spec.get("timeZone") == "":
        yield "timeZone is empty; leave it out"
    if manifest["metadata"].get("labels", {}).get(QUEUE):
        yield "a RayCronJob gives its children no labels, so Kueue would not see them"
    yield from _job_spec(spec["jobTemplate"], {})


def _budget(manifest: Manifest) -> Complaints:
    spec = manifest["spec"]
    if "maxUnavailable" in spec or not isinstance(spec.get("minAvailable"), int):
        yield (
            "pods of the operator have no scale that Kubernetes knows, so only a minAvailable that is a "
            "number protects them"
        )


def _annotations(manifest: Manifest) -> dict[str, str]:
    return manifest["metadata"].get("annotations", {})


def _name(manifest: Manifest, longest: int) -> Complaints:
    name = manifest["metadata"]["name"]
    if len(name) > longest:
        yield f"the name has {len(name)} characters, at most {longest} are allowed"
    if not _DNS_1035.fullmatch(name):
        yield f"the name {name!r} is no DNS label"


def _job_spec(spec: Manifest, annotations: dict[str, str]) -> Complaints:
    yield from _bounds(spec)
    yield from _placement(spec)
    yield from _submission(spec)
    yield from _deletion(spec)
    cluster = spec.get("rayClusterSpec")
    if cluster is not None:
        if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
            yield "enableK8sTokenAuth is not supported for RayJobs"
        if cluster.get("upgradeStrategy"):
            yield "upgradeStrategy is for clusters that people make themselves"
        yield from cluster_violations(cluster, annotations)


def _bounds(spec: Manifest) -> Complaints:
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field) is not None and spec[field] <= 0:
            yield f"{field} is {spec[field]}, above 0 is needed"
    if (spec.get("backoffLimit") or 0) < 0:
        yield f"backoffLimit is {spec['backoffLimit']}, 0 or more is needed"
    try:
        if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
            yield "runtimeEnvYAML is no mapping"
    except yaml.YAMLError:
        yield "runtimeEnvYAML is no YAML"


def _placement(spec: Manifest) -> Complaints:
    selector = spec.get("clusterSelector")
    if selector is None:
        if spec.get("rayClusterSpec") is None:
            yield "neither rayClusterSpec nor clusterSelector is set"
        return
    if not selector.get("ray.io/cluster"):
        yield "clusterSelector names no cluster under ray.io/cluster"
    if spec.get("submissionMode") == "SidecarMode":
        yield "clusterSelector and SidecarMode do not go together"
    if spec.get("backoffLimit"):
        yield "clusterSelector and backoffLimit do not go together"
    if spec.get("suspend"):
        yield "clusterSelector and suspend do not go together"


def _submission(spec: Manifest) -> Complaints:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "InteractiveMode and backoffLimit do not go together"
    if mode != "SidecarMode":
        return
    for field in ("submitterPodTemplate", "submitterConfig"):
        if spec.get(field) is not None:
            yield f"SidecarMode has no submitter of its own, and {field} is set"
    head = spec.get("rayClusterSpec", {}).get("headGroupSpec", {}).get("template", {})
    if head.get("spec", {}).get("restartPolicy", "Never") != "Never":
        yield "SidecarMode needs a head without a restartPolicy, or with Never"


def _deletion(spec: Manifest) -> Complaints:
    shuts_down, ttl = spec.get("shutdownAfterJobFinishes"), spec.get("ttlSecondsAfterFinished", 0)
    if spec.get("suspend") and not shuts_down:
        yield "suspend needs shutdownAfterJobFinishes"
    if ttl < 0:
        yield "ttlSecondsAfterFinished is negative"
    if ttl > 0 and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules", [])
    legacy = "onSuccess" in strategy, "onFailure" in strategy
    if rules and shuts_down:
        yield "deletionRules and shutdownAfterJobFinishes are mutually exclusive"
    if rules and any(legacy):
        yield "deletionRules and onSuccess or onFailure do not go together"
    if not rules and not all(legacy):
        yield "deletionStrategy needs deletionRules, or both onSuccess and onFailure"
    yield from _deletion_rules(spec, rules)


def _deletion_rules(spec: Manifest, rules: list[Manifest]) -> Complaints:
    seen: dict[tuple[str, str], int] = {}
    autoscales = spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling")
    for rule in rules:
        condition, policy = rule["condition"], rule["policy"]
        ends = [condition[key] for key in ("jobStatus", "jobDeploymentStatus") if key in condition]
        if len(ends) != 1:
            yield "a deletion rule needs jobStatus or jobDeploymentStatus, and not both"
            continue
        if condition.get("ttlSeconds", 0) < 0:
            yield "a deletion rule has a negative ttlSeconds"
        if policy == "DeleteWorkers" and autoscales:
            yield "DeleteWorkers and the autoscaler do not go together"
        if spec.get("clusterSelector") and policy in _STAGES[:2]:
            yield f"{policy} and clusterSelector do not go together"
        if (ends[0], policy) in seen:
            yield f"{policy} on {ends[0]} occurs twice"
        seen[ends[0], policy] = condition.get("ttlSeconds", 0)
    for end in {end for end, _ in seen}:
        times = [seen[end, stage] for stage in _STAGES if (end, stage) in seen]
        if times != sorted(times):
            yield f"the ttlSeconds on {end} do not grow from workers to cluster to the job itself"


def _kueue(spec: Manifest) -> Complaints:
    cluster = spec.get("rayClusterSpec", {})
    if spec.get("clusterSelector"):
        yield "a job under Kueue cannot use an existing cluster"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "a job under Kueue needs shutdownAfterJobFinishes"
    if cluster.get("enableInTreeAutoscaling"):
        yield "a job under Kueue cannot have the autoscaler"
    groups = len(cluster.get("workerGroupSpecs", ()))
    if groups > _KUEUE_GROUPS:
        yield f"a job under Kueue has at most {_KUEUE_GROUPS} worker groups, found {groups}"


_CHECKS = {
    "RayCluster": _ray_cluster,
    "RayJob": _ray_job,
    "RayCronJob": _ray_cron_job,
    "PodDisruptionBudget": _budget,
}
