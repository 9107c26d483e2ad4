"""SAPT in a stream: which stages it has, what they write, what comes out, what is refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipelines.evaluate import BLOCK
from pipelines.graph import build_graph
from pipelines.load import load_config
from pipelines.report import render_report
from pipelines.results import PREDICTIONS
from pipelines.rowsets import REPLAY, TRAIN, kind_folder, load_rows_table, load_table, rows_of
from pipelines.stage import Stage
from pipelines.stream import finished_view, open_stream
from pipelines.survey import survey
from pipelines.teach import TARGETS
from seekr.collation import collate
from seekr.errors import ConfigError
from seekr.models import load_model
from seekr.shared_attention import weights_of
from seekr.teacher_store import decode_target
from tests.pipelines.running import Find, run_to_end
from tests.pipelines.streams import RULES, make_stream

FIRST, SECOND, THIRD = list(RULES)[:3]
SAPT = "method={name: sapt, rank: 2, query_width: 4}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("stream"), tasks=3)


def graph(path: Path, *overrides: str) -> dict[str, Stage]:
    config = load_config(path, overrides)
    return {str(stage): stage for stage in build_graph(config, survey(config))}


def test_each_task_is_recorded_once_by_the_model_that_has_just_learnt_it(path: Path) -> None:
    found = graph(path, SAPT)
    kinds = {stage.name for stage in found.values()}
    assert kinds == {"ingest", "sample", "train", "teach", "evaluate"}
    assert {name for name in found if name.startswith("teach")} == {
        f"teach/{task}" for task in (FIRST, SECOND, THIRD)
    }
    recorded = found[f"teach/{SECOND}"].inputs
    assert {name: str(stage) for name, stage in recorded.items()} == {
        "teacher": f"train/{SECOND}",
        "replay": f"sample/{SECOND}",
        "data": f"ingest/{SECOND}",
    }
    by_row = graph(path, "method={name: sapt, reflection: row}")
    assert "data" not in by_row[f"teach/{SECOND}"].inputs
    last = found[f"train/{THIRD}"].inputs
    assert {f"targets.{task}" for task in (FIRST, SECOND)} < last.keys()


def test_the_first_training_does_not_depend_on_the_reflection(path: Path) -> None:
    ours, other = graph(path, SAPT), graph(path, SAPT, "method.reflection_weight=3")
    changed = {name for name in ours if ours[name].fingerprint != other[name].fingerprint}
    assert f"train/{FIRST}" not in changed and f"train/{SECOND}" in changed
    recorded = graph(path, SAPT, "method.reflection=row")
    assert recorded[f"train/{FIRST}"].fingerprint == ours[f"train/{FIRST}"].fingerprint
    assert recorded[f"teach/{FIRST}"].fingerprint != ours[f"teach/{FIRST}"].fingerprint


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("replay.borrowed=4", "replay.borrowed is set and method sapt replays the prompts"),
        ("replay.answers=on_policy", "replay.answers is set and method sapt"),
        ("train.lora={rank: 2}", "method sapt is not about adapters"),
        ("train.pack_tokens=64", "an addition for single rows"),
        ("general.tasks=[piqa]", "lm-eval does not know how to use"),
        ("method.targets=[nosuch]", "'nosuch'; the linear layers of this model are"),
        ("method.rank=0", "method.rank"),
    ],
)
def test_what_does_not_go_with_it_is_refused_at_start(path: Path, change: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_stream(path, [SAPT, change])
    assert told in str(refused.value)


@pytest.fixture(scope="module")
def ran(path: Path) -> Find:
    return run_to_end(path, SAPT, "train.epochs=2")


@pytest.mark.ray
def test_targets_are_the_mean_weights_of_the_tasks_training_rows(ran: Find) -> None:
    trained = ran(f"train/{SECOND}").local("model")
    model = load_model(trained, dtype=torch.float32, attention="sdpa")
    rows = rows_of(load_rows_table(ran(f"ingest/{SECOND}"), kind_folder(TRAIN)))
    alone = [weights_of(model, collate([row], pad_id=0))[0].double() for row in rows]
    expected = torch.stack(alone).mean(dim=0).float()
    targets = load_table(ran(f"teach/{SECOND}"), TARGETS)
    kept = rows_of(load_rows_table(ran(f"sample/{SECOND}"), REPLAY))
    assert targets["row_id"].to_pylist() == [row.row_id for row in kept]
    for row, data in zip(kept, targets["target"].to_pylist(), strict=True):
        target = decode_target(data)
        assert target.weights is not None and target.length == len(row.input_ids)
        torch.testing.assert_close(target.weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.ray
def test_earlier_blocks_and_the_model_itself_stay_as_they_were(ran: Find, path: Path) -> None:
    base = load_file(path.parent / "model" / "model.safetensors")
    second, third = (
        load_file(ran(f"train/{task}").local("model") / "addition.safetensors")
        for task in (SECOND, THIRD)
    )
    blocks = [name for name in second if "_block_" in name]
    assert blocks and all(torch.equal(second[name], third[name]) for name in blocks)
    key = "model.embed_tokens.seekr_key_"
    assert torch.equal(second[f"{key}0"], third[f"{key}0"])
    assert torch.equal(second[f"{key}1"], third[f"{key}1"])
    for name, values in load_file(
        ran(f"train/{THIRD}").local("model") / "model.safetensors"
    ).items():
        assert torch.equal(values, base[name])
    for task in (FIRST, SECOND, THIRD):
        history = ran(f"train/{task}").read_json("history.json")["steps"]
        # 2 epochs of 40 rows in batches of 8: an update each, however many tasks there are.
        assert len(history) == 10
        assert all(("reflection" in step) == (task != FIRST) for step in history)


@pytest.mark.ray
def test_the_report_says_how_often_rows_find_their_own_block(
    ran: Find, path: Path, tmp_path: Path
) -> None:
    artifact = ran(f"evaluate/{THIRD}")
    table = pq.read_table(
        artifact.full_path(PREDICTIONS), filesystem=artifact.store.filesystem
    ).to_pydict()
    assert set(table[BLOCK]) <= {FIRST, SECOND, THIRD}
    view = finished_view(open_stream(path, [SAPT, "train.epochs=2"]))
    hits = [
        block == task
        for block, task in zip(table[BLOCK], table["task"], strict=True)
        if task == FIRST
    ]
    found = view.selection_accuracy()
    assert found[THIRD, FIRST] == pytest.approx(sum(hits) / len(hits))
    assert found[FIRST, FIRST] == 1.0
    page = render_report([view])
    assert "Shared attention" in page and "KiB" in page
