"""Stages: what is to be computed, found by what it is made of, computed once.

A `Stage` says what decides a result: name, version, task, configuration, inputs, digests of
sources. The hash of that is its address in the store. `run_stage` looks there, and only if nothing
is there takes the lease of the address, computes, and commits by writing the record last. So a run
that is killed anywhere can be repeated, and two runs at once do the work once.

Changing what a stage computes without changing its inputs is announced by a higher `version`; the
code itself is not hashed, because most edits do not change results and every hash change costs GPU
hours.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.artifact import (
    RECORD,
    Artifact,
    Depth,
    StageRecord,
    StageRef,
    verify,
)
from pipelines.claims import Owner
from pipelines.fingerprint import fingerprint, plain
from pipelines.forgotten import require_settled
from pipelines.lease import TTL_SECONDS, Lease, holder
from pipelines.provenance import PeakMemory, Provenance, now_iso
from pipelines.store import Store
from pipelines.workspace import (
    ATTEMPTS,
    FAILURE,
    KEPT_BETWEEN_ATTEMPTS,
    SCRATCH,
    StageOutcome,
    Workspace,
)
from seekr.errors import ConfigError, LeaseLost, SeekrError, StoreError

__all__ = [
    "Artifact", "Stage", "StageEvent", "StageOutcome", "StageRecord", "StageRef", "Stopped",
    "Workspace", "find", "run_stage", "state", "verify",
]  # fmt: skip

EventKind = Literal["reused", "waiting", "started", "resumed", "finished", "failed", "stopped"]
State = Literal["reused", "running", "failed", "interrupted", "missing"]


class Stopped(SeekrError):
    """A computation ended early because the run was asked to; it goes on from what it saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Something to compute, or to find. Equal if the fingerprints are.

    Attributes:
        name: the kind of work, such as `train`.
        version: raised by hand when the same inputs shall give another result.
        task: the task it is for; part of the identity, because outputs name tasks.
        config: the fields that decide the result, and no others.
        inputs: stages whose outputs are read, by the name the computation knows them by.
        sources: digests of data from outside the store, by name.
        payload: what is hashed, as plain JSON.
        fingerprint: 20 hex characters of the payload's hash.
    """

    name: str
    task: str
    version: int = 1
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)
    inputs: Mapping[str, Stage] = field(default_factory=dict, compare=False, repr=False)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    payload: dict[str, Any] = field(init=False, compare=False, repr=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), ("task", self.task)):
            if not text or text.startswith(".") or set(text) & set("/\\\n\0"):
                raise ConfigError(
                    f"stage {self.name!r} of task {self.task!r}: the {what} becomes a folder name; "
                    "it must not be empty, start with '.' or contain a slash. Choose another one."
                )
        payload = {
            "stage": self.name,
            "version": self.version,
            "task": self.task,
            "config": plain(self.config, f"{self.name}/{self.task}: config"),
            "inputs": {name: stage.fingerprint for name, stage in self.inputs.items()},
            "sources": plain(self.sources, f"{self.name}/{self.task}: sources"),
        }
        object.__setattr__(self, "payload", payload)
        object.__setattr__(self, "fingerprint", fingerprint(payload))

    def __str__(self) -> str:
        return f"{self.name}/{self.task}"

    @property
    def key(self) -> str:
        """The stage's folder, relative to the store's root."""
        return f"{self.name}/{self.task}/{self.fingerprint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEvent:
    """One step in the life of a stage, for progress displays.

    Attributes:
        kind: what happened.
        stage: to which stage.
        attempt: the number of the attempt, for `started`, `resumed`, `failed` and `stopped`.
        record: what was found or committed, for `reused` and `finished`.
        owner: who is waited for, for `waiting`.
        error: what went wrong, for `failed`; what was saved, for `stopped`.
    """

    kind: EventKind
    stage: Stage
    attempt: int | None = None
    record: StageRecord | None = None
    owner: Owner | None = None
    error: str | None = None


Compute = Callable[[Workspace], StageOutcome]
OnEvent = Callable[[StageEvent], None]


def find(store: Store, stage: Stage) -> StageRecord | None:
    """The record of a finished stage, or None.

    Raises:
        StoreError: there is a record that cannot be trusted.
    """
    if store.stat(f"{stage.key}/{RECORD}") is None:
        return None
    return StageRecord.load(store, stage.key)


def state(store: Store, stage: Stage, *, ttl: float = TTL_SECONDS) -> State:
    """How far a stage is: in the store, being computed, not begun; or its last attempt failed, or
    was interrupted, which is to end without a word."""
    if find(store, stage) is not None:
        return "reused"
    if holder(store, stage.key, ttl=ttl) is not None:
        return "running"
    attempts, failure = _attempts(store, stage), f"{stage.key}/{FAILURE}"
    if store.stat(failure) and store.read_json(failure).get("attempt", attempts) >= attempts:
        return "failed"
    return "interrupted" if attempts else "missing"


def run_stage(
    store: Store,
    stage: Stage,
    compute: Compute,
    *,
    verify: Depth = "digests",
    on_event: OnEvent | None = None,
    provenance: Provenance | None = None,
    ttl: float = TTL_SECONDS,
) -> StageRecord:
    """Finds the stage in the store or computes it, at most once among all runs.

    Args:
        store: where results are kept.
        stage: what is wanted. Its inputs must be finished.
        compute: fills the workspace. An exception from it leaves `failure.json` and is passed on,
            `Stopped` without being a failure.
        verify: how the inputs are checked before anything is computed from them. A stage that is
            reused is always checked by existence and size.
        on_event: called in this thread at every step.
        provenance: the circumstances to record. Default: those of this process and working
            directory.
        ttl: see `lease.Lease`.

    Raises:
        StoreError: an input is missing or was changed, rows are being forgotten, or the store cannot
            be used.
        LeaseLost: another run took over; nothing was committed.
    """
    tell = _ignore if on_event is None else on_event
    if record := _reuse(store, stage, tell):
        return record

    def waiting(owner: Owner) -> None:
        tell(StageEvent(kind="waiting", stage=stage, owner=owner))

    with Lease(store, stage.key, ttl=ttl, on_wait=waiting) as lease:
        if record := _reuse(
            store, stage, tell
        ):  # whoever held the lease before us may have finished
            return record
        require_settled(store)
        workspace = _prepare(store, stage, lease, verify)
        kind = "resumed" if workspace.resumed else "started"
        tell(StageEvent(kind=kind, stage=stage, attempt=workspace.attempt))
        try:
            record = _compute(stage, compute, workspace, provenance or _circumstances())
            lease.check()
        except LeaseLost:
            raise
        except Stopped as stop:
            tell(
                StageEvent(kind="stopped", stage=stage, attempt=workspace.attempt, error=str(stop))
            )
            raise
        except Exception as error:
            _note_failure(workspace, error)
            text = f"{type(error).__name__}: {error}"
            tell(StageEvent(kind="failed", stage=stage, attempt=workspace.attempt, error=text))
            raise
        record.save(store)
        for name in (FAILURE, ATTEMPTS, SCRATCH):
            store.remove(workspace.path(name))
    tell(StageEvent(kind="finished", stage=stage, record=record))
    return record


@functools.cache
def _circumstances() -> Provenance:
    return Provenance.capture()  # once: a run is the commit it was started from


def _ignore(event: StageEvent) -> None:
    pass


def _reuse(store: Store, stage: Stage, tell: OnEvent) -> StageRecord | None:
    record = find(store, stage)
    if record is not None:
        verify(store, record, "sizes")
        tell(StageEvent(kind="reused", stage=stage, record=record))
    return record


def _prepare(store: Store, stage: Stage, lease: Lease, depth: Depth) -> Workspace:
    """Checks the inputs, clears what an unfinished attempt left, and counts this attempt."""
    inputs = {name: _input(store, stage, name, depth) for name in stage.inputs}
    prefix = len(stage.key) + 1
    left = {file.path[prefix:].partition("/")[0] for file in store.list(stage.key)}
    for name in sorted(left - KEPT_BETWEEN_ATTEMPTS):
        store.remove(f"{stage.key}/{name}")
    attempt = 1 + _attempts(store, stage)
    # `seekr forget` looks there for what an unfinished stage has read.
    read = {name: wanted.key for name, wanted in stage.inputs.items()}
    store.write_json(f"{stage.key}/{ATTEMPTS}", {"attempts": attempt, "inputs": read})
    return Workspace(
        store=store,
        key=stage.key,
        config=stage.payload["config"],
        inputs=inputs,
        attempt=attempt,
        resumed=attempt > 1,
        lease=lease,
    )


def _attempts(store: Store, stage: Stage) -> int:
    path = f"{stage.key}/{ATTEMPTS}"
    return int(store.read_json(path)["attempts"]) if store.stat(path) else 0


def _input(store: Store, stage: Stage, name: str, depth: Depth) -> Artifact:
    wanted = stage.inputs[name]
    record = find(store, wanted)
    if record is None:
        raise StoreError(
            f"{stage}: its input {name!r} is not in the store: {store.uri_for(wanted.key)} has no "
            f"record. Run {wanted} first."
        )
    verify(store, record, depth)
    return Artifact(store=store, record=record)


def _compute(
    stage: Stage, compute: Compute, workspace: Workspace, provenance: Provenance
) -> StageRecord:
    started_at, clock = now_iso(), time.monotonic()
    with PeakMemory() as memory:
        outcome = compute(workspace)
    return StageRecord(
        stage=stage.name,
        version=stage.version,
        task=stage.task,
        fingerprint=stage.fingerprint,
        payload=stage.payload,
        inputs={
            name: StageRef(stage=wanted.name, task=wanted.task, fingerprint=wanted.fingerprint)
            for name, wanted in stage.inputs.items()
        },
        outputs=workspace.outputs(outcome.outputs),
        rows=outcome.rows,
        stats=outcome.plain_stats(),
        seeds=dict(outcome.seeds),
        started_at=started_at,
        finished_at=now_iso(),
        seconds=round(time.monotonic() - clock, 3),
        peak_memory_bytes=memory.peak_bytes,
        attempts=workspace.attempt,
        host=provenance.host,
        user=provenance.user,
        argv=provenance.argv,
        git_commit=provenance.git_commit,
        versions=provenance.versions,
    )


def _note_failure(workspace: Workspace, error: Exception) -> None:
    if workspace.lease.lost:
        return  # the folder may be another run's by now
    note = {
        "error": type(error).__name__,
        "message": workspace.store.location.redact(str(error)),
        "time": now_iso(),
        "attempt": workspace.attempt,
    }
    with contextlib.suppress(StoreError):  # the error that is on its way up matters more
        workspace.store.write_json(workspace.path(FAILURE), note)
