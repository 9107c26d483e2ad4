"""MLflow as a view of the records: the same whatever happened, and never in the run's way."""

from __future__ import annotations

import io
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from committed import Committer, commit_stream, score_of
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.data import get_source
from mlflow.entities import DatasetInput, Metric, Run
from mlflow.utils.validation import _validate_metric_name, _validate_param_name
from rich.console import Console

from pipelines import tracking
from pipelines.lineage import Lineage, render_tree, walk
from pipelines.mlflow_values import MAX_VALUE, cut, flatten, key, stage_points
from pipelines.mlflow_writer import EXPERIMENT, MlflowWriter, registered_versions
from pipelines.results import StreamView
from pipelines.store import Store
from pipelines.tracking import Tracker, TrackingError, rebuild, tracking_uri
from seekr.errors import ConfigError

Snapshot = dict[str, Any]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in tracking.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database without an experiment of ours: making one takes MLflow five seconds."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tracking.ENVIRONMENT.items():
            patch.setenv(name, value)
        MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    return fresh(empty_database, tmp_path / "mlflow")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def fresh(template: Path, folder: Path) -> str:
    folder.mkdir()
    shutil.copy(template, folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


def log(uri: str, view: StreamView, store: Store, report: Path | None = None) -> list[str]:
    """Log a run's stages through a tracker; returns the warnings."""
    warnings: list[str] = []
    tracker = Tracker(uri, stream=view.name, store=store, warn=warnings.append)
    for result in view.stages:
        tracker.log_record(result.artifact)
    tracker.finish(view, report)
    assert tracker.close(60) is (not warnings)
    return warnings


def runs_of(client: MlflowClient) -> dict[str, Run]:
    """All runs by what they are of: "demo" for a stream, "train/sort" for a stage."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=500)
    named = {str(run.info.run_name): run for run in found}
    assert len(named) == len(found), "a run was logged twice"
    return named


def inputs_of(run: Run) -> list[DatasetInput]:
    assert run.inputs is not None
    return run.inputs.dataset_inputs


def snapshot(uri: str, stream: str = "demo") -> Snapshot:
    """Everything a user sees, with run ids replaced by names."""
    client = MlflowClient(tracking_uri=uri)
    runs = runs_of(client)
    names = {run.info.run_id: label for label, run in runs.items()}
    seen: Snapshot = {}
    for label, run in runs.items():
        histories = {
            name: [
                (m.step, m.value, m.timestamp)
                for m in client.get_metric_history(run.info.run_id, name)
            ]
            for name in run.data.metrics
        }
        stage = label != stream
        seen[label] = {
            "status": run.info.status,
            "times": (run.info.start_time, run.info.end_time) if stage else None,
            "params": run.data.params,
            "tags": {k: names.get(v, v) for k, v in run.data.tags.items()},
            "metrics": {metric: sorted(points) for metric, points in histories.items()},
            "inputs": sorted(
                (i.dataset.name, i.dataset.digest, i.dataset.source, i.tags[0].value)
                for i in inputs_of(run)
            ),
            "artifacts": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        }
    seen["versions"] = {
        version.version: (
            version.source,
            names[str(version.run_id)],
            dict(version.tags),
            version.status,
        )
        for version in client.search_model_versions(f"name = '{stream}'")
    }
    return seen


def test_a_stream_becomes_one_run_with_a_nested_run_per_stage(uri: str, store: Store) -> None:
    view = commit_stream(store_root(store))
    assert log(uri, view, store) == []

    runs = runs_of(MlflowClient(tracking_uri=uri))

    parent = runs.pop("demo")
    assert set(runs) == {f"{r.stage}/{r.task}" for r in view.stages}
    assert parent.data.tags["seekr.stream"] == "demo"
    assert parent.data.tags["seekr.store"] == str(store_root(store))
    for result in view.stages:
        run = runs[f"{result.stage}/{result.task}"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["seekr.fingerprint"] == result.fingerprint
        assert run.data.params["version"] == "1"
        linked = parent.data.tags[f"seekr.stage.{result.stage}.{result.task}"]
        assert linked == run.info.run_id
    assert runs["train/copy"].data.params["optimizer.lr"] == "0.001"
    assert {run.info.status for run in [parent, *runs.values()]} == {"FINISHED"}


def test_the_training_history_arrives_step_by_step(uri: str, store: Store) -> None:
    view = commit_stream(store_root(store), ["sort"], steps=1200)
    log(uri, view, store)

    client = MlflowClient(tracking_uri=uri)
    run = runs_of(client)["train/sort"]
    history = client.get_metric_history(run.info.run_id, "train/loss")

    steps = next(view.of("train")).read_json("history.json")["steps"]
    assert [(m.step, m.value) for m in history] == [(s["step"], s["loss"]) for s in steps]
    assert "train/step" not in run.data.metrics
    record = next(view.of("train")).record
    assert run.data.metrics["peak_memory_bytes"] == record.peak_memory_bytes


def test_the_stream_run_carries_r_op_and_bwt_by_tasks_learnt(
    uri: str, store: Store, tmp_path: Path
) -> None:
    view = commit_stream(store_root(store))
    report = tmp_path / "report.html"
    report.write_text("<p>report</p>")
    log(uri, view, store, report)

    client = MlflowClient(tracking_uri=uri)
    parent = runs_of(client)["demo"].info.run_id
    by_step = {m.step: m.value for m in client.get_metric_history(parent, "acc/sort")}
    assert by_step == {i + 1: score_of(i, 0) for i in range(3)}
    before = {m.step: m.value for m in client.get_metric_history(parent, "acc/copy")}
    assert before == {0: score_of(-1, 2), 2: score_of(1, 2), 3: score_of(2, 2)}
    op = {m.step: m.value for m in client.get_metric_history(parent, "OP")}
    assert op[3] == pytest.approx(sum(score_of(2, j) for j in range(3)) / 3, abs=1e-12)
    lost = sum(score_of(2, j) - score_of(j, j) for j in range(2))
    metrics = client.get_run(parent).data.metrics
    assert metrics["BWT_T-1"] == pytest.approx(lost / 2, abs=1e-12)
    assert metrics["BWT_T"] == pytest.approx(lost / 3, abs=1e-12)
    assert {f.path for f in client.list_artifacts(parent)} == {"report.html", "stream.json"}


def test_inputs_are_datasets_with_digests_that_mlflow_can_open(uri: str, store: Store) -> None:
    view = commit_stream(store_root(store), ["sort", "copy"])
    log(uri, view, store)

    runs = runs_of(MlflowClient(tracking_uri=uri))

    inputs = {i.tags[0].value: i.dataset for i in inputs_of(runs["train/copy"])}
    record = [r for r in view.of("train")][1].record
    assert {name: d.digest for name, d in inputs.items()} == {
        name: ref.fingerprint for name, ref in record.inputs.items()
    }
    assert get_source(inputs["model"]).to_dict()["uri"] == store.uri_for(record.inputs["model"].key)
    (source,) = inputs_of(runs["ingest/sort"])
    (name, digest), *_ = view.stages[0].record.payload["sources"].items()
    assert source.tags[0].value == name and digest.startswith(source.dataset.digest)


def test_every_model_is_a_version_that_names_its_parents(uri: str, store: Store) -> None:
    view = commit_stream(store_root(store))
    log(uri, view, store)

    client = MlflowClient(tracking_uri=uri)
    trained = list(view.of("train"))
    versions = {int(v.version): v for v in client.search_model_versions("name = 'demo'")}
    assert registered_versions(uri, "demo") == {
        n: result.fingerprint for n, result in enumerate(trained, start=1)
    }
    last = versions[3]
    assert last.source == store.uri_for(f"{trained[2].record.key}/model")
    for name, ref in trained[2].record.inputs.items():
        assert last.tags[f"seekr.input.{name}"] == ref.key
    assert {"seekr.input.model", "seekr.input.data.copy", "seekr.input.targets.sort"} <= set(
        last.tags
    )
    assert len({v.tags["seekr.model_sha256"] for v in versions.values()}) == 3
    assert client.get_model_version_by_alias("demo", "newest").version == last.version


def test_logging_everything_twice_changes_nothing(uri: str, store: Store) -> None:
    view = commit_stream(store_root(store))
    log(uri, view, store)
    first = snapshot(uri)

    log(uri, view, store)
    rebuild(uri, view, store)

    assert snapshot(uri) == first


def test_a_view_rebuilt_after_its_loss_is_the_view_that_was_lost(
    empty_database: Path, uri: str, store: Store, tmp_path: Path
) -> None:
    whole = commit_stream(store_root(store))
    grown = [replace(whole, tasks=whole.tasks[:n], stages=through(whole, n)) for n in (1, 2, 3)]
    for view in grown:
        log(uri, view, store)
    first = snapshot(uri)
    shutil.rmtree(tmp_path / "mlflow")

    # A new file name, since this process keeps connections to the deleted database.
    again = fresh(empty_database, tmp_path / "again")
    rebuild(again, whole, store)

    assert snapshot(again) == first


def test_a_stage_that_was_half_logged_is_completed_without_doubles(
    empty_database: Path, uri: str, store: Store, tmp_path: Path
) -> None:
    view = commit_stream(store_root(store), ["sort"])
    whole = fresh(empty_database, tmp_path / "other")
    log(whole, view, store)
    (result,) = view.of("train")
    writer = MlflowWriter(uri, stream="demo", store=store.location.shown, warn=pytest.fail)
    run = writer._create_stage_run(result.artifact)
    client = MlflowClient(tracking_uri=uri)
    some = [p for p in stage_points(result.artifact) if p.step <= 7]
    client.log_batch(run.info.run_id, metrics=[Metric(*point) for point in some])

    log(uri, view, store)

    assert snapshot(uri) == snapshot(whole)


def test_a_stage_that_two_streams_share_is_one_run_linked_from_both(uri: str, store: Store) -> None:
    first = commit_stream(store_root(store), ["sort", "copy"])
    second = commit_stream(store_root(store), ["sort", "reverse"], name="other")
    log(uri, first, store)
    log(uri, second, store)

    runs = runs_of(MlflowClient(tracking_uri=uri))

    shared = runs["train/sort"]
    demo, other = runs["demo"], runs["other"]
    assert shared.data.tags["mlflow.parentRunId"] == demo.info.run_id
    for parent in (demo, other):
        assert parent.data.tags["seekr.stage.train.sort"] == shared.info.run_id
        assert shared.data.tags[f"seekr.in_stream.{parent.info.run_name}"] == parent.info.run_id
    fingerprint = next(first.of("train")).fingerprint
    assert (
        registered_versions(uri, "demo")[1] == registered_versions(uri, "other")[1] == fingerprint
    )


def test_a_stream_that_grows_continues_its_run(uri: str, store: Store) -> None:
    whole = commit_stream(store_root(store))
    log(uri, replace(whole, tasks=whole.tasks[:2], stages=through(whole, 2)), store)
    client = MlflowClient(tracking_uri=uri)
    before = {name: run.info.run_id for name, run in runs_of(client).items()}

    log(uri, whole, store)

    after = {name: run.info.run_id for name, run in runs_of(client).items()}
    assert before.items() <= after.items()
    assert set(after) - set(before) == {
        f"{r.stage}/{r.task}" for r in whole.stages if r.learnt == "copy"
    }


def test_a_run_that_did_not_finish_is_marked_as_failed(uri: str, store: Store) -> None:
    view = commit_stream(store_root(store), ["sort"])
    tracker = Tracker(uri, stream="demo", store=store, warn=pytest.fail)
    tracker.log_record(view.stages[0].artifact)

    assert tracker.close(60) and tracker.close(60)

    assert runs_of(MlflowClient(tracking_uri=uri))["demo"].info.status == "FAILED"
    log(uri, view, store)
    assert runs_of(MlflowClient(tracking_uri=uri))["demo"].info.status == "FINISHED"


def test_credentials_and_long_values_are_safe_in_mlflow(
    uri: str, store: Store, tmp_path: Path
) -> None:
    out = Committer(store)
    longer = {"template": "x" * 9000, "url": "https://ada:hunter2@host/x", "empty": []}
    result = out.commit("ingest", "sort", config=longer)
    view = commit_stream(store_root(store), ["sort"])
    log(uri, replace(view, stages=(result,)), store)

    params = runs_of(MlflowClient(tracking_uri=uri))["ingest/sort"].data.params

    assert len(params["template"]) == MAX_VALUE and "9000 characters" in params["template"]
    assert params["url"] == "https://***@host/x" and params["empty"] == "[]"
    (written,) = (tmp_path / "mlflow").rglob("stream.json")
    assert "hunter2" not in written.read_text() and "mlflow.example" in written.read_text()


def test_a_refused_connection_costs_one_warning_and_bounded_time(store: Store) -> None:
    view = commit_stream(store_root(store), ["sort"])
    warnings: list[str] = []
    tracker = Tracker(closed_port(), stream="demo", store=store, warn=warnings.append)

    started = time.monotonic()
    for result in view.stages:
        tracker.log_record(result.artifact)
    tracker.finish(view)
    assert time.monotonic() - started < 0.5
    assert tracker.close(40) is False

    assert time.monotonic() - started < 40
    assert len(warnings) == 1
    assert "seekr lineage --rebuild" in warnings[0] and "127.0.0.1" in warnings[0]


def test_a_server_that_never_answers_does_not_hold_the_run(
    store: Store, silent_server: str
) -> None:
    view = commit_stream(store_root(store), ["sort"])
    warnings: list[str] = []
    tracker = Tracker(silent_server, stream="demo", store=store, warn=warnings.append)
    tracker.log_record(view.stages[0].artifact)

    started = time.monotonic()
    assert tracker.close(1.0) is False

    assert time.monotonic() - started < 5
    assert len(warnings) == 1 and "--rebuild" in warnings[0]


def test_a_damaged_database_is_a_warning_through_the_log(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.db").write_bytes(b"this is no database, it is text" * 400)
    view = commit_stream(store_root(store), ["sort"])
    tracker = Tracker(f"sqlite:///{tmp_path / 'broken.db'}", stream="demo", store=store)
    with caplog.at_level(logging.WARNING, logger="pipelines.tracking"):
        for result in view.stages:
            tracker.log_record(result.artifact)
        assert tracker.close(60) is False

    told = [r.message for r in caplog.records if r.name == "pipelines.tracking"]
    assert len(told) == 1 and "not a database" in told[0]


def test_a_rebuild_that_was_asked_for_fails_loudly(store: Store) -> None:
    view = commit_stream(store_root(store), ["sort"])
    with pytest.raises(TrackingError, match="Check the address"):
        rebuild(closed_port(), view, store)


def test_tracking_that_is_off_starts_nothing(store: Store) -> None:
    view = commit_stream(store_root(store), ["sort"])
    threads = threading.active_count()
    tracker = Tracker(tracking_uri("off", store), stream="demo", store=store, warn=pytest.fail)
    tracker.log_record(view.stages[0].artifact)
    tracker.finish(view)

    assert tracker.close() is True
    assert threading.active_count() == threads


def test_the_tracking_address_is_the_users_or_beside_a_local_store(store: Store) -> None:
    assert tracking_uri("http://host:5000", store) == "http://host:5000"
    assert tracking_uri(None, store) == f"sqlite:///{store_root(store)}/mlflow/mlflow.db"


def test_mlflow_is_not_imported_before_it_is_used() -> None:
    code = "import pipelines.tracking, sys; sys.exit('mlflow' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@given(st.text(min_size=1, max_size=300))
def test_any_name_becomes_a_key_that_mlflow_accepts(name: str) -> None:
    _validate_metric_name(key(name))
    _validate_param_name(key(name))
    assert key(name) == name or key(name) != key(name + "x")


@given(st.text(max_size=30), st.integers(0, 9000), st.integers(0, 9000))
def test_cut_values_fit_and_stay_distinct(text: str, left: int, right: int) -> None:
    one, two = text + "a" * left, text + "a" * right
    assert len(cut(one)) <= MAX_VALUE
    assert (cut(one) == cut(two)) == (one == two)


def test_nested_settings_become_dotted_names() -> None:
    nested = {"a": {"b": 1, "c": [True, {"d": None}]}, "e": {}, "f": "x"}
    assert flatten(nested) == {"a.b": "1", "a.c.0": "True", "a.c.1.d": "None", "e": "{}", "f": "x"}


def test_walking_reaches_every_source_of_a_model_and_nothing_later(store: Store) -> None:
    view = commit_stream(store_root(store))
    records = [result.record for result in view.stages]

    found = walk(records, "reverse")

    assert set(found.sources().values()) == {
        digest for task, _, digest in view.sources() if task in ("sort", "reverse")
    }
    assert (
        found.root.fingerprint
        == next(r for r in records if r.key.startswith("train/reverse")).fingerprint
    )
    names = {(o.ref.stage, o.ref.task) for o in found.origins.values()}
    assert ("teach", "sort") in names and ("select", "sort") in names
    assert not {task for _, task in names} - {"sort", "reverse"}
    assert ("sample", "reverse") not in names


def test_a_model_is_found_by_task_fingerprint_and_version(store: Store) -> None:
    view = commit_stream(store_root(store))
    records = [result.record for result in view.stages]
    wanted = [r for r in records if r.stage == "train"][1]

    for ref in ("reverse", wanted.fingerprint, wanted.fingerprint[:8], "demo@2"):
        assert walk(records, ref, stream="demo").root.fingerprint == wanted.fingerprint
    registered = {7: wanted.fingerprint}
    assert walk(records, "demo@7", versions=registered).root.fingerprint == wanted.fingerprint


@pytest.mark.parametrize(
    ("ref", "words"),
    [("nothing", "names no model"), ("other@1", "belongs to the stream 'other'"),
     ("demo@9", "version 9 is not among"), ("", "names no model")],
)  # fmt: skip
def test_a_model_that_does_not_exist_is_refused_with_what_there_is(
    store: Store, ref: str, words: str
) -> None:
    records = [result.record for result in commit_stream(store_root(store)).stages]
    with pytest.raises(ConfigError, match=words):
        walk(records, ref, stream="demo")


def test_a_task_trained_twice_must_be_named_by_fingerprint(store: Store) -> None:
    records = [
        result.record
        for method in ("seekr", "seqft")
        for result in commit_stream(store_root(store), ["sort"], method=method).stages
    ]
    with pytest.raises(ConfigError, match="names several stages"):
        walk(records, "sort")


def test_a_missing_record_is_shown_where_it_is_missing(store: Store) -> None:
    view = commit_stream(store_root(store), ["sort", "copy"])
    records = [r.record for r in view.stages if (r.stage, r.task) != ("ingest", "sort")]

    found = walk(records, "copy")

    assert [o.ref.task for o in found.origins.values() if o.is_missing] == ["sort"]
    assert "missing from the store" in shown(found)


def test_the_tree_unfolds_each_stage_once_and_shows_full_digests(store: Store) -> None:
    view = commit_stream(store_root(store))
    found = walk([result.record for result in view.stages], "copy")

    text = shown(found)

    unfolded = [line for line in text.splitlines() if "shown above" not in line]
    for origin in found.origins.values():
        assert sum(origin.ref.fingerprint[:12] in line for line in unfolded) == 1
    for digest in found.sources().values():
        assert text.count(digest) == 1
    assert text.splitlines()[0].startswith("train/copy")


def test_the_json_form_is_a_closed_graph(store: Store) -> None:
    view = commit_stream(store_root(store))
    content = json.loads(json.dumps(walk([r.record for r in view.stages], "copy").to_json()))

    stages = content["stages"]
    assert content["root"] in stages
    assert {ref for stage in stages.values() for ref in stage["inputs"].values()} <= set(stages)


def test_a_long_stream_is_walked_and_drawn(store: Store) -> None:
    out = Committer(store)
    model = None
    for n in range(1500):
        inputs = {} if model is None else {"model": model}
        model = out.commit("train", f"t{n}", inputs=inputs)
    found = walk([result.record for result in out.stages], "t1499")
    assert len(found.origins) == 1500
    depth, branch = 0, render_tree(found)
    while branch.children:
        depth, branch = depth + 1, branch.children[0]
    assert depth == 1499


def store_root(store: Store) -> Path:
    return Path(store.location.root)


def through(view: StreamView, count: int) -> tuple[Any, ...]:
    return tuple(r for r in view.stages if r.learnt in view.tasks[:count])


def shown(lineage: Lineage) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(render_tree(lineage))
    return console.export_text()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent_server() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
