"""A stream opened: its config, its graph, its store, and what happened to each stage.

Everything the command line does begins with `open_stream`, which validates all there is to validate
and starts nothing. `run_stream` is the only thing that computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.artifact import Artifact, StageRecord
from pipelines.config import StreamConfig
from pipelines.graph import build_graph
from pipelines.load import load_config
from pipelines.monitor import start_monitor
from pipelines.provenance import Provenance, now_iso
from pipelines.report import write_report
from pipelines.results import StageResult, StreamView
from pipelines.runner import run_stages
from pipelines.session import ray_session
from pipelines.stage import Stage, StageEvent, find, state
from pipelines.store import Store
from pipelines.survey import Facts, survey
from pipelines.tracking import Tracker, tracking_uri
from pipelines.workspace import FAILURE

RunState = Literal["ran", "reused", "missing", "running", "failed"]
Watch = Callable[[StageEvent | None, Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A validated stream: nothing in it is known to be wrong."""

    path: Path
    config: StreamConfig
    facts: Facts
    stages: tuple[Stage, ...]
    store: Store

    @property
    def run_log(self) -> str:
        """Path of the note about the stream's last run, relative to the store's root."""
        return f"streams/{self.config.name}/last_run.json"


def open_stream(path: Path, overrides: Sequence[str] = (), *, writable: bool = False) -> Stream:
    """Read, validate and look at the world; no compute, and nothing written unless asked to.

    Raises:
        ConfigError, DataError: what is wrong, all of it at once where possible.
        StoreError: the storage cannot be opened, or not be written if `writable`.
    """
    config = load_config(path, overrides)
    facts = survey(config)
    stages = build_graph(config, facts)
    store = Store.open(config.storage, writable=writable)
    return Stream(path=path, config=config, facts=facts, stages=stages, store=store)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One line of `seekr status`. Seconds, rows and memory are of the run that computed it."""

    name: str
    task: str
    fingerprint: str
    state: RunState
    seconds: float | None
    rows: int | None
    peak_memory_bytes: int | None
    attempts: int | None
    error: str | None


def status_of(stream: Stream) -> list[StageStatus]:
    """Return where every stage stands, in the graph's order."""
    ran = set(_last_run(stream).get("ran", []))
    return [_status(stream, stage, ran) for stage in stream.stages]


def records_of(stream: Stream) -> dict[Stage, StageRecord]:
    """Return the finished stages' records, in the graph's order."""
    found = {stage: find(stream.store, stage) for stage in stream.stages}
    return {stage: record for stage, record in found.items() if record is not None}


def view_of(stream: Stream) -> StreamView:
    """Return what a report is made from: every finished stage, and whether the last run made it."""
    ran = set(_last_run(stream).get("ran", []))
    results = [
        StageResult(
            artifact=Artifact(store=stream.store, record=record),
            state="ran" if record.key in ran else "reused",
        )
        for record in records_of(stream).values()
    ]
    return StreamView.of_config(stream.config, results)


def run_stream(
    stream: Stream, watch: Watch, *, warn: Callable[[str], None], report: Path | None = None
) -> StreamView:
    """Run what is missing, track it, write the report; returns the finished stream's view.

    Args:
        stream: opened with `writable=True`.
        watch: called in this thread with every event, and with None in between; its second
            argument asks the running stages for their newest numbers.
        warn: told once if MLflow cannot be written.
        report: where to write the HTML report.

    Raises:
        Whatever the first failing stage raised, after the others ended.
    """
    provenance = Provenance.capture(stream.path.parent.absolute())
    log: dict[str, Any] = {"started_at": now_iso(), "ran": [], "reused": []}
    tracker = Tracker(
        tracking_uri(stream.config.tracking.uri, stream.store),
        stream=stream.config.name,
        store=stream.store,
        warn=warn,
    )

    def note(event: StageEvent) -> None:
        if event.record is None:
            return
        log["ran" if event.kind == "finished" else "reused"].append(event.record.key)
        stream.store.write_json(stream.run_log, log)
        tracker.log_record(Artifact(store=stream.store, record=event.record))

    try:
        with _monitor_if_needed(stream) as monitor:
            for event in run_stages(
                stream.store, stream.config, stream.stages, monitor, provenance
            ):
                if event is not None:
                    note(event)
                watch(event, monitor)
        stream.store.write_json(stream.run_log, log | {"finished_at": now_iso()})
        view = view_of(stream)
        if report is not None:
            write_report(view, report)
        tracker.finish(view, report)
        return view
    finally:
        tracker.close()


@contextmanager
def _monitor_if_needed(stream: Stream) -> Iterator[Any]:
    """Start Ray and a monitor, unless every stage is in the store."""
    if len(records_of(stream)) == len(stream.stages):
        yield None
        return
    with ray_session(stream.config):
        yield start_monitor()


def _status(stream: Stream, stage: Stage, ran: set[str]) -> StageStatus:
    found = state(stream.store, stage)
    record = find(stream.store, stage) if found == "reused" else None
    failure = (
        stream.store.read_json(f"{stage.key}/{FAILURE}") if found == "failed" else {}
    )
    return StageStatus(
        name=stage.name,
        task=stage.task,
        fingerprint=stage.fingerprint,
        state="ran" if record is not None and stage.key in ran else found,
        seconds=record.seconds if record else None,
        rows=record.rows if record else None,
        peak_memory_bytes=record.peak_memory_bytes if record else None,
        attempts=record.attempts if record else failure.get("attempt"),
        error=failure.get("message"),
    )


def _last_run(stream: Stream) -> dict[str, Any]:
    if stream.store.stat(stream.run_log) is None:
        return {}
    return stream.store.read_json(stream.run_log)
