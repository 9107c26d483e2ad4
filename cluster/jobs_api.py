"""Runs on an existing Ray cluster, through the Jobs API of its dashboard.

A run is a job whose metadata say of what stream and content it is. Its driver is `seekr run` on the head,
in a runtime environment that is packed when the run starts. A run that is stopped gets the seconds that
stand in that environment; Ray alone would give it three.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
from pydantic import SecretStr

from cluster import tokens
from cluster.runtime_env import Luggage, entrypoint, runtime_env
from cluster.submission import Run, State, SubmissionError, Tell, ended
from seekr.errors import ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

GRACE_SECONDS = 120.0
STREAM_KEY, DIGEST_KEY = "seekr_stream", "seekr_content"
# These would win over the address that was asked for.
_OTHER_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_TIMEOUT = 15.0
_POLL = 1.0
_STATES: dict[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "done",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


@dataclass(slots=True, kw_only=True)
class RayJobs:
    """One stream's runs on a Ray cluster.

    Args:
        address: of the dashboard, http:// or https://.
        stream: its name.
        token: of the cluster, None where it asks for none.
        luggage: what a run takes along; None where nothing is going to be started.
        pip: what Ray installs for it.
        grace: seconds that trainings get to save when a run is stopped.
        patience: seconds that a cluster that was there may be away while a run is followed.
    """

    address: str
    stream: str
    token: SecretStr | None = None
    luggage: Luggage | None = None
    pip: tuple[str, ...] = ()
    grace: float = GRACE_SECONDS
    patience: float = 300.0
    _client: JobSubmissionClient | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        return self.address

    def runs(self) -> list[Run]:
        with self._answers() as client:
            jobs = client.list_jobs()
        mine = [run_of(job) for job in jobs if (job.metadata or {}).get(STREAM_KEY) == self.stream]
        return sorted(mine, key=lambda run: run.submitted or datetime.min.replace(tzinfo=UTC))

    def start(self, name: str, digest: str, tell: Tell) -> Run:
        assert self.luggage is not None
        for path in self.luggage.expected:
            tell(f"the cluster must have {path}")
        with tempfile.TemporaryDirectory(prefix="seekr-submit-") as folder:
            packed = self.luggage.pack(Path(folder))
            env = runtime_env(packed, grace=self.grace, pip=self.pip)
            if not self._submitted(name, digest, env):
                tell(f"run {name} was submitted by somebody else just now")
        return self.find(name)

    def find(self, name: str) -> Run:
        with self._answers() as client:
            return run_of(client.get_job_info(name))

    def logs(self, run: Run, *, follow: bool, tell: Tell) -> Iterator[str]:
        if not follow:
            with self._answers() as client:
                yield client.get_job_logs(run.name)
            return
        shown, lost = 0, 0.0
        while True:
            try:
                for text, position in self._tail(run.name):
                    lost = 0.0
                    if position > shown:
                        yield text[max(0, len(text) - (position - shown)) :]
                        shown = position
                if self.find(run.name).over:
                    return
            except _Gone as error:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > self.patience:
                    raise SubmissionError(
                        f"{self.address} has not answered for {self.patience:g} s, so it is not known how "
                        f"run {run.name} goes on ({error}); ask again with seekr cluster status"
                    ) from error
            time.sleep(_POLL)

    def stop(self, run: Run, *, now: bool, tell: Tell) -> Run:
        if now:
            raise ConfigError(
                "--now: Ray's Jobs API ends a run only in good order, which takes at most what was set when "
                "it was submitted; leave --now out"
            )
        with self._answers() as client:
            asked = client.stop_job(run.name)
        if asked:
            tell(f"run {run.name} was asked to end; its trainings save what they have")
        while not (run := self.find(run.name)).over:
            time.sleep(_POLL)
        return run

    def _submitted(self, name: str, digest: str, env: dict[str, Any]) -> bool:
        """Submit a job; returns False if there is one of the name."""
        with self._answers() as client:
            try:
                client.submit_job(
                    entrypoint=entrypoint(self.grace),
                    submission_id=name,
                    runtime_env=env,
                    metadata={STREAM_KEY: self.stream, DIGEST_KEY: digest},
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                return False
        return True

    def _tail(self, name: str) -> Iterator[tuple[str, int]]:
        """Pieces of a log from its beginning, each with its end's position; ends with the log."""
        position = 0
        with asyncio.Runner() as runner, self._answers(steady=True) as client:
            pieces = _Pieces(client.tail_job_logs(name))
            while True:
                text = runner.run(pieces.next(_TIMEOUT))
                if text is None:  # nothing new; a cluster that is gone would stay silent for ever
                    self.find(name)
                    continue
                if not text:
                    return
                position += len(text)
                yield text, position

    @contextmanager
    def _answers(self, *, steady: bool = False) -> Iterator[JobSubmissionClient]:
        """The client; what goes wrong in the block is told in the product's own words.

        Args:
            steady: tell a cluster that does not answer by `_Gone`, which a follower outlasts.
        """
        import aiohttp
        from ray.exceptions import AuthenticationError

        try:
            if self._client is None:
                self._client = self._connect()
            yield self._client
        except AuthenticationError as error:
            raise _refused(self.address, self.token) from error
        except (OSError, aiohttp.ClientError) as error:
            if isinstance(error, aiohttp.WSServerHandshakeError) and error.status in (401, 403):
                raise _refused(self.address, self.token) from error
            raise _Gone(_unreachable(self.address, error)) from error
        except RuntimeError as error:
            if steady and "WebSocket" in str(error):
                raise _Gone(str(error)) from error
            raise SubmissionError(f"{self.address}: {_last_line(str(error))}") from error

    def _connect(self) -> JobSubmissionClient:
        from ray.job_submission import JobSubmissionClient

        check_cluster(self.address, self.token)
        logging.getLogger("ray").setLevel(logging.ERROR)
        with _without(_OTHER_ADDRESSES):
            return JobSubmissionClient(self.address, headers=tokens.headers(self.token))


class _Gone(SubmissionError):
    """The cluster does not answer; it may again."""


@dataclass(slots=True)
class _Pieces:
    """Asks for the next piece of a log without giving up the question when it takes long."""

    source: AsyncIterator[str]
    task: asyncio.Task[str] | None = None

    async def next(self, seconds: float) -> str | None:
        """Return the next piece, None if there is none yet, "" at the end."""
        if self.task is None:
            self.task = asyncio.ensure_future(self._ask())
        done, _ = await asyncio.wait({self.task}, timeout=seconds)
        if not done:
            return None
        task, self.task = self.task, None
        return task.result()

    async def _ask(self) -> str:
        async for text in self.source:
            if text:
                return text
        return ""


def check_address(address: str) -> str:
    """Return a dashboard's address without a slash at its end.

    Raises:
        ConfigError: it is none.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--address {address}: the address of a Ray dashboard is needed, such as http://head:8265"
        )
    if parts.username or parts.password:
        raise ConfigError(
            "--address: an address without credentials is needed, as it is printed and stored; Ray's token "
            "comes from RAY_AUTH_TOKEN_PATH or --token-secret"
        )
    return address.rstrip("/")


def check_cluster(address: str, token: SecretStr | None) -> None:
    """Ask a dashboard what it is, within seconds.

    Raises:
        SubmissionError: it does not answer, refuses the token, or is another version of Ray.
    """
    try:
        answer = requests.get(
            f"{address}/api/version", headers=tokens.headers(token), timeout=_TIMEOUT
        )
    except requests.RequestException as error:
        raise SubmissionError(_unreachable(address, error)) from error
    if answer.status_code in (401, 403):
        raise _refused(address, token)
    try:
        found = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise SubmissionError(
            f"{address} answers with status {answer.status_code}, and not as a Ray dashboard does; give the "
            "address that `ray start --head` prints"
        ) from error
    here = metadata.version("ray")
    if found.split(".")[:2] != here.split(".")[:2]:
        raise SubmissionError(
            f"{address} runs Ray {found}, and this is made for Ray {here}; use a cluster of that "
            "version, or submit to Kubernetes, where the image brings its own"
        )


def run_of(job: JobDetails) -> Run:
    """Return a job of the cluster as a run."""
    data = job.metadata or {}
    status = str(job.status)
    run = Run(
        name=job.submission_id or "",
        digest=data.get(DIGEST_KEY, ""),
        state=_STATES[status],
        submitted=_moment(job.start_time),
        started=None if status == "PENDING" else _moment(job.start_time),
        ended=_moment(job.end_time),
    )
    if run.state == "running":
        return run
    # Behind the first sentence Ray quotes the end of the log.
    reason = (job.message or "").partition(", last available logs")[0].strip()
    return ended(run, run.state, job.driver_exit_code, "" if run.state == "done" else reason)


def _moment(milliseconds: int | None) -> datetime | None:
    return None if not milliseconds else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _refused(address: str, token: SecretStr | None) -> SubmissionError:
    if token is None:
        return SubmissionError(
            f"{address} asks for Ray's token, and none was found; put it into a file and name that in "
            "RAY_AUTH_TOKEN_PATH, or name the Kubernetes Secret that holds it: --token-secret"
        )
    return SubmissionError(
        f"{address} refuses the token that was found; take the cluster's own, by RAY_AUTH_TOKEN_PATH or "
        "--token-secret"
    )


def _unreachable(address: str, error: Any) -> str:
    return (
        f"{address} does not answer ({type(error).__name__}); is the cluster up, and the address that of its "
        "dashboard? A cluster on Kubernetes is reached through kubectl port-forward"
    )


def _last_line(text: str) -> str:
    """What a traceback of the cluster ends with, or all of a short text."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason was given"


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
