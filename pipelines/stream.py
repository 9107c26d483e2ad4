"""A stream opened: its config, its graph, its store, and what happened to each stage.

Everything the command line does begins with `open_stream`, which validates all there is to validate
and starts nothing; Ray is not even imported. `run_streams` is the only thing that computes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.arrivals import Arrival, Register
from pipelines.artifact import Artifact, StageRecord
from pipelines.capacity import Capacity, ClusterTooSmall
from pipelines.config import StreamConfig
from pipelines.decisions import DecisionLog
from pipelines.gate import decide
from pipelines.graph import build_graph
from pipelines.inspection import as_is
from pipelines.interrupts import Interrupted, Interrupts
from pipelines.job import Job
from pipelines.lease import release_all
from pipelines.load import load_config
from pipelines.provenance import Provenance, now_iso
from pipelines.report import render_report
from pipelines.results import StageResult, StreamView
from pipelines.sources import display_name
from pipelines.stage import Stage, StageEvent, find, state
from pipelines.store import Store
from pipelines.survey import Facts, survey
from pipelines.tracking import Tracker, tracking_uri
from pipelines.workspace import FAILURE
from seekr.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from pipelines.live_steps import Steps

RunState = Literal["ran", "reused", "missing", "running", "failed", "interrupted"]
Watch = Callable[[StageEvent | None, Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A validated stream: nothing in it is known to be wrong. `arrivals` came through its inbox."""

    path: Path
    config: StreamConfig
    facts: Facts
    stages: tuple[Stage, ...]
    store: Store
    arrivals: tuple[Arrival, ...] = ()

    @property
    def run_log(self) -> str:
        """Path of the note about the stream's last run, relative to the store's root."""
        return f"streams/{self.config.name}/last_run.json"

    @property
    def last_model(self) -> str:
        """The task of the last training: what `export` and `lineage` mean by the model."""
        return [stage.task for stage in self.stages if stage.name == "train"][-1]

    @property
    def report_path(self) -> str:
        """Path of the stream's newest report, relative to the store's root."""
        return f"streams/{self.config.name}/report.html"


def open_stream(
    path: Path,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    writable: bool = False,
) -> Stream:
    """Read, validate and look at the world; no compute, and nothing written unless asked to.

    Args:
        overrides, settings: what is changed in the YAML, see `load_config`.
        writable: make the storage if it is not there, and see that it can be written.

    Raises:
        ConfigError, DataError: what is wrong, all of it at once where possible; also a storage that
            cannot be opened, or not be written if `writable`.
    """
    config = load_config(path, overrides, settings)
    register = None
    if config.tasks_from is not None:
        register = Register(open_storage(config, writable=False), config.name)
        config = register.extend(config)
        _require_tasks(path, config)
    facts = survey(config, as_is if register is None else register.as_delivered)
    stages = build_graph(config, facts)
    store = open_storage(config, writable=writable)
    arrivals = register.entries if register is not None else ()
    return Stream(
        path=path, config=config, facts=facts, stages=stages, store=store, arrivals=arrivals
    )


def _require_tasks(path: Path, config: StreamConfig) -> None:
    if not config.tasks:
        raise ConfigError(
            f"stream {path} has no task yet: its YAML names none and nothing has been taken from "
            f"{display_name(str(config.tasks_from))}; deliver a file and let it be taken: seekr tick {path}"
        )


def open_storage(config: StreamConfig, *, writable: bool) -> Store:
    """Open the stream's store.

    Raises:
        ConfigError: it cannot be opened, or not be written if `writable`.
    """
    try:
        store = Store.open(config.storage, writable=False)
        if store.is_local and Path(store.location.root).is_file():
            raise StoreError(
                f"{store.location.shown} is a file; a folder or a URI is needed: choose another"
            )
        return Store.open(config.storage, writable=True) if writable else store
    except StoreError as error:
        raise ConfigError(f"storage: {error}") from error


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
    return StreamView.of_config(
        stream.config,
        results,
        arrivals=stream.arrivals,
        decisions=DecisionLog(stream.store, stream.config.name).read(),
    )


def finished_view(stream: Stream) -> StreamView:
    """Return `view_of` a stream of which something is finished.

    Raises:
        ConfigError: nothing is.
    """
    view = view_of(stream)
    if not view.stages:
        raise ConfigError(
            f"stream {stream.path}: no stage is finished with these settings, so there is nothing "
            f"to show; run it first: seekr run {stream.path}"
        )
    return view


def run_streams(
    streams: Sequence[Stream],
    watch: Watch,
    *,
    warn: Callable[[str], None],
    interrupts: Interrupts | None = None,
) -> list[StreamView]:
    """Run what is missing of some streams side by side; returns the view of each when finished.

    Stages that streams have in common are computed once. All share the first one's cluster.

    Args:
        streams: opened with `writable=True`, on one storage.
        watch: called in this thread with every event, and with None in between; its second
            argument asks the running stages for their newest numbers.
        warn: told, once per stream, if MLflow cannot be written; and if the cluster has lost what it needs.
        interrupts: entered by the caller if signals are to end the run in good order.

    Raises:
        Interrupted: a signal came; what was running has saved or begins again, nothing is held.
        ClusterTooSmall: hosts of the cluster are gone and did not come back.
        ConfigError: the streams have different storages, or one name.
        Whatever the first failing stage raised, after the others ended.
    """
    # Ray and the stages take seconds to import, and who only looks at a stream needs neither.
    from pipelines.live_steps import LiveSteps
    from pipelines.runner import run_stages

    first = streams[0]
    _check_together(streams)
    runs = [_Run(stream, warn) for stream in streams]
    jobs = [Job(stage=stage, config=s.config) for s in streams for stage in s.stages]
    provenance = Provenance.capture(first.path.parent.absolute())
    live, interrupts = LiveSteps(), interrupts or Interrupts()
    parallel = first.config.ray.parallel_stages
    try:
        with (
            _monitor_if_needed(streams) as monitor,
            Capacity(first.config.ray.patience, warn) as capacity,
            interrupts.deferred(),
        ):
            for event in run_stages(
                first.store, jobs, monitor, provenance, parallel, interrupts, capacity
            ):
                steps = live.fetch(monitor)
                for run in runs:
                    run.note_steps(steps)
                    if event is not None:
                        run.note(event)
                watch(event, monitor)
        return [run.finish() for run in runs]
    except (Interrupted, ClusterTooSmall):
        release_all()
        raise
    finally:
        for run in runs:
            run.close()


class _Run:
    """What is noted about one stream while it runs: its run log, and MLflow."""

    def __init__(self, stream: Stream, warn: Callable[[str], None]) -> None:
        self._stream = stream
        self._keys = {stage.key for stage in stream.stages}
        self._log: dict[str, Any] = {"started_at": now_iso(), "ran": [], "reused": []}
        self._tracker = Tracker(
            tracking_uri(stream.config.tracking.uri, stream.store),
            stream=stream.config.name,
            store=stream.store,
            warn=warn,
        )

    def note(self, event: StageEvent) -> None:
        record, store = event.record, self._stream.store
        if record is None or record.key not in self._keys:
            return
        self._log["ran" if event.kind == "finished" else "reused"].append(record.key)
        store.write_json(self._stream.run_log, self._log)
        self._tracker.log_record(Artifact(store=store, record=record))

    def note_steps(self, steps: Mapping[str, Steps]) -> None:
        """Show steps of trainings that still run."""
        for stage in self._stream.stages if steps else ():
            if stage.key in steps:
                self._tracker.log_steps(stage, steps[stage.key])

    def finish(self) -> StreamView:
        """Write the run log, the report beside it, and the stream's figures."""
        store = self._stream.store
        store.write_json(self._stream.run_log, self._log | {"finished_at": now_iso()})
        view = view_of(self._stream)
        decided = decide(store, self._stream.config, view)
        if decided is not None:
            view = replace(view_of(self._stream), decided=decided)
        page = render_report(view).encode()
        store.write_bytes(self._stream.report_path, page)
        with tempfile.TemporaryDirectory(prefix="seekr-report-") as folder:
            path = Path(folder) / "report.html"
            path.write_bytes(page)
            self._tracker.finish(view, path)
            self._tracker.close()
        return view

    def close(self) -> None:
        self._tracker.close()


def _check_together(streams: Sequence[Stream]) -> None:
    places = sorted({stream.store.location.shown for stream in streams})
    if len(places) > 1:
        raise ConfigError(
            f"the streams have different storages: {', '.join(places)}; streams that run together "
            "share one: set storage to the same place"
        )
    names = [stream.config.name for stream in streams]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"several streams have the name {', '.join(twice)}; streams that run together keep "
            "their results and reports by name: give each its own"
        )


@contextmanager
def _monitor_if_needed(streams: Sequence[Stream]) -> Iterator[Any]:
    """Start Ray and a monitor, unless every stage is in the store."""
    if all(len(records_of(stream)) == len(stream.stages) for stream in streams):
        yield None
        return
    from pipelines.monitor import start_monitor
    from pipelines.session import ray_session

    with ray_session([stream.config for stream in streams]):
        yield start_monitor()


def _status(stream: Stream, stage: Stage, ran: set[str]) -> StageStatus:
    found = state(stream.store, stage)
    record = find(stream.store, stage) if found == "reused" else None
    failure = stream.store.read_json(f"{stage.key}/{FAILURE}") if found == "failed" else {}
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
