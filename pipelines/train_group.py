"""Groups of training workers under Ray Train, and how a stage gets one.

A fresh group costs seconds before its first step: a controller, and workers that import torch and
transformers. On a local cluster without GPUs a group that has done its task waits for the next train
stage of the same shape, as model hosts do (`hosts`). Elsewhere it ends with its stage, so the devices
are free for others. Either way a stage's work lies on a desk, an actor that outlives the workers: those
that Ray Train starts after a failure find the same work there and go on from its checkpoints. A group
that has failed, or that holds state of a process (DeepSpeed), is never used again.
"""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import threading
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines.config import StreamConfig
from pipelines.desk import Desk, serve
from pipelines.placement import beside_driver
from pipelines.process_group import NodeTorchConfig
from pipelines.train_config import TrainConfig
from pipelines.workspace import SCRATCH, Workspace

# Groups that do not start: killed at birth, or a minute without the resources they ask for.
_MIN_START_FAILURES = 10
_START_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_END_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a group is started with; stages with the same can share one."""

    fewest: int
    most: int
    cpus: int
    gpus: float
    backend: str | None
    max_failures: int
    start_failures: int
    strategy: str

    @classmethod
    def of(cls, train: TrainConfig, patience: float = 0.0) -> Shape:
        """Return the shape of the group that a stream's trainings need.

        Args:
            patience: seconds that it may wait for nodes to come back.
        """
        return cls(
            fewest=train.fewest_workers,
            most=train.most_workers,
            cpus=train.cpus_per_worker,
            gpus=train.gpus_per_worker,
            backend=process_group_backend(train),
            max_failures=train.max_failures,
            # One more than fit, so that who watches the cluster says what it lacks.
            start_failures=max(
                _MIN_START_FAILURES, train.max_failures, 2 + int(patience // _START_SECONDS)
            ),
            strategy=train.strategy,
        )


def process_group_backend(execution: TrainConfig) -> str | None:
    """Return torch's backend; None lets Ray choose nccl or gloo by the device.

    What FSDP2 keeps in host memory it also reduces there, beside what lies on the devices.
    """
    offloads = execution.strategy == "fsdp" and execution.offload != "none"
    return "cpu:gloo,cuda:nccl" if offloads and execution.gpus_per_worker else None


def train_in_group(work: str, spec: Any, workspace: Workspace, config: StreamConfig) -> Any:
    """Have a stage's training done by a group of workers.

    Args:
        work: `module:function`, called on every worker with `spec`; the first worker's result counts.

    Returns:
        The first worker's result.

    Raises:
        WorkerGroupError, ControllerError: as `TorchTrainer.fit` does, when no try is left.
    """
    shape = Shape.of(config.train, config.ray.patience)
    stays = config.ray.address is None and not shape.gpus and shape.fewest == shape.most
    if not stays or shape.strategy == "deepspeed":
        group = _Group(shape, work, workspace)
        try:
            return group.do(spec)
        finally:
            group.end()
    group = _groups.take(shape, work, _room(shape, config))
    try:
        return group.do(spec)
    finally:
        _groups.give_back(group)


def end_groups() -> None:
    """Let go of the groups that stayed; called before their cluster ends."""
    _groups.end()


def share_cluster(drivers: int) -> None:
    """Say how many processes like this one keep groups in a local cluster."""
    _groups.drivers = drivers


class _Group:
    """A trainer that runs in a thread of its own, and its desk."""

    def __init__(self, shape: Shape, work: str, workspace: Workspace | None) -> None:
        self.shape, self.usable = shape, True
        self._error: BaseException | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="seekr-group-")
        self._desk: Any = ray.remote(Desk).options(**beside_driver()).remote()
        self._thread = threading.Thread(
            target=self._fit,
            args=(self._trainer(work, workspace),),
            name="train group",
            daemon=True,
        )
        self._thread.start()

    def do(self, spec: Any) -> Any:
        """Return the first worker's result; raises what ended the trainer."""
        self.usable = False
        # In a list, so that the desk hands it on unread and need not import what it is made of.
        waiting = self._desk.lay.remote([ray.put(spec)])
        while ray.is_initialized():  # it would start again
            ready, _ = ray.wait([waiting], timeout=_LOOK_SECONDS)
            if ready:
                result, self.usable = ray.get(waiting)
                return pickle.loads(result)  # our own worker's
            if not self._thread.is_alive():
                break
        raise self._error or RuntimeError("the training's workers left before its end")

    def end(self) -> None:
        """Send the workers home; whoever is still at work is left to the cluster's end."""
        if ray.is_initialized():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._desk.close.remote(), timeout=_END_SECONDS)
            self._thread.join(_END_SECONDS)
        self._folder.cleanup()

    def _trainer(self, work: str, workspace: Workspace | None) -> TorchTrainer:
        shape = self.shape
        resources: dict[str, float] = {"CPU": shape.cpus}
        if shape.gpus:
            resources["GPU"] = shape.gpus
        # Ray Train wants a place that all its nodes see; a group that stays has one node.
        storage: dict[str, Any] = {"storage_path": self._folder.name}
        if workspace is not None:
            storage = {
                "storage_path": workspace.full_path(SCRATCH),
                "storage_filesystem": workspace.store.filesystem,
            }
        return TorchTrainer(
            serve,
            train_loop_config={"desk": self._desk, "work": work},
            scaling_config=ScalingConfig(
                num_workers=shape.most
                if shape.fewest == shape.most
                else (shape.fewest, shape.most),
                use_gpu=shape.gpus > 0,
                resources_per_worker=resources,
            ),
            torch_config=NodeTorchConfig(backend=shape.backend),
            run_config=RunConfig(name="ray-train", failure_config=failure_config(shape), **storage),
        )

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except BaseException as error:
            self._error = error


def failure_config(shape: Shape) -> FailureConfig:
    """Return how often a training goes on from its last checkpoint by itself.

    A preempted node is nobody's failure and has no limit; groups that never start have one.
    """
    return FailureConfig(
        max_failures=shape.max_failures,
        max_preemption_failures=-1,
        controller_failure_limit=shape.start_failures,
    )


class _Groups:
    """The groups of a local cluster that stay, as many as it has room for."""

    def __init__(self) -> None:
        self.drivers = 1
        self._idle: list[_Group] = []
        self._busy = 0
        self._changed = threading.Condition()

    def take(self, shape: Shape, work: str, room: int) -> _Group:
        """Return a group, a new one if there is room; waits for one otherwise."""
        with self._changed:
            while True:
                same = next((group for group in self._idle if group.shape == shape), None)
                if same is not None:
                    self._idle.remove(same)
                    break
                if self._busy + len(self._idle) < room or not (self._busy or self._idle):
                    same = _Group(shape, work, None)
                    break
                if self._idle:
                    self._idle.pop().end()
                else:
                    self._changed.wait()
            self._busy += 1
            return same

    def give_back(self, group: _Group) -> None:
        """Keep a group for the next stage, or end it if it is not as new."""
        with self._changed:
            self._busy -= 1
            if group.usable:
                self._idle.append(group)
            self._changed.notify_all()
        if not group.usable:
            group.end()

    def end(self) -> None:
        """End those that are idle."""
        with self._changed:
            idle, self._idle = self._idle, []
        for group in idle:
            group.end()


_groups = _Groups()


def _room(shape: Shape, config: StreamConfig) -> int:
    """Return how many groups this process's part of a local cluster holds beside all pools' actors."""
    training = shape.most * shape.cpus
    share = ray.cluster_resources().get("CPU", 0) / _groups.drivers
    free = share - (config.required_cpus - training)
    return max(1, int(free // training))
