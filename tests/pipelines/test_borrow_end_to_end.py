"""Borrowed rows, held-out rows and general ability on a real small stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.artifact import Artifact
from pipelines.results import PREDICTIONS
from pipelines.rowsets import (
    REPLAY,
    TEST,
    TRAIN,
    VALIDATION,
    kind_folder,
    load_rows_table,
    load_table,
    rows_of,
)
from pipelines.teach import TARGETS
from seekr.models import load_tokenizer
from seekr.prompts import TokenizedRow, eos_id_of
from tests.pipelines.running import run_to_end
from tests.pipelines.streams import NUM_TEST, NUM_TRAIN, RULES, make_stream

pytestmark = pytest.mark.ray
FIRST, SECOND, THIRD = list(RULES)[:3]
# The rows' own instruction stays in the input; what a template adds is the frame.
FRAMES = [f"tasks.{i}.template='<{name}> {{input}}'" for i, name in enumerate(list(RULES)[:3])]


def rows_in(artifact: Artifact, folder: str) -> list[TokenizedRow]:
    return rows_of(load_rows_table(artifact, folder))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("stream"), tasks=3)


def test_a_stream_replays_the_new_inputs_under_earlier_instructions(path: Path) -> None:
    found = run_to_end(
        path, "replay.borrowed=6", "train.epochs=3", "train.learning_rate=0.01", *FRAMES
    )
    artifact = found(f"borrow/{THIRD}")
    assert artifact.record.stats["asked"] == 12
    rows = rows_in(artifact, REPLAY)
    assert 0 < len(rows) <= 12 and artifact.record.rows == len(rows)
    tokenizer = load_tokenizer(found(f"train/{SECOND}").local("model"))
    new = {row.input for row in rows_in(found(f"ingest/{THIRD}"), kind_folder(TRAIN))}
    for row in rows:
        text = tokenizer.decode(row.input_ids[: row.prompt_length])
        assert row.input in new
        assert text in {f"<{FIRST}> {row.input}", f"<{SECOND}> {row.input}"}
        assert row.input_ids[-1] == eos_id_of(tokenizer)
    targets = load_table(found(f"teach/{THIRD}--borrowed"), TARGETS)
    assert sorted(targets["row_id"].to_pylist()) == sorted(row.row_id for row in rows)
    history = found(f"train/{THIRD}").read_json("history.json")["steps"]
    assert all(step["attention"] >= 0 and step["logits"] >= 0 for step in history)


def test_held_out_rows_are_evaluated_and_never_trained_on(path: Path) -> None:
    changes = ["data.validation_rows=7", "evaluate.split=validation", "method={name: replay}"]
    found = run_to_end(path, *changes)
    for task in (FIRST, SECOND):
        ingest = found(f"ingest/{task}")
        held, kept, test = (
            {row.row_id for row in rows_in(ingest, kind_folder(kind))}
            for kind in (VALIDATION, TRAIN, TEST)
        )
        assert len(held) == 7 and len(kept) == NUM_TRAIN - 7 and len(test) == NUM_TEST
        assert not held & kept and not held & test
        assert ingest.record.stats["validation_rows"] == 7
        assert ingest.record.stats["test_rows_in_train"] == 0
        assert not {row.row_id for row in rows_in(found(f"sample/{task}"), REPLAY)} & held
    evaluated = load_table(found(f"evaluate/{FIRST}"), PREDICTIONS)["row_id"].to_pylist()
    own = rows_in(found(f"ingest/{FIRST}"), kind_folder(VALIDATION))
    assert sorted(evaluated) == sorted(row.row_id for row in own)


def test_rows_of_a_test_set_that_are_trained_on_are_counted(path: Path, tmp_path: Path) -> None:
    folder = path.parent / "data" / FIRST
    lines = (folder / "test.jsonl").read_text().splitlines()[:6]
    lines += (folder / "train.jsonl").read_text().splitlines()[:4]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n")
    values = yaml.safe_load(path.read_text())
    values |= {"tasks": values["tasks"][:1], "method": {"name": "seqft"}}
    values["model"]["path"] = str(path.parent / "model")
    values["data_root"] = str(path.parent)
    values["tasks"][0]["test"] = str(tmp_path / "test.jsonl")
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(values))
    found = run_to_end(tmp_path / "stream.yaml")
    assert found(f"ingest/{FIRST}").record.stats["test_rows_in_train"] == 4


def test_general_ability_is_measured_with_a_task_of_ones_own(path: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{a} comes before", "choices": ["x", a], "gold": i % 2}
        for i, a in enumerate("abcdef")
    ]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    task: dict[str, Any] = {
        "task": "which_letter",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "which_letter.yaml").write_text(yaml.safe_dump(task))
    changes = (
        "general.tasks=[which_letter]",
        f"general.folder={tmp_path}",
        "general.max_length=48",
    )
    found = run_to_end(path, "method={name: seqft}", *changes)
    for model in ("base", THIRD):
        cell = found(f"general/{model}").read_json("general.json")["tasks"]["which_letter"]
        assert cell["metric"] == "acc" and cell["rows"] == 6
        assert cell["value"] in [k / 6 for k in range(7)] and cell["error"] is not None
