"""Runs of a stream on a cluster: how they are named, found, started once, followed to their end.

A run is one job on a cluster: a RayJob, or a job of an existing Ray cluster. Its name is made of the
stream's name, a digest of what was submitted and a number, so the same submission always finds its own
runs again, and two people who submit it at once start one. What differs between Kubernetes and the Jobs
API of Ray is behind `Backend`; what is decided is decided here, from runs alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from pipelines.continual_config import HELD_BACK, HELD_BACK_LINE
from seekr.errors import SeekrError

State = Literal["waiting", "running", "retrying", "suspended", "done", "failed", "stopped"]
ENDED: tuple[State, ...] = ("done", "failed", "stopped")
MAX_NAME = 47
"""Characters of a RayJob's name, to which the operator adds when it names pods."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Seconds that Ray gives a job between asking it to end and killing it; 3 unless it is set."""
CLOSING_SECONDS = 15
"""What a run takes to end beyond its grace: closing Ray and MLflow, and the interpreter's own end."""
HELD_BACK_REASON = "the gate has held the newest model back"
_DIGEST_LENGTH = 7
# Why a run under way is not the one that is submitted: its content, or that a schedule has started it.
_OTHERS = (
    "with other content of this stream, so nothing was submitted",
    "as a schedule has started it, so nothing was submitted",
)
# What a process that was asked to end returns: SIGINT, SIGTERM.
_STOPPED_CODES = (130, 143)
_STOPPED, _FAILED = 143, 1

Tell = Callable[[str], None]


class SubmissionError(SeekrError):
    """A run cannot be started, found or followed on the cluster as asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a stream on a cluster, as the cluster tells it.

    Attributes:
        name: of the RayJob, or the submission's id.
        digest: of what was submitted; empty where somebody else has started it, such as a schedule.
        exit_code: of `seekr run`; None while it runs, and where the cluster does not know it.
        attempt: which one this is, from 1, of at most `attempts`.
        cluster: the Ray cluster it runs on.
        resumable: whether what it waits for may still come, though nothing runs.
    """

    name: str
    digest: str
    state: State
    reason: str = ""
    exit_code: int | None = None
    attempt: int = 1
    attempts: int = 1
    submitted: datetime | None = None
    started: datetime | None = None
    ended: datetime | None = None
    cluster: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED

    @property
    def code(self) -> int:
        """What `submit --wait` returns for it: 0 done, `seekr run`'s own code, 1 where it is unknown.

        Done is also what the gate has held back, which is 3. A process that a signal has ended returns
        128 and the signal's number, as a shell has it.
        """
        if self.state == "done":
            return self.exit_code or 0
        if self.state == "stopped":
            return self.exit_code if self.exit_code in _STOPPED_CODES else _STOPPED
        if not self.exit_code:
            return _FAILED
        return 128 - self.exit_code if self.exit_code < 0 else self.exit_code

    @property
    def seconds(self) -> float | None:
        """How long it ran, or has been running."""
        if self.started is None:
            return None
        return max(((self.ended or datetime.now(UTC)) - self.started).total_seconds(), 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a program to read."""
        values = asdict(self)
        for key in ("submitted", "started", "ended"):
            values[key] = None if values[key] is None else values[key].isoformat()
        if self.over:
            values["exit_code"] = self.code
        return values


class Backend(Protocol):
    """A cluster on which runs of one stream are started, seen and stopped."""

    @property
    def where(self) -> str:
        """The cluster in words."""
        ...

    def runs(self) -> list[Run]:
        """Return the stream's runs, oldest first.

        Raises:
            SubmissionError: the cluster cannot be asked.
        """
        ...

    def start(self, name: str, digest: str, tell: Tell) -> Run:
        """Start a run under a name; one that is there under it already is returned as it is."""
        ...

    def find(self, name: str) -> Run:
        """Return a run as it is now."""
        ...

    def logs(self, run: Run, *, follow: bool, tell: Tell) -> Iterator[str]:
        """Yield what a run has printed; followed, until it is over."""
        ...

    def stop(self, run: Run, *, now: bool, tell: Tell) -> Run:
        """End a run: trainings may save, unless it has to be now. Returns it as it is afterwards."""
        ...


def digest_of(content: Mapping[str, Any]) -> str:
    """Return a short digest of what is submitted, the same for the same plain values."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH]


def run_name(base: str, digest: str, number: int) -> str:
    """Return a run's name: at most 47 characters, a DNS label where `base` is one."""
    suffix = f"-{digest}-{number}"
    return f"{base[: MAX_NAME - len(suffix)].rstrip('-')}{suffix}"


def number_of(name: str) -> int:
    """Return the number that a run's name ends with, 0 if it has none."""
    last = name.rpartition("-")[2]
    return int(last) if last.isdecimal() else 0


def under_way(runs: Sequence[Run]) -> Run | None:
    """Return the newest run that is not over yet."""
    return next((run for run in reversed(runs) if not run.over), None)


def submit(backend: Backend, base: str, digest: str, *, again: bool, tell: Tell) -> Run:
    """Start a run unless one of the same content is under way or done; safe to repeat.

    Args:
        base: what its name begins with.
        digest: of what is submitted.
        again: also run what has been done; a run under way still stays the only one.

    Raises:
        SubmissionError: a run with other content is under way.
    """
    runs = backend.runs()
    current = under_way(runs)
    if current is not None:
        if current.digest != digest:
            other = _OTHERS[not current.digest]
            raise SubmissionError(
                f"run {current.name} on {backend.where} is {current.state} {other}; wait for it (seekr "
                "cluster logs --follow) or end it (seekr cluster cancel), then submit again"
            )
        tell(f"run {current.name} is {current.state} already; nothing was submitted")
        return current
    same = [run for run in runs if run.digest == digest]
    if same and same[-1].state == "done" and not again:
        note = f" ({same[-1].reason})" if same[-1].reason else ""
        tell(
            f"run {same[-1].name} has done all of this{note}; nothing was submitted. --again runs it once "
            "more"
        )
        return same[-1]
    number = 1 + max((number_of(run.name) for run in same), default=0)
    run = backend.start(run_name(base, digest, number), digest, tell)
    tell(f"run {run.name} is submitted to {backend.where}")
    return run


def wait(backend: Backend, run: Run, *, write: Tell, tell: Tell) -> Run:
    """Follow a run's logs to its end.

    A run that may not end with 3, as a RayJob would be tried again, says in its log what 3 says.

    Args:
        write: takes what the run prints, a piece at a time.
        tell: takes what happens around it.
    """
    held_back = False
    for text in backend.logs(run, follow=True, tell=tell):
        write(text)
        held_back = held_back or HELD_BACK_LINE in text.splitlines()
    run = backend.find(run.name)
    if held_back and run.state == "done":
        run = _held_back(run)
    tell(ending(run))
    return run


def ending(run: Run) -> str:
    """Return a sentence on how a run has ended."""
    reason = f": {run.reason}" if run.reason else ""
    tries = f" in attempt {run.attempt} of {run.attempts}" if run.attempts > 1 else ""
    code = f" (exit code {run.code})" if run.code else ""
    return f"run {run.name} {_VERBS[run.state]}{tries}{code}{reason}"


def newest(backend: Backend, name: str | None = None) -> Run:
    """Return the run of that name, or the one under way, or the last.

    Raises:
        SubmissionError: there is none.
    """
    runs = backend.runs()
    if name is not None:
        found = next((run for run in runs if run.name == name), None)
        if found is None:
            known = ", ".join(run.name for run in runs[-5:]) or "none"
            raise SubmissionError(
                f"run {name} of this stream is not on {backend.where}; there are: {known}"
            )
        return found
    if not runs:
        raise SubmissionError(
            f"no run of this stream is on {backend.where}; start one with seekr cluster submit"
        )
    return under_way(runs) or runs[-1]


def ended(run: Run, state: State, code: int | None, reason: str) -> Run:
    """Return a run at its end; `seekr run` has not failed if it was asked to end, or held a model back."""
    if state == "failed" and code == HELD_BACK:
        return _held_back(run)
    if state == "failed" and code in _STOPPED_CODES:
        state = "stopped"
    return replace(run, state=state, exit_code=code, reason=reason)


def _held_back(run: Run) -> Run:
    return replace(run, state="done", exit_code=HELD_BACK, reason=HELD_BACK_REASON)


_VERBS: dict[State, str] = {
    "waiting": "waits",
    "running": "runs",
    "retrying": "is tried again",
    "suspended": "is suspended",
    "done": "is done",
    "failed": "failed",
    "stopped": "was stopped",
}
