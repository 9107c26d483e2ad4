"""The schema of a stream's `cluster` section: the Kubernetes cluster that runs it under KubeRay.

All of it is about execution, so nothing here is ever in a fingerprint. How many workers there are is not
said here: that follows from `train.workers` and from the pools (see `demand`), so that the two cannot
disagree. What does not go together is in `cluster_rules`; what is made of it is in the package `cluster`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from pipelines.cluster_services import (
    MlflowConfig,
    NetworkConfig,
    RedisConfig,
    ScheduleConfig,
    SecretKey,
    StorageConfig,
)
from pipelines.cluster_values import (
    DnsLabel,
    Image,
    LabelValue,
    PodFolder,
    QualifiedName,
    Quantity,
    Registry,
    ResourceName,
    Variable,
    secretive,
)
from pipelines.section import Section, execution

MAX_NAME = 36
"""A RayJob's name has at most 47 characters (KubeRay), of which a schedule's children take 11."""


class TolerationConfig(Section):
    """A taint of nodes that pods put up with."""

    key: QualifiedName = execution(...)
    """Of the taint."""
    value: LabelValue | None = execution(None)
    """Of the taint; null takes any."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = execution("NoSchedule")
    """Of the taint; null takes all."""


class PodConfig(Section):
    """What a pod gets, requested and at most, and where it may run."""

    cpu: int = execution(..., ge=1)
    """Whole cores, as Ray counts them."""
    memory: Quantity = execution(...)
    """Such as 64Gi; a third of it is shared memory, which holds Ray's objects."""
    scratch: Quantity = execution("20Gi")
    """Disk for what Ray and torch leave: logs, spilled objects, caches, copies of models."""
    node_selector: dict[QualifiedName, LabelValue] = execution({})
    """Labels that a node must have."""
    tolerations: tuple[TolerationConfig, ...] = execution(())
    """Taints that a node may have."""


class HeadConfig(PodConfig):
    """The pod that runs Ray's control plane and the command itself; no worker runs on it."""

    cpu: int = execution(2, ge=1)
    memory: Quantity = execution("8Gi")


class CpuWorkersConfig(PodConfig):
    """Pods for reading and writing rows, and for actors and trainings that use no GPU."""

    cpu: int = execution(4, ge=2)
    memory: Quantity = execution("16Gi")


class GpuWorkersConfig(PodConfig):
    """Pods for actors and trainings that use GPUs."""

    gpus: int = execution(..., ge=1)
    """Devices of a pod, best all of its node."""
    resource: QualifiedName = execution("nvidia.com/gpu")
    """What the device plugin calls them; also the taint that is tolerated."""
    accelerator: LabelValue | None = execution(None)
    """Their type, such as H100, as Ray's label ray.io/accelerator-type. It chooses no nodes: `node_selector`
    does."""
    capacity: Literal["on_demand", "spot", "both"] = execution("on_demand")
    """`both` keeps the fewest workers on demand and adds the others as spot."""
    spot_node_selector: dict[QualifiedName, LabelValue] = execution({})
    """Labels of spot nodes, beside those of `node_selector`."""
    spot_tolerations: tuple[TolerationConfig, ...] = execution(())
    """Taints of spot nodes, beside those of `tolerations`."""

    @model_validator(mode="after")
    def _spot_is_told_apart(self) -> GpuWorkersConfig:
        described = bool(self.spot_node_selector or self.spot_tolerations)
        if described != (self.capacity != "on_demand"):
            found = "are given" if described else "are empty"
            raise ValueError(
                f"capacity is {self.capacity} and spot_node_selector and spot_tolerations {found}; spot "
                "pods are told apart by them: give them with capacity spot or both, and only then"
            )
        return self


class AutoscalerConfig(Section):
    """Ray's own autoscaler, which adds and removes worker pods."""

    idle_seconds: int = execution(300, ge=0)
    """After which a pod without work is removed, down to the fewest."""
    upscaling: Literal["Default", "Conservative"] = execution("Default")
    """How fast pods are added; Conservative waits for those that are pending."""


class KueueConfig(Section):
    """Kueue admits the whole job at once, or lets it wait."""

    queue: ResourceName = execution(...)
    """A LocalQueue of the namespace."""
    priority_class: ResourceName | None = execution(None)
    """A WorkloadPriorityClass; null takes the queue's order."""


class DeletionRuleConfig(Section):
    """What the operator removes once a job has ended."""

    policy: Literal["DeleteWorkers", "DeleteCluster", "DeleteSelf"] = execution(...)
    """The workers, the whole cluster, or the RayJob with all that belongs to it."""
    when: Literal["SUCCEEDED", "FAILED"] = execution(...)
    """How the job ended."""
    after: int = execution(0, ge=0)
    """Seconds since then."""


class JobConfig(Section):
    """How a run is submitted, retried, bounded and cleaned up."""

    submission: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = execution("K8sJobMode")
    """By a small Job, by the operator itself, or by a container in the head's pod, which the operator adds
    without a security context of its own, so that restricted namespaces refuse it."""
    retries: int = execution(2, ge=0)
    """Each on a new cluster; the stages that were finished stay so."""
    submitter_retries: int = execution(2, ge=0)
    """Of the small Job alone."""
    starting_seconds: int = execution(1800, ge=1)
    """From the beginning of an attempt until it runs; then the attempt fails, and frees what it holds."""
    active_seconds: int = execution(604800, ge=1)
    """For one attempt, waiting included: KubeRay counts anew when it tries again."""
    keep_seconds: int = execution(3600, ge=0)
    """That the cluster of an ended job stays, for its dashboard; not with `deletion`."""
    grace_seconds: int = execution(120, ge=30)
    """That pods, and runs that are cancelled, get between being told to stop and being killed."""
    deletion: tuple[DeletionRuleConfig, ...] = execution(())
    """Staged removal, instead of `keep_seconds`."""


class ClusterConfig(Section):
    """The Kubernetes cluster that runs the stream, for `seekr cluster`."""

    namespace: DnsLabel = execution("seekr")
    """In which everything is made; it exists."""
    name: DnsLabel | None = execution(None, max_length=MAX_NAME)
    """Of everything that is made; null is the stream's name in lower case."""
    image: Image = execution(...)
    """With seekr and the Ray of this version, with a fixed tag or digest."""
    registry: Registry | None = execution(None)
    """A mirror from which PostgreSQL and MLflow are pulled, where the public ones are out of reach."""
    pull_secrets: tuple[ResourceName, ...] = execution(())
    """Secrets for pulling images."""
    offline: bool = execution(False)
    """Tell the Hugging Face libraries not to look for anything outside."""
    folder: PodFolder = execution("/mnt/seekr")
    """Folder of the pods that the stream's relative paths start at, and where the claim is mounted."""
    image_folders: tuple[PodFolder, ...] = execution(())
    """Folders that the image itself holds; absolute paths of the stream may lie there too."""
    user: int = execution(1000, ge=1)
    """User and group that Ray runs as."""
    priority_class: ResourceName | None = execution(None)
    """PriorityClass of the pods."""
    service_account_annotations: dict[QualifiedName, str] = execution({})
    """Of the pods' service accounts, which is how clouds give an identity to pods."""
    env: dict[Variable, str] = execution({})
    """Environment variables of all Ray pods."""
    secret_env: dict[Variable, SecretKey] = execution({})
    """Environment variables of all Ray pods that come from Secrets."""
    token_secret: ResourceName | None = execution(None)
    """Secret with Ray's token under the key auth_token; null lets the operator make one per cluster."""
    metrics: bool = execution(True)
    """Annotations by which Prometheus finds the pods."""
    head: HeadConfig = HeadConfig()
    """The head."""
    cpu_workers: CpuWorkersConfig = CpuWorkersConfig()
    """Workers without GPUs."""
    gpu_workers: GpuWorkersConfig | None = execution(None)
    """Workers with GPUs; null where no stage uses one."""
    autoscaler: AutoscalerConfig | None = execution(None)
    """Null keeps the number of pods fixed."""
    kueue: KueueConfig | None = execution(None)
    """Null starts at once."""
    job: JobConfig = JobConfig()
    """The RayJob."""
    schedule: ScheduleConfig | None = execution(None)
    """Null renders none."""
    storage: StorageConfig = StorageConfig()
    """Where artifacts, models and data lie for the pods."""
    mlflow: MlflowConfig | None = execution(None)
    """Null leaves it to `tracking.uri`."""
    redis: RedisConfig | None = execution(None)
    """Null lets a head that is lost end its cluster."""
    network: NetworkConfig = NetworkConfig()
    """Who may talk to whom."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if secretive(name):
                raise ValueError(
                    f"{name} looks like a secret, and what stands here is readable for everybody; put it "
                    f"into a Secret and name that: secret_env.{name}"
                )
        return env
