"""Writes records into MLflow: one run per stream, one nested run per stage, one model version per
task.

Everything that is written follows from the records alone and is looked up by tag before it is made.
So logging a record twice changes nothing, a half-written run is completed, and an empty server
filled again from the store shows what it showed before. Only `MlflowClient` is used: the fluent API
keeps state per process and thread. MLflow takes seconds to import, hence the imports inside
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pipelines import mlflow_values as values
from pipelines.artifact import Artifact, StageRecord
from pipelines.labels import CHAMPION
from pipelines.lineage import learnt_and_forgotten, said_by_day
from pipelines.mlflow_values import Point, cut, digest, key
from pipelines.results import StreamView
from pipelines.stage import Stage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

EXPERIMENT: Final = "seekr"
NEWEST: Final = "newest"
MODEL: Final = "model"
# Of a stage's run: what was taken out of its files. Of a model's version: what it has learnt of that.
FORGOTTEN: Final = "seekr.forgotten"
TRAINED_ON: Final = "seekr.trained_on_forgotten"


class MlflowWriter:
    """A connection for one stream. Every method may raise whatever MLflow raises.

    Args:
        tracking_uri: `sqlite:///...` or a server.
        stream: the stream's name, also the registered model's.
        store: the store's place without credentials; with `stream` it identifies the parent run.
        warn: told what cannot be shown although MLflow works.
    """

    def __init__(
        self, tracking_uri: str, *, stream: str, store: str, warn: Callable[[str], None]
    ) -> None:
        from mlflow import MlflowClient

        self._client: MlflowClient = MlflowClient(tracking_uri=tracking_uri)
        self._stream, self._store, self._warn = stream, store, warn
        self._registers = True
        self._live: dict[str, tuple[str, int]] = {}
        self._experiment = experiment_of(self._client, tracking_uri)
        self._parent = self._parent_run()

    def log_stage(self, artifact: Artifact) -> None:
        """Make the stage's run if there is none, complete it if it is partial, link it here."""
        record, run_id = artifact.record, self._run_of(artifact)
        self._client.set_tag(run_id, key(f"seekr.in_stream.{self._stream}"), self._parent)
        link = key(f"seekr.stage.{record.stage}.{record.task}")
        self._client.set_tag(self._parent, link, run_id)
        if record.forgotten:
            self._client.set_tag(run_id, FORGOTTEN, cut(values.said_of_rows(record)))
        if any(output.path.startswith(f"{MODEL}/") for output in record.outputs):
            self._register(artifact, run_id)
            self.mark(artifact)

    def _run_of(self, artifact: Artifact) -> str:
        """Return the id of a stage's run, which is made or completed if need be."""
        run = self._find("stage", digest(self._store, artifact.record.key))
        if run is None:
            run = self._create_stage_run(artifact)
            self._fill(run.info.run_id, artifact, logged={})
        elif run.info.status != "FINISHED":
            self._fill(run.info.run_id, artifact, logged=self._last_steps(run))
        return run.info.run_id

    def log_steps(self, stage: Stage, steps: Sequence[Mapping[str, Any]]) -> None:
        """Put steps of a training that still runs on its stage's run, each once over all attempts.

        When the stage is committed, `log_stage` completes the run.
        """
        if stage.key not in self._live:
            run = self._find("stage", digest(self._store, stage.key))
            last = -1 if run is None else max(self._last_steps(run).values(), default=-1)
            if run is None:
                run = self._create_run(stage.key, stage.name, stage.task, stage.fingerprint)
            self._live[stage.key] = (run.info.run_id, last)
        run_id, last = self._live[stage.key]
        new = [step for step in steps if step["step"] > last]
        self._log(run_id, (point for step in new for point in values.step_points(step)))
        self._live[stage.key] = (run_id, max([last, *(step["step"] for step in new)]))

    def log_results(self, view: StreamView, report: Path | None) -> None:
        """Put the stream's figures, its settings and its report on the parent run."""
        tags = {"method": view.method, "model": view.model, "tasks": ", ".join(view.tasks)}
        for name, value in tags.items():
            self._client.set_tag(self._parent, f"seekr.{name}", cut(value))
        wanted = list(values.stream_points(view))
        known = {
            (metric.key, metric.step, metric.value)
            for name in dict.fromkeys(point.key for point in wanted)
            for metric in self._client.get_metric_history(self._parent, name)
        }
        self._log(self._parent, (p for p in wanted if (p.key, p.step, p.value) not in known))
        self._client.log_dict(self._parent, values.redacted(view.config), "stream.json")
        if report is not None:
            self._client.log_artifact(self._parent, str(report))
        self._name_newest(view)
        self._name_champion(view)

    def end(self, status: str) -> None:
        """Close the parent run as FINISHED or FAILED; a later run of the stream opens it again."""
        self._client.set_terminated(self._parent, status)

    def mark(self, artifact: Artifact) -> None:
        """Tag every version of a model, of whatever stream, that was trained on rows the store has
        forgotten since."""
        rows = learnt_and_forgotten(artifact.store, artifact.record)
        if not rows:
            return
        identity = digest(self._store, artifact.record.key)
        for version in self._client.search_model_versions(f"tags.`seekr.key` = '{identity}'"):
            self._client.set_model_version_tag(
                version.name, str(version.version), TRAINED_ON, cut(said_by_day(rows))
            )

    def _parent_run(self) -> str:
        identity = digest(self._store, self._stream)
        run = self._find("stream", identity)
        if run is not None:
            self._client.update_run(run.info.run_id, status="RUNNING")
            return run.info.run_id
        tags = {
            "seekr.kind": "stream",
            "seekr.key": identity,
            "seekr.stream": self._stream,
            "seekr.store": cut(self._store),
        }
        created = self._client.create_run(self._experiment, tags=tags, run_name=self._stream)
        return created.info.run_id

    def _find(self, kind: str, identity: str) -> Run | None:
        wanted = f"tags.`seekr.kind` = '{kind}' and tags.`seekr.key` = '{identity}'"
        found = self._client.search_runs([self._experiment], wanted, max_results=1)
        return found[0] if found else None

    def _create_stage_run(self, artifact: Artifact) -> Run:
        record = artifact.record
        started = values.milliseconds(record.started_at)
        return self._create_run(
            record.key, record.stage, record.task, record.fingerprint, start_time=started
        )

    def _create_run(
        self, place: str, stage: str, task: str, fingerprint: str, start_time: int | None = None
    ) -> Run:
        tags = {
            "seekr.kind": "stage",
            "seekr.key": digest(self._store, place),
            "seekr.fingerprint": fingerprint,
            "seekr.stage": stage,
            "seekr.task": task,
            "mlflow.parentRunId": self._parent,
        }
        return self._client.create_run(
            self._experiment, start_time=start_time, tags=tags, run_name=f"{stage}/{task}"
        )

    def _fill(self, run_id: str, artifact: Artifact, logged: Mapping[str, int]) -> None:
        """Write all parts of a stage's run; its status becomes FINISHED when all are there."""
        from mlflow.entities import Param

        record = artifact.record
        settings = values.flatten(record.payload["config"]) | {"version": str(record.version)}
        params = (Param(key(name), cut(value)) for name, value in settings.items())
        for chunk in values.chunks(params, values.MAX_PARAMS):
            self._client.log_batch(run_id, params=chunk)
        circumstances = {
            "seekr.artifact": cut(artifact.store.uri_for(record.key)),
            "seekr.host": record.host,
            "mlflow.user": record.user,
            "mlflow.source.name": cut(" ".join(record.argv)),
            "mlflow.source.git.commit": record.git_commit or "unknown",
        }
        for name, value in circumstances.items():
            self._client.set_tag(run_id, name, value)
        self._client.log_inputs(run_id, values.datasets(artifact))
        self._log(
            run_id, (p for p in values.stage_points(artifact) if p.step > logged.get(p.key, -1))
        )
        if any(output.path == "heads.json" for output in record.outputs):
            self._client.log_artifact(run_id, str(artifact.local("heads.json")))
        ended = values.milliseconds(record.finished_at)
        self._client.set_terminated(run_id, "FINISHED", end_time=ended)

    def _last_steps(self, run: Run) -> dict[str, int]:
        """The last step of each metric that an interrupted writer left."""
        run_id = run.info.run_id
        return {
            name: max(metric.step for metric in self._client.get_metric_history(run_id, name))
            for name in run.data.metrics
        }

    def _log(self, run_id: str, points: Iterable[Point]) -> None:
        from mlflow.entities import Metric

        for chunk in values.chunks((Metric(*point) for point in points), values.MAX_METRICS):
            self._client.log_batch(run_id, metrics=chunk)

    def _register(self, artifact: Artifact, run_id: str) -> None:
        """Register a stage's model as the stream's next version, unless it is one already."""
        from mlflow.exceptions import MlflowException

        identity = digest(self._store, artifact.record.key)
        if not self._registers or self._version(identity) is not None:
            return
        source = artifact.store.uri_for(f"{artifact.record.key}/{MODEL}")
        tags = values.model_tags(artifact) | {"seekr.key": identity}
        try:
            self._client.create_model_version(
                self._stream, source, run_id, tags=tags, await_creation_for=0
            )
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or not artifact.store.is_local:
                raise
            self._registers = False
            self._warn(
                f"MLflow: the models of {self._stream!r} are not registered: the server "
                f"takes no local path such as {source} as a model's source. Use a store it can "
                "read (s3://, gs://), then run `seekr lineage --rebuild`."
            )

    def _version(self, identity: str) -> ModelVersion | None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self._stream)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        wanted = f"name = '{self._stream}' and tags.`seekr.key` = '{identity}'"
        found = self._client.search_model_versions(wanted, max_results=1)
        return found[0] if found else None

    def _name_newest(self, view: StreamView) -> None:
        """Point the alias `newest` at the model of the last task."""
        trained = list(view.of("train"))
        if not trained or not self._registers:
            return
        version = self._version(digest(self._store, trained[-1].record.key))
        if version is not None:
            self._client.set_registered_model_alias(self._stream, NEWEST, str(version.version))

    def _name_champion(self, view: StreamView) -> None:
        """Point the alias `champion` where the decisions say, and note at each model what they were."""
        champion, known = view.decisions.champion, {result.record.ref for result in view.stages}
        if champion is not None and champion not in known:
            # Of other settings than the stream has now, so that nothing else logs it.
            store = view.stages[0].artifact.store
            artifact = Artifact(store=store, record=StageRecord.load(store, champion.key))
            self._register(artifact, self._run_of(artifact))
        for decision in view.decisions.entries if self._registers else ():
            version = self._version(digest(self._store, decision.model.key))
            if version is None:
                continue
            number = str(version.version)
            self._client.set_model_version_tag(
                self._stream,
                number,
                "seekr.decision",
                cut(f"{decision.verdict}: {decision.reason}"),
            )
            if decision.model == champion:
                self._client.set_registered_model_alias(self._stream, CHAMPION, number)


def registered_versions(tracking_uri: str, stream: str) -> dict[int, str]:
    """Fingerprints of a stream's registered models by version; empty when it has none."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    found = client.search_model_versions(f"name = '{stream}'")
    return {
        int(version.version): version.tags["seekr.fingerprint"]
        for version in found
        if "seekr.fingerprint" in version.tags
    }


def experiment_of(client: MlflowClient, tracking_uri: str) -> str:
    """The id of the experiment all streams share. Beside sqlite the artifacts get a folder, since
    MLflow's own default is relative to wherever the process was started."""
    from mlflow.exceptions import MlflowException

    parts = urlsplit(tracking_uri)
    location = None
    if parts.scheme == "sqlite":
        folder = Path(parts.path[1:]).resolve().parent / "artifacts"
        location = folder.as_uri()
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    try:
        return client.create_experiment(EXPERIMENT, artifact_location=location)
    except MlflowException as error:
        found = client.get_experiment_by_name(EXPERIMENT)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return found.experiment_id
