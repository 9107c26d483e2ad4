"""Bringing the world in line with streams: run the stages that are missing, in the graphs' order.

Independent stages run side by side (an evaluation beside the next task's training), each in a thread
that waits for Ray. Events of all threads arrive in one queue and are handled by the caller's thread,
so a view needs no locks. The first failure lets running stages end and starts no new ones.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.config import StreamConfig
from pipelines.evaluate import evaluate
from pipelines.ingest import ingest
from pipelines.monitor import Reporter
from pipelines.provenance import Provenance
from pipelines.sample import sample
from pipelines.score import score
from pipelines.select import select
from pipelines.stage import Stage, StageEvent, StageOutcome, StageRecord, run_stage
from pipelines.store import Store
from pipelines.teach import teach
from pipelines.train import train
from pipelines.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stage, and the config of the stream that asks for it: where its sources lie, how it runs."""

    stage: Stage
    config: StreamConfig


StageFunction = Callable[[Workspace, StreamConfig, str, Reporter], StageOutcome]
COMPUTE: dict[str, StageFunction] = {
    "ingest": ingest,
    "sample": sample,
    "train": train,
    "score": score,
    "select": select,
    "teach": teach,
    "evaluate": evaluate,
}
_TICK_SECONDS = 0.25


@dataclass(slots=True)
class _Progress:
    """Which stages are done, running or not begun."""

    waiting: list[Job]
    running: set[str] = field(default_factory=set)
    records: dict[str, StageRecord] = field(default_factory=dict)
    error: BaseException | None = None

    def ready(self, slots: int) -> list[Job]:
        if self.error is not None:
            return []
        able = [
            job
            for job in self.waiting
            if all(other.fingerprint in self.records for other in job.stage.inputs.values())
        ]
        return able[: max(0, slots - len(self.running))]


def run_stages(
    store: Store,
    jobs: Sequence[Job],
    monitor: Any,
    provenance: Provenance,
    parallel: int,
) -> Iterator[StageEvent | None]:
    """Run stages until all are in the store; yields events as they happen, and None between them.

    Args:
        jobs: each after its inputs; a stage that several streams ask for is done once.
        parallel: how many may run at the same time.

    Raises:
        The first error of a stage, once the stages beside it have ended.
    """
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
        for job in progress.ready(parallel):
            progress.waiting.remove(job)
            progress.running.add(job.stage.fingerprint)
            name = str(job.stage)
            threading.Thread(target=work, args=(job,), name=name, daemon=True).start()
        try:
            item = events.get(timeout=_TICK_SECONDS)
        except queue.Empty:
            yield None
            continue
        if isinstance(item, StageEvent):
            yield item
            continue
        stage, result = item
        progress.running.discard(stage.fingerprint)
        if isinstance(result, StageRecord):
            progress.records[stage.fingerprint] = result
        else:
            progress.error = progress.error or result
    if progress.error is not None:
        raise progress.error
