"""A search in MLflow: one run for the search, and under it one per trial, reference and confirmation.

Like a stream's runs they are a view: everything follows from the ledger and is looked up by tag before it
is made, so writing it again changes nothing and a lost server can be filled again. Writing happens beside
the search, in one thread; what fails there is told once and costs the view alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines import mlflow_values as values
from pipelines.background import CLOSE_SECONDS, BackgroundWriter
from pipelines.mlflow_writer import experiment_of
from pipelines.provenance import redact
from pipelines.store import Store
from pipelines.tracking import prepare
from tune.ledger import Entry
from tune.plan import title

_STATUS = {"open": "RUNNING", "finished": "FINISHED", "stopped": "KILLED"}


class SearchTracker:
    """Writes entries as they change; no method raises or waits, except `close`, which is bounded.

    Args:
        uri: see `pipelines.tracking.tracking_uri`; None writes nothing.
        warn: told of a failure, once.
    """

    def __init__(
        self, uri: str | None, *, search: str, store: Store, warn: Callable[[str], None]
    ) -> None:
        self._uri, self._warn = uri, warn
        self._known: dict[str, Entry] = {}
        self._background: BackgroundWriter[_Writer] = BackgroundWriter(
            None if uri is None else lambda: _Writer(uri, search, store),
            name="seekr-tune-mlflow",
            failed=self._tell,
        )

    def note(self, entries: Mapping[str, Entry]) -> None:
        """Write what has changed since the last time."""
        changed = [entry for key, entry in entries.items() if self._known.get(key) is not entry]
        self._known |= {entry.key: entry for entry in changed}
        if changed:
            self._background.put(lambda writer: _write(writer, changed))

    def close(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Wait until everything is written, at most `timeout` seconds.

        Returns:
            Whether MLflow holds everything that was noted.
        """
        if self._known:
            self._background.put(lambda writer: writer.end())
        return self._background.close(timeout)

    def _tell(self, reason: str) -> None:
        self._warn(
            f"MLflow at {redact(str(self._uri))} is incomplete: {reason}. The search goes on and its "
            "ledger holds everything. When MLflow works again, run `seekr tune resume`."
        )


def _write(writer: _Writer, entries: Sequence[Entry]) -> None:
    for entry in entries:
        writer.write(entry)


class _Writer:
    """A connection for one search."""

    def __init__(self, uri: str, search: str, store: Store) -> None:
        from mlflow import MlflowClient

        prepare(uri)
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment = experiment_of(self._client, uri)
        self._search, self._place = search, store.location.shown
        self._parent = self._run("search", search, search, {})

    def write(self, entry: Entry) -> None:
        """Write an entry's settings, its figures after every task, and how it ended."""
        run = self._run(
            entry.kind,
            f"{self._search}/{entry.key}",
            title(entry),
            {"mlflow.parentRunId": self._parent, "seekr.search": self._search},
        )
        client = self._client
        client.set_tag(run, "seekr.state", entry.state)
        if entry.reason:
            client.set_tag(run, "seekr.reason", values.cut(entry.reason))
        if entry.order is not None:
            client.set_tag(run, "seekr.order", values.cut(", ".join(entry.order)))
        for copied in entry.copied:
            client.set_tag(run, f"seekr.copied_after.{copied.tasks}", f"trial {copied.source}")
        client.set_tag(run, "seekr.seeds", ", ".join(map(str, entry.seeds)))
        # A member of a population changes its settings, and a parameter cannot: those are its first.
        first = entry.learnt[0] if entry.learnt else entry.settings
        known = client.get_run(run).data.params
        for name, value in values.flatten(first).items():
            if values.key(name) not in known:
                client.log_param(run, values.key(name), values.cut(value))
        self._log_figures(run, entry)
        stages: Any = {str(result.tasks): list(result.stages) for result in entry.results}
        client.log_dict(run, stages, "stages.json")
        client.set_terminated(run, _STATUS.get(entry.state, "FAILED"))

    def end(self) -> None:
        """Close the search's own run."""
        self._client.set_terminated(self._parent, "FINISHED")

    def _log_figures(self, run: str, entry: Entry) -> None:
        names = {name for result in entry.results for name in result.figures}
        logged = {
            (name, metric.step)
            for name in names
            for metric in self._client.get_metric_history(run, values.key(name))
        }
        for result in entry.results:
            for name, value in result.figures.items():
                if (name, result.tasks) in logged:
                    continue
                self._client.log_metric(run, values.key(name), value.mean, step=result.tasks)
                if value.error is not None:
                    error = values.key(f"{name}.error")
                    self._client.log_metric(run, error, value.error, step=result.tasks)

    def _run(self, kind: str, name: str, shown: str, tags: Mapping[str, str]) -> str:
        identity = values.digest(self._place, name)
        wanted = f"tags.`seekr.kind` = '{kind}' and tags.`seekr.key` = '{identity}'"
        found = self._client.search_runs([self._experiment], wanted, max_results=1)
        if found:
            return found[0].info.run_id
        own = {"seekr.kind": kind, "seekr.key": identity, "seekr.store": values.cut(self._place)}
        made = self._client.create_run(self._experiment, tags={**own, **tags}, run_name=shown)
        return made.info.run_id
