"""Bringing the world in line with streams: run the stages that are missing, in the graphs' order.

Independent stages run side by side (an evaluation beside the next task's training), each in a thread
that waits for Ray. Events of all threads arrive in one queue and are handled by the caller's thread,
so a view needs no locks. The first failure lets running stages end and starts no new ones. A run that
is asked to end waits only for trainings, which save; whatever else runs begins again another time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from pipelines.borrow import borrow
from pipelines.capacity import Capacity, ClusterTooSmall
from pipelines.config import StreamConfig
from pipelines.evaluate import evaluate
from pipelines.fisher import fisher
from pipelines.general import general
from pipelines.generate import generate
from pipelines.ingest import ingest
from pipelines.interrupts import Interrupts
from pipelines.job import Job
from pipelines.lease import abandon_all, release_all
from pipelines.meta import meta
from pipelines.monitor import Reporter
from pipelines.probe import probe
from pipelines.provenance import Provenance
from pipelines.rollout import rollout
from pipelines.sample import sample
from pipelines.score import score
from pipelines.select import select
from pipelines.stage import Stage, StageEvent, StageOutcome, StageRecord, run_stage
from pipelines.store import Store
from pipelines.teach import teach
from pipelines.train import train
from pipelines.weights import weights
from pipelines.workspace import Workspace

StageFunction = Callable[[Workspace, StreamConfig, str, Reporter], StageOutcome]
COMPUTE: dict[str, StageFunction] = {
    "ingest": ingest,
    "sample": sample,
    "generate": generate,
    "rollout": rollout,
    "borrow": borrow,
    "train": train,
    "fisher": fisher,
    "score": score,
    "select": select,
    "teach": teach,
    "evaluate": evaluate,
    "general": general,
    "probe": probe,
    "meta": meta,
    "weights": weights,
}
# Stages that write checkpoints.
_SAVED = ("train", "meta")
_TICK_SECONDS = 0.25
_ASK_SECONDS = 2.0


@dataclass(slots=True)
class _Progress:
    """Which stages are done, running or not begun; and, once the run is to end, how each ended.

    Attributes:
        saving: running trainings that are waited for while the run ends; None before.
        told: a sentence per stage that has ended since.
    """

    waiting: list[Job]
    running: dict[str, Job] = field(default_factory=lambda: dict[str, Job]())
    records: dict[str, StageRecord] = field(default_factory=lambda: dict[str, StageRecord]())
    error: BaseException | None = None
    saving: set[str] | None = None
    told: list[str] = field(default_factory=lambda: list[str]())

    def ready(self, slots: int) -> list[Job]:
        if self.error is not None or self.saving is not None:
            return []
        able = [
            job
            for job in self.waiting
            if all(other.fingerprint in self.records for other in job.stage.inputs.values())
        ]
        return able[: max(0, slots - len(self.running))]

    def begin(self, job: Job) -> None:
        self.waiting.remove(job)
        self.running[job.stage.fingerprint] = job

    def end(self, stage: Stage, result: StageRecord | BaseException) -> None:
        del self.running[stage.fingerprint]
        if isinstance(result, StageRecord):
            self.records[stage.fingerprint] = result
        else:
            self.error = self.error or result
        if self.saving is not None:
            self.saving.discard(stage.fingerprint)
            finished = isinstance(result, StageRecord)
            self.told.append(f"{stage} is finished" if finished else str(result))

    def configs(self) -> dict[Stage, StreamConfig]:
        return {job.stage: job.config for job in self.running.values()}

    def halt(self, monitor: Any, interrupts: Interrupts) -> None:
        """Begin no more stages, and ask trainings that are past their start to save and end."""
        self.saving = set()
        self.told = [str(self.error)] if self.error is not None else []
        trainings = [job.stage for job in self.running.values() if job.stage.name == "train"]
        if trainings and monitor is not None:
            monitor.stop.remote()
            numbers = _snapshot(monitor)
            begun = [s for s in trainings if "steps_done" in numbers.get(s.key, {})]
            self.saving = {stage.fingerprint for stage in begun}
        waited_for = [str(stage) for stage in trainings if stage.fingerprint in self.saving]
        interrupts.announce(waited_for, release_all)

    def left(self) -> list[str]:
        """Return what happened to stages since the halt, those that are left as they are last."""
        goes_on, begins = "it goes on from its last checkpoint", "it begins again"
        return self.told + [
            f"{job.stage} was left, {goes_on if job.stage.name in _SAVED else begins}"
            for job in self.running.values()
        ]


def run_stages(
    store: Store,
    jobs: Sequence[Job],
    monitor: Any,
    provenance: Provenance,
    parallel: int,
    interrupts: Interrupts | None = None,
    capacity: Capacity | None = None,
) -> Iterator[StageEvent | None]:
    """Run stages until all are in the store; yields events as they happen, and None between them.

    Args:
        jobs: each after its inputs; a stage that several streams ask for is done once.
        parallel: how many may run at the same time.
        interrupts: whether the run is to end is asked there all the time.
        capacity: asked all the time whether the cluster still has what running stages need.

    Raises:
        Interrupted: the run was asked to end; stages may still be running, and commit nothing.
        ClusterTooSmall: they would wait for ever; they commit nothing either.
        The first error of a stage, once the stages beside it have ended.
    """
    interrupts = interrupts or Interrupts()
    events: queue.Queue[StageEvent | tuple[Stage, StageRecord | BaseException]] = queue.Queue()
    distinct = {job.stage.fingerprint: job for job in reversed(jobs)}
    waiting = [job for job in jobs if distinct[job.stage.fingerprint] is job]
    progress = _Progress(waiting=waiting)

    def work(job: Job) -> None:
        stage, config = job.stage, job.config
        report = Reporter(monitor, stage.key)
        try:
            record = run_stage(
                store,
                stage,
                lambda workspace: COMPUTE[stage.name](workspace, config, stage.task, report),
                on_event=events.put,
                provenance=provenance,
            )
            events.put((stage, record))
        except BaseException as error:
            events.put((stage, error))

    while progress.running or progress.ready(1):
        if interrupts.asked:
            if progress.saving is None:
                progress.halt(monitor, interrupts)
            if not progress.saving or interrupts.expired:
                break
        for job in progress.ready(parallel):
            progress.begin(job)
            name = str(job.stage)
            threading.Thread(target=work, args=(job,), name=name, daemon=True).start()
        if capacity is not None:
            try:
                capacity.check(progress.configs())
            except ClusterTooSmall:
                abandon_all()
                raise
        try:
            item = events.get(timeout=_TICK_SECONDS)
        except queue.Empty:
            yield None
            continue
        if isinstance(item, StageEvent):
            yield item
            continue
        progress.end(*item)
    if interrupts.asked and (progress.running or progress.waiting or progress.error):
        abandon_all()
        raise interrupts.error(progress.left())
    if progress.error is not None:
        raise progress.error


def _snapshot(monitor: Any) -> dict[str, dict[str, Any]]:
    try:
        return ray.get(monitor.snapshot.remote(), timeout=_ASK_SECONDS)
    except (ray.exceptions.RayError, TimeoutError):
        return {}
