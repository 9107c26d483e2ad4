"""The views of a stream, written anew after rows were forgotten: its report, and MLflow.

The store's own files are without the rows by then. A view that cannot be written costs nothing but a
warning, which says how to write it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.artifact import Artifact
from pipelines.inventory import Inventory
from pipelines.mlflow_writer import MlflowWriter
from pipelines.report import render_report
from pipelines.stream import Stream, open_stream, view_of
from pipelines.tracking import connected, rebuild, tracking_uri
from seekr.errors import SeekrError


def write_views(path: Path, overrides: Sequence[str], warn: Callable[[str], None]) -> None:
    """Write a stream's report and its part of MLflow, and mark every model of its store there.

    Args:
        path, overrides: the stream, as on the command line.
        warn: told what could not be written.
    """
    try:
        stream = open_stream(path, overrides, writable=True)
    except SeekrError as error:
        warn(
            f"the report and MLflow are as they were, since the stream cannot be opened: {error}. "
            f"When it can be, run it: seekr run {path}"
        )
        return
    view = view_of(stream)
    if not view.stages:
        return
    page = render_report(view).encode()
    stream.store.write_bytes(stream.report_path, page)
    uri = tracking_uri(stream.config.tracking.uri, stream.store)
    if uri is None or not _is_there(uri):
        return
    try:
        with tempfile.TemporaryDirectory(prefix="seekr-report-") as folder:
            report = Path(folder) / "report.html"
            report.write_bytes(page)
            rebuild(uri, view, stream.store, report, warn=warn)
        with connected(uri, view.name, stream.store, warn) as writer:
            _mark_models(writer, stream)
    except SeekrError as error:
        warn(f"{error} Until then MLflow may show a report with forgotten rows")


def _mark_models(writer: MlflowWriter, stream: Stream) -> None:
    """Tag models of other streams too: artifacts are shared."""
    for record in Inventory.of(stream.store).records.values():
        if record.stage == "train":
            writer.mark(Artifact(store=stream.store, record=record))


def _is_there(uri: str) -> bool:
    path = uri.removeprefix("sqlite:///")
    return path == uri or Path(path).is_file()
