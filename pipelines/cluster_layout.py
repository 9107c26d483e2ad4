"""How many worker pods a stream needs: processes of its stages packed into pods of a given size.

Each kind of stage must fit by itself (see `demand`), so a group of pods is as large as the largest of
them asks for. A training's fewest and most workers become the fewest and most pods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.cluster_config import ClusterConfig, GpuWorkersConfig, PodConfig
from pipelines.demand import Processes, demands

if TYPE_CHECKING:
    from pipelines.config import StreamConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """How many pods there are at least and at most."""

    fewest: int
    most: int

    @property
    def fixed(self) -> bool:
        """Whether nothing is ever added or removed."""
        return self.fewest == self.most


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Pods per group; `gpu` is None where no stage uses a GPU."""

    cpu: Span
    gpu: Span | None

    @property
    def fixed(self) -> bool:
        """Whether nothing is ever added or removed."""
        return self.cpu.fixed and (self.gpu is None or self.gpu.fixed)


def layout(config: StreamConfig, cluster: ClusterConfig) -> Layout:
    """Return the pods that a stream needs.

    Raises:
        ValueError: a process fits in no pod, or there are GPUs without use or uses without GPUs.
    """
    on_gpus = [item for item in demands(config) if item.gpus]
    on_cpus = [item for item in demands(config) if not item.gpus]
    pods = cluster.gpu_workers
    if on_gpus and pods is None:
        item = on_gpus[0]
        raise ValueError(
            f"cluster.gpu_workers is null, and {item.field} asks for {item.gpus:g} GPUs per process; say "
            "what a pod with GPUs has, such as gpu_workers: {gpus: 8, cpu: 64, memory: 512Gi}"
        )
    if pods is not None and not on_gpus:
        raise ValueError(
            "cluster.gpu_workers is set, and no stage asks for a GPU; set train.gpus_per_worker and the "
            "pools' gpus, or remove it"
        )
    return Layout(
        cpu=_span([_pods(item, cluster.cpu_workers, "cpu_workers") for item in on_cpus]),
        gpu=None if pods is None else _span([_pods(item, pods, "gpu_workers") for item in on_gpus]),
    )


def _span(spans: list[Span]) -> Span:
    return Span(
        fewest=max((span.fewest for span in spans), default=1),
        most=max((span.most for span in spans), default=1),
    )


def _pods(item: Processes, pod: PodConfig, group: str) -> Span:
    by_cores = math.floor(pod.cpu / item.cpus) if item.cpus else item.most
    by_gpus = _by_gpus(item, pod) if isinstance(pod, GpuWorkersConfig) else item.most
    wanted = min(by_gpus, item.most)
    if by_gpus == 0:
        raise ValueError(
            f"{item.field} asks for {item.gpus:g} GPUs per process and a pod of cluster.{group} has "
            f"{getattr(pod, 'gpus', 0)}; raise gpus, or lower what a process gets"
        )
    if by_cores < wanted and (by_cores == 0 or isinstance(pod, GpuWorkersConfig)):
        raise ValueError(
            f"{item.field} asks for {item.cpus:g} cores per process and a pod of cluster.{group} has "
            f"{pod.cpu}, where {max(wanted, 1)} of them should fit; raise cluster.{group}.cpu to "
            f"{math.ceil(max(wanted, 1) * item.cpus)}, or lower what a process gets"
        )
    fit = min(by_cores, by_gpus)
    # A pool's rows are brought by a task with a core of its own, which pods with GPUs leave to others.
    reading = item.reading and not item.gpus

    def pods(count: int) -> int:
        return max(math.ceil(count / fit), math.ceil((count * item.cpus + reading) / pod.cpu), 1)

    return Span(fewest=pods(item.fewest), most=pods(item.most))


def _by_gpus(item: Processes, pod: GpuWorkersConfig) -> int:
    if item.gpus < 1:  # several share a device, none has parts of two
        return pod.gpus * math.floor(1 / item.gpus)
    return math.floor(pod.gpus / item.gpus)
