"""What KubeRay and Kueue refuse beyond their schemas: each rendering keeps it, each rule is broken once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from cluster.rules import violations
from tests.cluster.rendered import NAMES, manifests_of

Manifest = dict[str, Any]
SELECTOR = {"ray.io/cluster": "mine"}


def cluster_of(job: Manifest) -> Manifest:
    return job["spec"]["rayClusterSpec"]


def head_of(job: Manifest) -> Manifest:
    return cluster_of(job)["headGroupSpec"]


def group_of(job: Manifest) -> Manifest:
    return cluster_of(job)["workerGroupSpecs"][0]


def set_variable(group: Manifest, name: str, value: str = "1") -> None:
    group["template"]["spec"]["containers"][0]["env"].append({"name": name, "value": value})


def rules_of(job: Manifest, *rules: tuple[str, str, int]) -> None:
    """Staged removal: policy, status, seconds."""
    job["spec"].pop("ttlSecondsAfterFinished")
    job["spec"]["shutdownAfterJobFinishes"] = False
    job["spec"]["deletionStrategy"] = {
        "deletionRules": [
            {"policy": policy, "condition": {"jobStatus": status, "ttlSeconds": seconds}}
            for policy, status, seconds in rules
        ]
    }


def without_cluster(job: Manifest) -> None:
    """A job on a cluster that exists, which is fine as long as nothing else is asked for."""
    job["spec"].pop("rayClusterSpec")
    job["spec"] |= {"clusterSelector": SELECTOR, "backoffLimit": 0}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_rendered_breaks_no_rule(name: str) -> None:
    assert violations(manifests_of(name).all) == ()


# What breaks a RayJob of "cpu dev", and a part of what is said about it.
BROKEN: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "a name of 48 characters": (
        lambda job: job["metadata"].update(name="a" * 48),
        "at most 47 are allowed",
    ),
    "a name that is no label": (
        lambda job: job["metadata"].update(name="7b-weekly"),
        "is no DNS label",
    ),
    "suspend without shutdown": (
        lambda job: job["spec"].update(
            suspend=True, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0
        ),
        "suspend needs shutdownAfterJobFinishes",
    ),
    "a ttl without shutdown": (
        lambda job: job["spec"].update(shutdownAfterJobFinishes=False),
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes",
    ),
    "a negative ttl": (
        lambda job: job["spec"].update(ttlSecondsAfterFinished=-1),
        "ttlSecondsAfterFinished is negative",
    ),
    "deletion rules with shutdown": (
        lambda job: (
            rules_of(job, ("DeleteCluster", "FAILED", 1)),
            job["spec"].update(shutdownAfterJobFinishes=True),
        ),
        "mutually exclusive",
    ),
    "deletion rules with the old fields": (
        lambda job: (
            rules_of(job, ("DeleteCluster", "FAILED", 1)),
            job["spec"]["deletionStrategy"].update(onSuccess={"policy": "DeleteNone"}),
        ),
        "onSuccess or onFailure do not go together",
    ),
    "one of the old fields": (
        lambda job: job["spec"].update(deletionStrategy={"onSuccess": {"policy": "DeleteSelf"}}),
        "both onSuccess and onFailure",
    ),
    "no deletion rules": (lambda job: rules_of(job), "deletionStrategy needs deletionRules"),
    "a deletion rule twice": (
        lambda job: rules_of(job, ("DeleteSelf", "FAILED", 1), ("DeleteSelf", "FAILED", 2)),
        "DeleteSelf on FAILED occurs twice",
    ),
    "deletion rules out of order": (
        lambda job: rules_of(job, ("DeleteCluster", "FAILED", 9), ("DeleteSelf", "FAILED", 2)),
        "do not grow",
    ),
    "a deletion rule for two ends": (
        lambda job: (
            rules_of(job, ("DeleteCluster", "FAILED", 9)),
            job["spec"]["deletionStrategy"]["deletionRules"][0]["condition"].update(
                jobDeploymentStatus="Failed"
            ),
        ),
        "and not both",
    ),
    "a negative time in a deletion rule": (
        lambda job: rules_of(job, ("DeleteCluster", "FAILED", -9)),
        "negative ttlSeconds",
    ),
    "DeleteWorkers under the autoscaler": (
        lambda job: (
            rules_of(job, ("DeleteWorkers", "FAILED", 9)),
            cluster_of(job).update(enableInTreeAutoscaling=True),
        ),
        "DeleteWorkers and the autoscaler",
    ),
    "DeleteCluster on somebody's cluster": (
        lambda job: (without_cluster(job), rules_of(job, ("DeleteCluster", "FAILED", 9))),
        "DeleteCluster and clusterSelector",
    ),
    "no cluster": (lambda job: job["spec"].pop("rayClusterSpec"), "neither rayClusterSpec nor"),
    "a selector without a name": (
        lambda job: (without_cluster(job), job["spec"].update(clusterSelector={"a": "b"})),
        "names no cluster",
    ),
    "a selector with retries": (
        lambda job: (without_cluster(job), job["spec"].update(backoffLimit=1)),
        "clusterSelector and backoffLimit",
    ),
    "a selector with suspend": (
        lambda job: (without_cluster(job), job["spec"].update(suspend=True)),
        "clusterSelector and suspend",
    ),
    "a selector in SidecarMode": (
        lambda job: (without_cluster(job), job["spec"].update(submissionMode="SidecarMode")),
        "clusterSelector and SidecarMode",
    ),
    "retries in InteractiveMode": (
        lambda job: job["spec"].update(submissionMode="InteractiveMode"),
        "InteractiveMode and backoffLimit",
    ),
    "a submitter's pod in SidecarMode": (
        lambda job: job["spec"].update(submissionMode="SidecarMode"),
        "submitterPodTemplate is set",
    ),
    "a submitter's retries in SidecarMode": (
        lambda job: job["spec"].update(submissionMode="SidecarMode"),
        "submitterConfig is set",
    ),
    "a head that restarts in SidecarMode": (
        lambda job: (
            job["spec"].update(submissionMode="SidecarMode"),
            head_of(job)["template"]["spec"].update(restartPolicy="Always"),
        ),
        "SidecarMode needs a head",
    ),
    "no time to start": (
        lambda job: job["spec"].update(preRunningDeadlineSeconds=0),
        "preRunningDeadlineSeconds is 0",
    ),
    "no time at all": (
        lambda job: job["spec"].update(activeDeadlineSeconds=-1),
        "activeDeadlineSeconds is -1",
    ),
    "negative retries": (lambda job: job["spec"].update(backoffLimit=-1), "backoffLimit is -1"),
    "a runtime environment that is no YAML": (
        lambda job: job["spec"].update(runtimeEnvYAML="a: [1"),
        "runtimeEnvYAML is no YAML",
    ),
    "a runtime environment that is no mapping": (
        lambda job: job["spec"].update(runtimeEnvYAML="- a"),
        "runtimeEnvYAML is no mapping",
    ),
    "an upgrade strategy": (
        lambda job: cluster_of(job).update(upgradeStrategy={"type": "Recreate"}),
        "upgradeStrategy",
    ),
    "a head without containers": (
        lambda job: head_of(job)["template"]["spec"].update(containers=[]),
        "head has no container",
    ),
    "a group without containers": (
        lambda job: group_of(job)["template"]["spec"].update(containers=[]),
        "group cpu has no container",
    ),
    "resources twice": (
        lambda job: group_of(job).update(resources={"CPU": "4"}),
        "in rayStartParams and in resources",
    ),
    "labels in rayStartParams": (
        lambda job: group_of(job)["rayStartParams"].update(labels="a=b"),
        "labels in rayStartParams",
    ),
    "a label that is none": (
        lambda job: group_of(job).update(labels={"ray.io/market-type": "on demand"}),
        "which is none",
    ),
    "no fewest": (lambda job: group_of(job).pop("minReplicas"), "lacks minReplicas"),
    "negative replicas": (
        lambda job: group_of(job).update(minReplicas=-1),
        "negative replicas",
    ),
    "fewest above most": (
        lambda job: group_of(job).update(minReplicas=3, maxReplicas=2),
        "minReplicas 3 above maxReplicas 2",
    ),
    "an idle time without autoscaler v2": (
        lambda job: group_of(job).update(idleTimeoutSeconds=5),
        "idleTimeoutSeconds without autoscaler v2",
    ),
    "a negative idle time": (
        lambda job: group_of(job).update(idleTimeoutSeconds=-5),
        "negative idleTimeoutSeconds",
    ),
    "a negative idle time of all": (
        lambda job: cluster_of(job).update(autoscalerOptions={"idleTimeoutSeconds": -1}),
        "autoscalerOptions.idleTimeoutSeconds is negative",
    ),
    "a priority without autoscaler v2": (
        lambda job: group_of(job).update(priority=1),
        "priority without autoscaler v2",
    ),
    "a priority of an old Ray": (
        lambda job: (
            group_of(job).update(priority=1),
            cluster_of(job).update(
                rayVersion="2.55.0",
                enableInTreeAutoscaling=True,
                autoscalerOptions={"version": "v2"},
            ),
        ),
        "needs rayVersion 2.56",
    ),
    "the autoscaler's variable without it": (
        lambda job: set_variable(head_of(job), "RAY_enable_autoscaler_v2"),
        "without enableInTreeAutoscaling",
    ),
    "the autoscaler's version twice": (
        lambda job: (
            set_variable(head_of(job), "RAY_enable_autoscaler_v2"),
            cluster_of(job).update(
                enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"}
            ),
        ),
        "are both set",
    ),
    "the autoscaler's command": (
        lambda job: cluster_of(job).update(
            autoscalerOptions={"env": [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": ""}]}
        ),
        "which is the operator's",
    ),
    "a pod that restarts under autoscaler v2": (
        lambda job: (
            group_of(job)["template"]["spec"].update(restartPolicy="Always"),
            cluster_of(job).update(
                enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"}
            ),
        ),
        "restartPolicy Always under autoscaler v2",
    ),
    "a suspended group under the autoscaler": (
        lambda job: (
            group_of(job).update(suspend=True),
            cluster_of(job).update(enableInTreeAutoscaling=True),
        ),
        "is suspended under the autoscaler",
    ),
    "Redis by a variable alone": (
        lambda job: set_variable(head_of(job), "RAY_REDIS_ADDRESS"),
        "RAY_REDIS_ADDRESS is set without",
    ),
    "Redis's address twice": (
        lambda job: (
            set_variable(head_of(job), "RAY_REDIS_ADDRESS"),
            cluster_of(job).update(gcsFaultToleranceOptions={"redisAddress": "r:1"}),
        ),
        "sets RAY_REDIS_ADDRESS itself",
    ),
    "Redis's password as a parameter": (
        lambda job: (
            head_of(job)["rayStartParams"].update({"redis-password": "$X"}),
            cluster_of(job).update(gcsFaultToleranceOptions={"redisAddress": "r:1"}),
        ),
        "Redis's password itself",
    ),
    "Redis's user as a variable": (
        lambda job: set_variable(head_of(job), "REDIS_USERNAME"),
        "Redis user itself",
    ),
    "Redis with a volume": (
        lambda job: cluster_of(job).update(gcsFaultToleranceOptions={"storage": {"size": "1Gi"}}),
        "for the backend rocksdb alone",
    ),
    "RocksDB, whose gate is off": (
        lambda job: cluster_of(job).update(gcsFaultToleranceOptions={"backend": "rocksdb"}),
        "GCSFaultToleranceEmbeddedStorage",
    ),
    "fault tolerance by annotation too": (
        lambda job: (
            job["metadata"].update(annotations={"ray.io/ft-enabled": "true"}),
            cluster_of(job).update(gcsFaultToleranceOptions={"redisAddress": "r:1"}),
        ),
        "ray.io/ft-enabled",
    ),
    "a storage namespace by annotation too": (
        lambda job: (
            job["metadata"].update(annotations={"ray.io/external-storage-namespace": "x"}),
            cluster_of(job).update(gcsFaultToleranceOptions={"redisAddress": "r:1"}),
        ),
        "ray.io/external-storage-namespace",
    ),
    "no token authentication": (
        lambda job: cluster_of(job).pop("authOptions"),
        "token authentication is off",
    ),
    "token authentication disabled": (
        lambda job: cluster_of(job).update(authOptions={"mode": "disabled"}),
        "token authentication is off",
    ),
    "tokens of an old Ray": (
        lambda job: cluster_of(job).update(rayVersion="2.51.1"),
        "needs rayVersion 2.52",
    ),
    "tokens of no Ray": (lambda job: cluster_of(job).pop("rayVersion"), "found None"),
    "Kubernetes' own tokens": (
        lambda job: cluster_of(job)["authOptions"].update(enableK8sTokenAuth=True),
        "not supported for RayJobs",
    ),
    "Kubernetes' own tokens and a Secret": (
        lambda job: cluster_of(job)["authOptions"].update(enableK8sTokenAuth=True, secretName="x"),
        "enableK8sTokenAuth and authOptions.secretName",
    ),
    "the operator's network policy": (
        lambda job: cluster_of(job).update(networkPolicy={"mode": "DenyAll"}),
        "RayClusterNetworkPolicy",
    ),
    "the operator's TLS": (
        lambda job: cluster_of(job).update(tlsOptions={"enabled": True}),
        "RayClusterMTLS",
    ),
    "the history server": (
        lambda job: cluster_of(job).update(historyServerOptions={}),
        "RayClusterHistoryServer",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rayjob_is_told(case: str) -> None:
    job = copy.deepcopy(manifests_of("cpu dev").ray_job)
    breaks, text = BROKEN[case]
    breaks(job)
    assert any(text in complaint for complaint in violations([job])), violations([job])


BROKEN_UNDER_KUEUE: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "no shutdown": (
        lambda job: job["spec"].update(shutdownAfterJobFinishes=False),
        "needs shutdownAfterJobFinishes",
    ),
    "the autoscaler": (
        lambda job: cluster_of(job).update(enableInTreeAutoscaling=True),
        "cannot have the autoscaler",
    ),
    "an existing cluster": (without_cluster, "cannot use an existing cluster"),
    "eight groups": (
        lambda job: cluster_of(job).update(workerGroupSpecs=[group_of(job)] * 8),
        "at most 7 worker groups, found 8",
    ),
    "deletion rules": (
        lambda job: rules_of(job, ("DeleteCluster", "FAILED", 1)),
        "under Kueue needs shutdownAfterJobFinishes",
    ),
}


@pytest.mark.parametrize("case", BROKEN_UNDER_KUEUE)
def test_a_broken_rayjob_under_kueue_is_told(case: str) -> None:
    job = copy.deepcopy(manifests_of("kueue").ray_job)
    breaks, text = BROKEN_UNDER_KUEUE[case]
    breaks(job)
    assert any(text in complaint for complaint in violations([job])), violations([job])


BROKEN_SCHEDULES: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "a name of 37 characters": (
        lambda cron: cron["metadata"].update(name="a" * 37),
        "at most 36 are allowed",
    ),
    "a zone in the schedule": (
        lambda cron: cron["spec"].update(schedule="TZ=UTC 0 3 * * 1"),
        "time_zone",
    ),
    "no schedule": (lambda cron: cron["spec"].update(schedule="0 3 * *"), "4 fields instead of 5"),
    "an empty zone": (lambda cron: cron["spec"].update(timeZone=""), "timeZone is empty"),
    "a queue": (
        lambda cron: cron["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "q"}),
        "Kueue would not see them",
    ),
    "a broken job": (
        lambda cron: cron["spec"]["jobTemplate"].update(backoffLimit=-1),
        "backoffLimit is -1",
    ),
    "a broken cluster": (
        lambda cron: cron["spec"]["jobTemplate"]["rayClusterSpec"].pop("authOptions"),
        "token authentication is off",
    ),
}


@pytest.mark.parametrize("case", BROKEN_SCHEDULES)
def test_a_broken_raycronjob_is_told(case: str) -> None:
    cron = copy.deepcopy(manifests_of("RayCronJob").of_kind("RayCronJob")[0])
    breaks, text = BROKEN_SCHEDULES[case]
    breaks(cron)
    assert any(text in complaint for complaint in violations([cron])), violations([cron])


def test_a_broken_raycluster_is_told() -> None:
    cluster = copy.deepcopy(manifests_of("cpu dev").ray_cluster)
    cluster["metadata"]["name"] = "a" * 54
    cluster["spec"]["authOptions"] = {"mode": "disabled", "enableK8sTokenAuth": True}
    assert violations([cluster]) == (
        f"RayCluster {'a' * 54}: the name has 54 characters, at most 53 are allowed",
        f"RayCluster {'a' * 54}: token authentication is off and enableK8sTokenAuth on, which needs it",
    )


def test_a_budget_that_kubernetes_could_not_count_is_told() -> None:
    budget = copy.deepcopy(manifests_of("cpu dev").of_kind("PodDisruptionBudget")[0])
    budget["spec"] = {"maxUnavailable": 1, "selector": budget["spec"]["selector"]}
    (complaint,) = violations([budget])
    assert "minAvailable that is a number" in complaint
