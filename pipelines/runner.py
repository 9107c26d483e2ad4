"""Bringing the world in line with a stream: run the stages that are missing, in the graph's order.

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

    waiting: list[Stage]
    running: set[str] = field(default_factory=set)
    records: dict[str, StageRecord] = field(default_factory=dict)
    error: BaseException | None = None

    def ready(self, slots: int) -> list[Stage]:
        if self.error is not None:
            return []
        able = [
            stage
            for stage in self.waiting
            if all(other.fingerprint in self.records for other in stage.inputs.values())
        ]
        return able[: max(0, slots - len(self.running))]


def run_stages(
    store: Store,
    config: StreamConfig,
    stages: Sequence[Stage],
    monitor: Any,
    provenance: Provenance,
) -> Iterator[StageEvent | None]:
    """Run stages until all are in the store; yields events as they happen, and None between them.

    Raises:
        The first error of a stage, once the stages beside it have ended.
    """
    events: queue.Queue[StageEvent | tuple[Stage, StageRecord | BaseException]] = queue.Queue()
    progress = _Progress(waiting=list(stages))

    def work(stage: Stage) -> None:
        report = Reporter(monitor, str(stage))
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
        for stage in progress.ready(config.ray.parallel_stages):
            progress.waiting.remove(stage)
            progress.running.add(stage.fingerprint)
            threading.Thread(target=work, args=(stage,), name=str(stage), daemon=True).start()
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
