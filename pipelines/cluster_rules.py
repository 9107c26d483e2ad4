"""What of a stream's `cluster` section does not go together, or not with the rest of the stream.

Each rule is one that Kubernetes, KubeRay or Kueue would enforce later, or silently not keep. What depends
on where files lie is looked at when manifests are rendered, so that the same YAML still runs on a laptop.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from pipelines.cluster_config import MAX_NAME, ClusterConfig
from pipelines.cluster_layout import layout

if TYPE_CHECKING:
    from pipelines.config import StreamConfig

# The operator, or what is rendered, sets these itself.
RESERVED = re.compile(
    r"RAY_AUTH_.*|RAY_ADDRESS|RAY_REDIS_ADDRESS|REDIS_(USERNAME|PASSWORD)|RAY_enable_autoscaler_v2|"
    r"RAY_gcs_storage.*|RAY_CLUSTER_.*|KUBERAY_.*|RAY_JOB_STOP_.*|HOME|AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY)|"
    r"GOOGLE_APPLICATION_CREDENTIALS"
)
# Where other volumes are mounted in every pod.
MOUNTED = ("/tmp", "/dev", "/etc", "/home", "/var", "/proc", "/sys")
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def check_cluster(config: StreamConfig) -> None:
    """Check a stream's cluster section.

    Raises:
        ValueError: naming the first thing that does not go together.
    """
    cluster = config.cluster
    if cluster is None:
        return
    cluster_name(config)
    _check_scaling(config, cluster)
    _check_kueue(cluster)
    _check_deletion(cluster)
    _check_environment(cluster)
    _check_folders(cluster)


def cluster_name(config: StreamConfig) -> str:
    """Return the name of what is made on the cluster: `cluster.name`, or the stream's own made fit.

    Raises:
        ValueError: the stream's name does not become a name.
    """
    if config.cluster is not None and config.cluster.name is not None:
        return config.cluster.name
    name = re.sub(r"[._]+", "-", config.name.lower()).strip("-")
    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ValueError(
            f"cluster.name is null, and the stream's name {config.name!r} makes no name on Kubernetes: at "
            f"most {MAX_NAME} lower-case letters, digits and '-', the first a letter; set cluster.name"
        )
    return name


def _check_scaling(config: StreamConfig, cluster: ClusterConfig) -> None:
    if cluster.autoscaler is not None and cluster.kueue is not None:
        raise ValueError(
            "cluster.autoscaler and cluster.kueue are both set: Kueue admits a RayJob with all its pods at "
            "once and cannot follow pods that the autoscaler adds later; keep one"
        )
    pods = layout(config, cluster)
    workers = "cluster needs from {} to {} pods of one group, as train.workers is elastic"
    span = pods.cpu if pods.gpu is None or pods.gpu.fixed else pods.gpu
    found = workers.format(span.fewest, span.most)
    if not pods.fixed and cluster.kueue is not None:
        raise ValueError(
            f"cluster.kueue is set, under which the number of pods is fixed, and the {found}; give "
            "train.workers one number, or use cluster.autoscaler instead"
        )
    if not pods.fixed and cluster.autoscaler is None:
        raise ValueError(
            f"the {found}, and nothing would add them; set cluster.autoscaler: {{}}, or give train.workers "
            "one number"
        )
    gpus = cluster.gpu_workers
    if gpus is None or gpus.capacity == "on_demand":
        return
    if gpus.capacity == "both" and pods.gpu is not None and pods.gpu.fixed:
        raise ValueError(
            f"cluster.gpu_workers.capacity is both, and the number of pods with GPUs is always "
            f"{pods.gpu.fewest}, so none is left for spot; use spot, or an elastic train.workers"
        )
    if config.train.max_failures == 0:
        raise ValueError(
            f"cluster.gpu_workers.capacity is {gpus.capacity} and train.max_failures 0, so the first node "
            "that is taken away would end the run; raise train.max_failures"
        )


def _check_kueue(cluster: ClusterConfig) -> None:
    if cluster.kueue is None:
        return
    if cluster.job.deletion:
        raise ValueError(
            "cluster.job.deletion and cluster.kueue are both set: a job that Kueue may suspend must have "
            "shutdownAfterJobFinishes, which KubeRay refuses beside deletion rules; use "
            "cluster.job.keep_seconds"
        )
    if cluster.schedule is not None and cluster.schedule.kind == "RayCronJob":
        raise ValueError(
            "cluster.schedule.kind is RayCronJob and cluster.kueue is set: what a RayCronJob creates cannot "
            "carry the label with the queue, so Kueue would never see it; use kind CronJob"
        )


def _check_deletion(cluster: ClusterConfig) -> None:
    seen: dict[tuple[str, str], int] = {}
    for rule in cluster.job.deletion:
        if (rule.when, rule.policy) in seen:
            raise ValueError(
                f"cluster.job.deletion has {rule.policy} on {rule.when} twice; keep one of them"
            )
        if rule.policy == "DeleteWorkers" and cluster.autoscaler is not None:
            raise ValueError(
                "cluster.job.deletion has DeleteWorkers and cluster.autoscaler is set, which removes idle "
                "workers itself; KubeRay takes only one of the two: use DeleteCluster"
            )
        seen[rule.when, rule.policy] = rule.after
    for on in ("SUCCEEDED", "FAILED"):
        stages = [(seen[on, policy], policy) for policy in _DELETION_ORDER if (on, policy) in seen]
        for (first, earlier), (second, later) in pairwise(stages):
            if second < first:
                raise ValueError(
                    f"cluster.job.deletion on {on} has {later} after {second} seconds and {earlier} after "
                    f"{first}; what is removed with more comes later: raise the first of them"
                )


def _check_environment(cluster: ClusterConfig) -> None:
    for name in (*cluster.env, *cluster.secret_env):
        if RESERVED.fullmatch(name):
            raise ValueError(
                f"cluster.env or cluster.secret_env sets {name}, which is set for you: by "
                "cluster.token_secret, cluster.redis, cluster.storage.object_store or the operator"
            )
    for name in cluster.env:
        if name in cluster.secret_env:
            raise ValueError(f"{name} is in cluster.env and in cluster.secret_env; keep one")


def _check_folders(cluster: ClusterConfig) -> None:
    for folder in (cluster.folder, *cluster.image_folders):
        if any(_within(folder, taken) for taken in MOUNTED):
            raise ValueError(
                f"cluster.folder or cluster.image_folders has {folder}, and pods have volumes of their own "
                f"below {', '.join(MOUNTED)}; choose another, such as /mnt/seekr"
            )
    hidden = [item for item in cluster.image_folders if _within(item, cluster.folder)]
    if cluster.storage.claim is not None and hidden:
        raise ValueError(
            f"cluster.image_folders has {hidden[0]}, which the claim at cluster.folder {cluster.folder} "
            "hides; mount the claim elsewhere"
        )


def _within(folder: str, parent: str) -> bool:
    return folder == parent or folder.startswith(f"{parent}/")
