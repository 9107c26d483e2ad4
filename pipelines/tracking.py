"""MLflow beside a run: fed by one background thread, and never in the run's way.

The records in the store are the truth and MLflow is a view of them, so a server that is down, slow
or full costs the view and not the run. The first failure is reported once, with what to do, and the
rest of this run's records is left to `rebuild`, which writes the whole view again from the records
in the foreground.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pipelines.artifact import Artifact
from pipelines.background import CLOSE_SECONDS, BackgroundWriter, in_short
from pipelines.mlflow_writer import MlflowWriter
from pipelines.provenance import redact
from pipelines.results import StreamView
from pipelines.stage import Stage
from pipelines.store import Store
from seekr.errors import SeekrError

OFF: Final = "off"
SQLITE: Final = "mlflow/mlflow.db"
# Seconds per request, repetitions, and their spacing. MLflow's own (120 s, 7 times, spaced to
# minutes) suit a person who waits, not a pipeline; whoever sets the variables keeps their values.
# Telemetry is off because a cluster should not talk to the outside unasked.
ENVIRONMENT: Final = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
logger = logging.getLogger(__name__)
Warn = Callable[[str], None]


class TrackingError(SeekrError):
    """MLflow could not be written or read although that was what the user asked for."""


def tracking_uri(configured: str | None, store: Store) -> str | None:
    """Where to track: what the configuration says, else sqlite in a local store.

    Args:
        configured: `tracking.uri` of the configuration.
        store: the stream's store.

    Returns:
        A tracking URI, or None for no tracking: the configuration says `off`, or says nothing and
        the store is remote, where a sqlite file cannot lie.
    """
    if configured is not None:
        return None if configured == OFF else configured
    if not store.is_local:
        return None
    return f"sqlite:///{store.full_path(SQLITE)}"


class Tracker:
    """Logs a run's stages as they end; no method raises or waits, except `close`, which is bounded.

    Args:
        tracking_uri: see `tracking_uri`; None makes every method a no-op.
        stream: the stream's name.
        store: where its artifacts are.
        warn: told of a failure, once per run; by default a logged warning.
    """

    def __init__(
        self, tracking_uri: str | None, *, stream: str, store: Store, warn: Warn = logger.warning
    ) -> None:
        self._uri, self._warn = tracking_uri, warn
        self._finished = False
        self._background: BackgroundWriter[MlflowWriter] = BackgroundWriter(
            None if tracking_uri is None else lambda: _connect(tracking_uri, stream, store, warn),
            name="seekr-mlflow",
            failed=self._tell,
        )

    def log_record(self, artifact: Artifact) -> None:
        """Log a committed stage, whether this run computed it or found it."""
        self._background.put(lambda writer: writer.log_stage(artifact))

    def log_steps(self, stage: Stage, steps: Sequence[Mapping[str, Any]]) -> None:
        """Log steps of a training that still runs."""
        self._background.put(lambda writer: writer.log_steps(stage, steps))

    def finish(self, view: StreamView, report: Path | None = None) -> None:
        """Log the stream's figures and its report, and mark the stream's run as finished."""
        self._finished = True
        self._background.put(lambda writer: _finish(writer, view, report))

    def close(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Wait until everything is written, at most `timeout` seconds.

        Without a `finish` before, the stream's run is marked as failed. Closing twice is fine.

        Returns:
            Whether MLflow holds everything that was logged.
        """
        if not self._finished:
            self._background.put(lambda writer: writer.end("FAILED"))
        return self._background.close(timeout)

    def _tell(self, reason: str) -> None:
        self._warn(
            f"MLflow at {redact(str(self._uri))} is incomplete: {reason}. The run goes on and its "
            "records hold everything. When MLflow works again, run `seekr lineage --rebuild`."
        )


def rebuild(
    tracking_uri: str,
    view: StreamView,
    store: Store,
    report: Path | None = None,
    warn: Warn = logger.warning,
) -> None:
    """Write a stream's whole view again from its records; what is there already stays as it is.

    Args:
        tracking_uri: `sqlite:///...` or a server.
        view: the stream with all of its stages in graph order, the order models are numbered in.
        store: where they are.
        report: an HTML report to attach.
        warn: told what cannot be shown although MLflow works.

    Raises:
        TrackingError: MLflow failed; doing it again continues where it stopped.
    """
    with connected(tracking_uri, view.name, store, warn) as writer:
        for result in view.stages:
            writer.log_stage(result.artifact)
        writer.log_results(view, report)


@contextmanager
def connected(
    uri: str, stream: str, store: Store, warn: Warn = logger.warning
) -> Iterator[MlflowWriter]:
    """Provide a writer.

    Raises:
        TrackingError: MLflow failed, in the block as well.
    """
    with _explained(uri):
        writer = _connect(uri, stream, store, warn)
        yield writer
        writer.end("FINISHED")


def _finish(writer: MlflowWriter, view: StreamView, report: Path | None) -> None:
    writer.log_results(view, report)
    writer.end("FINISHED")


def _connect(uri: str, stream: str, store: Store, warn: Warn) -> MlflowWriter:
    prepare(uri)
    return MlflowWriter(uri, stream=stream, store=store.location.shown, warn=warn)


def prepare(uri: str) -> None:
    """Set MLflow up for a run that must not wait for it, and make the folder of a sqlite file."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    path = uri.removeprefix("sqlite:///")
    if path != uri:
        Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
    # The schema's migrations are announced line by line to stderr otherwise.
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except SeekrError:
        raise
    except Exception as error:
        raise TrackingError(
            f"MLflow at {redact(uri)} cannot be written: {in_short(error)}. Check the address, the "
            "server and the disk, then run `seekr lineage --rebuild` again; it continues where it "
            "stopped."
        ) from error
