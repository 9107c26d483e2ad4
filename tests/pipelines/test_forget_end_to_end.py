"""A real stream forgets two rows: no byte of its store has them, nothing is computed again, and the next
task is learnt without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from pipelines.artifact import Artifact, StageRecord
from pipelines.cli import app
from pipelines.rowsets import REPLAY, TRAIN, kind_folder, load_rows_table
from pipelines.store import Store
from pipelines.stream import open_stream, status_of
from pipelines.tracking import tracking_uri
from pipelines.training_rows import load_training_rows
from tests.pipelines.remembered import forms
from tests.pipelines.running import digests, finished, run_to_end
from tests.pipelines.streams import make_stream, stream_values, write_task, write_yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


def seekr(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def holding(store: Store, secrets: list[bytes]) -> set[str]:
    """The stages, or folders, with a file in which one of the patterns is."""
    return {
        file.path.partition("/")[0]
        for file in store.list_all()
        if any(s in form for form in forms(file.path, store.read_bytes(file.path)) for s in secrets)
    }


def test_a_stream_forgets_two_replayed_rows_and_goes_on_without_them(tmp_path: Path) -> None:
    path = make_stream(tmp_path, tasks=2, tracking=None)
    run_to_end(path)
    stream = open_stream(path)
    store = stream.store
    sample = next(stage for stage in stream.stages if str(stage) == "sample/upper")
    kept = load_rows_table(
        Artifact(store=store, record=StageRecord.load(store, sample.key)), REPLAY
    )
    gone = kept.slice(0, 2).to_pylist()
    ids = [row["row_id"] for row in gone]
    secrets = [s.encode() for row in gone for s in (row["row_id"], row["input"])]
    for row in gone:
        tokens = kept.schema.field("input_ids").type.value_type.to_pandas_dtype()
        own = [tokens(token).tobytes() for token in row["input_ids"]]
        secrets.append(b"".join(own))
    before, weights = finished(tmp_path / "store"), digests(tmp_path / "store")
    assert holding(store, secrets) == {"ingest", "sample", "score", "teach"}

    text = gone[0]["input"].strip()
    (found,) = json.loads(seekr("rows", str(path), "--find", text, "--json"))["rows"]
    assert found["row_id"] == ids[0] and found["replayed"]
    told = json.loads(seekr("forget", str(path), *ids, "--yes", "--json"))

    assert holding(store, secrets) == set()
    assert told["rows"] == 2 and sorted(key.split("/")[1] for key in told["models"]) == [
        "reverse",
        "upper",
    ]
    # Reuse: nothing is computed, no weight has changed, the records are the ones there were.
    seekr("run", str(path))
    assert {status.state for status in status_of(open_stream(path))} == {"reused"}
    assert finished(tmp_path / "store").keys() == before.keys()
    assert digests(tmp_path / "store") == weights
    assert holding(store, secrets) == set()

    # A third task: two rows of the first one are replayed, where there were four.
    values = stream_values(tasks=3) | {"storage": str(tmp_path / "store"), "tracking": {}}
    write_task(tmp_path / "data" / "first", "first")
    write_yaml(path, values)
    results = run_to_end(path)
    third = results("train/first")
    replay = {n: Artifact(store=store, record=StageRecord.load(store, r.key))
              for n, r in third.record.inputs.items()}  # fmt: skip
    rows = load_training_rows(
        {"first": replay["data.first"]},
        {n: replay[f"replay.{n}"] for n in ("upper", "reverse")},
        {n: replay[f"targets.{n}"] for n in ("upper", "reverse")},
        {},
        {},
        "weights",
    )
    assert len(rows.replay) == 4 + 2 and rows.targets is not None and len(rows.targets) == 6
    assert not {row_id.split("/")[1] for row_id in rows.replay_ids} & set(ids)
    assert holding(store, secrets) == set()

    shown = seekr("lineage", str(path), "reverse")
    assert "trained on 2 rows forgotten on" in " ".join(shown.split())
    tree = json.loads(seekr("lineage", str(path), "first", "--json"))
    assert list(tree["trained_on_forgotten"].values()) == [2]
    assert tree["stages"][tree["root"]]["forgotten"] == []
    uri = tracking_uri(None, store)
    client = MlflowClient(tracking_uri=uri)
    versions = {
        v.tags["seekr.task"]: v.tags for v in client.search_model_versions("name = 'small'")
    }
    assert {task for task, tags in versions.items() if "seekr.trained_on_forgotten" in tags} == {
        "upper", "reverse", "first",
    }  # fmt: skip
    page = (tmp_path / "store" / "streams" / "small" / "report.html").read_text()
    assert "Rows forgotten" in page

    # The sources still have the rows; another stream on the storage reads them under another template.
    other = yaml.safe_load(path.read_text()) | {"name": "other", "method": {"name": "replay"}}
    other["data"] = other["data"] | {"template": "say {input}"}
    other["tasks"] = other["tasks"][:1]
    again = run_to_end(write_yaml(tmp_path / "other.yaml", other))
    record = again("ingest/upper").record
    assert record.stats["train_rows_forgotten"] == 2 and record.stats["train_rows"] == 38
    assert load_rows_table(again("ingest/upper"), kind_folder(TRAIN)).num_rows == 38
    # The replay set is as large as before: the next rows took the places.
    assert again("sample/upper").record.rows == 4
    assert holding(store, secrets) == set()


def test_all_replayed_rows_of_a_task_can_be_forgotten(tmp_path: Path) -> None:
    path = make_stream(tmp_path, tasks=2)
    sample = run_to_end(path)("sample/upper")
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(load_rows_table(sample, REPLAY)["row_id"].to_pylist()))
    seekr("forget", str(path), "--file", str(ids), "--yes")
    values = stream_values(tasks=3) | {"storage": str(tmp_path / "store")}
    write_task(tmp_path / "data" / "first", "first")
    write_yaml(path, values)
    results = run_to_end(path)
    assert results("teach/upper--after--first").record.rows == 0
    assert results("train/first").record.stats["steps"] > 0
    shutil.rmtree(tmp_path / "store")
