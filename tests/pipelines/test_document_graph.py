"""Documents, probes and token weights in a stream's graph: what they add, reach and leave alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.planted_facts.model import word_tokenizer
from pipelines.graph import build_graph
from pipelines.load import load_config
from pipelines.stage import Stage
from pipelines.stream import open_stream
from pipelines.survey import survey
from seekr.taalm.network import TrainAttention
from tests.pipelines.documents import ATTENTION, FIRST, SECOND, make_documents
from tests.pipelines.streams import RULES, make_stream

Graph = dict[str, Stage]
UPPER, REVERSE = list(RULES)[:2]
WEIGHED = f"token_weights={json.dumps(ATTENTION)}"
FOCUSED = "token_weights={by: focus}"
REPLAY = "method={name: replay}"
REVIEW = "replay.review={}/data/lessons.jsonl"


def graph(path: Path, *overrides: str) -> Graph:
    config = load_config(path, overrides)
    return {str(stage): stage for stage in build_graph(config, survey(config))}


def changed(before: Graph, after: Graph) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name].fingerprint != after[name].fingerprint}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("asked"), method={"name": "replay"})


@pytest.fixture(scope="module")
def network(path: Path) -> Path:
    folder = path.parent / "network"
    TrainAttention.start(path.parent / "model").save(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_streams_without_documents_have_the_settings_they_always_had(asked: Path) -> None:
    found = graph(asked)
    ingest, train = found[f"ingest/{UPPER}"], found[f"train/{REVERSE}"]
    assert ingest.config.keys() == {
        *("columns", "template", "max_length", "max_answer_length", "truncate"),
        *("train_rows", "test_rows", "validation_rows"),
    }
    assert ingest.config["columns"] == {"input": None, "output": None, "definition": None}
    assert ingest.sources.keys() == {"train", "test", "tokenizer"} and not ingest.inputs
    assert train.inputs.keys() == {f"data.{REVERSE}", f"replay.{UPPER}", "model"}
    assert found[f"train/{UPPER}"].inputs.keys() == {f"data.{UPPER}"}
    assert {stage.name for stage in found.values()} == {"ingest", "sample", "train", "evaluate"}


def test_documents_are_ingested_by_their_columns_and_nothing_is_evaluated(path: Path) -> None:
    found = graph(path, "probes=[]")
    assert {stage.name for stage in found.values()} == {"ingest", "train"}
    ingest = found[f"ingest/{FIRST}"]
    assert ingest.config["columns"]["text"] == "evidence"
    assert ingest.config["columns"]["focus"] == "object"
    assert ingest.sources.keys() == {"train", "tokenizer"}
    other = graph(path, "probes=[]", "data.columns.focus=null")
    assert changed(found, other) == set(found)


def test_documents_that_are_also_asked_about_are_evaluated(path: Path) -> None:
    test = [f"tasks.{i}.test={path.parent}/data/new.jsonl" for i in (0, 1)]
    columns = "data.columns={text: evidence, input: task_descriptive, output: object}"
    found = graph(path, *test, columns, "data.max_answer_length=8")
    assert f"evaluate/{SECOND}" in found
    assert found[f"ingest/{FIRST}"].sources.keys() == {"train", "test", "tokenizer"}


def test_probes_are_inputs_of_every_training_and_of_nothing_else(path: Path) -> None:
    found, plain = graph(path), graph(path, "probes=[]")
    assert found.keys() - plain.keys() == {"probe/new", "probe/old"}
    for stage in found.values():
        probes = {key for key in stage.inputs if key.startswith("probes.")}
        assert probes == ({"probes.new", "probes.old"} if stage.name == "train" else set())
    assert {n for n in plain if plain[n] == found[n]} == {f"ingest/{t}" for t in (FIRST, SECOND)}


def test_a_probe_s_seed_counts_where_rows_are_drawn_by_it_and_only_there(path: Path) -> None:
    probes = {"probe/new", "probe/old"}
    assert not changed(graph(path), graph(path, "seed=1")) & probes
    few = "probes.0.rows=2"
    assert changed(graph(path, few), graph(path, few, "seed=1")) & probes == {"probe/new"}


EXECUTION = {
    "a role": ("probes.0.role=watched",),
    "workers": ("train.workers=2", "train.strategy=fsdp"),
    "another pool": ("teach={actors: 2, cpus: 2, batch_size: 3}",),
    "where the network is trained": (
        *("token_weights.meta.cpus=2", "token_weights.meta.gpus=1"),
        "token_weights.meta.checkpoint_every=7",
    ),
}


@pytest.mark.parametrize("overrides", EXECUTION.values(), ids=list(EXECUTION))
def test_roles_and_places_change_no_fingerprint(path: Path, overrides: tuple[str, ...]) -> None:
    assert changed(graph(path, WEIGHED), graph(path, WEIGHED, *overrides)) == set()


def test_weights_by_a_network_hang_on_the_network_and_on_the_rows(path: Path) -> None:
    plain, found = graph(path, REPLAY), graph(path, REPLAY, WEIGHED)
    assert found.keys() - plain.keys() == {"meta/base", f"weights/{FIRST}", f"weights/{SECOND}"}
    meta = found["meta/base"]
    assert not meta.inputs and meta.sources.keys() == {"model", "pairs"}
    assert meta.config["seed"] == 0 and "pairs" not in meta.config
    for task in (FIRST, SECOND):
        weights = found[f"weights/{task}"]
        assert dict(weights.inputs) == {"data": found[f"ingest/{task}"], "network": meta}
        assert weights.config == {"by": "train_attention"} and not weights.sources
    first, second = (found[f"train/{task}"].inputs for task in (FIRST, SECOND))
    assert {key for key in first if "weights" in key} == {f"weights.{FIRST}"}
    assert {key for key in second if "weights" in key} == {f"weights.{FIRST}", f"weights.{SECOND}"}
    # Rows that are not replayed need none.
    alone = graph(path, WEIGHED)[f"train/{SECOND}"].inputs
    assert {key for key in alone if "weights" in key} == {f"weights.{SECOND}"}
    # What is kept for replay does not depend on what its tokens count.
    for name in (f"ingest/{FIRST}", f"sample/{FIRST}", "probe/new"):
        assert plain[name] == found[name]


def test_a_setting_of_the_network_reaches_its_weights_and_the_trainings(path: Path) -> None:
    found = changed(graph(path, WEIGHED), graph(path, WEIGHED, "token_weights.meta.epochs=3"))
    assert found == {f"{kind}/{task}" for kind in ("weights", "train") for task in (FIRST, SECOND)} | {
        "meta/base"
    }  # fmt: skip


def test_excluded_pairs_and_another_beginning_are_told_by_their_content(
    path: Path, tmp_path: Path
) -> None:
    data = path.parent / "data"
    new, known = (f"token_weights.meta.exclude=[{data}/{name}.jsonl]" for name in ("new", "known"))
    one, other = graph(path, WEIGHED, new), graph(path, WEIGHED, known)
    assert one["meta/base"].sources.keys() == {"model", "pairs", "exclude"}
    assert "meta/base" in changed(one, other)
    shutil.copy(data / "new.jsonl", tmp_path / "moved.jsonl")
    moved = f"token_weights.meta.exclude.0={tmp_path}/moved.jsonl"
    assert changed(one, graph(path, WEIGHED, new, moved)) == set()
    begun = graph(path, WEIGHED, f"token_weights.model={path.parent}/model")
    assert begun["meta/base"].sources.keys() == {"model", "pairs", "backbone"}


def test_a_network_that_is_trained_already_is_an_outside_source(path: Path, network: Path) -> None:
    found = graph(path, f"token_weights={{by: train_attention, network: {network}}}")
    assert "meta/base" not in found
    assert found[f"weights/{FIRST}"].sources.keys() == {"network"}


def test_weights_by_focus_need_the_rows_alone(path: Path) -> None:
    found = graph(path, FOCUSED)
    weights = found[f"weights/{FIRST}"]
    assert dict(weights.inputs) == {"data": found[f"ingest/{FIRST}"]} and not weights.sources
    assert graph(path, WEIGHED, "token_weights.by=focus") == found


def test_rho1_compares_every_task_with_the_base_model(path: Path) -> None:
    found, plain = graph(path, "method={name: rho1}"), graph(path)
    assert found.keys() - plain.keys() == {f"weights/{FIRST}", f"weights/{SECOND}"}
    assert changed(plain, {name: found[name] for name in plain}) == {
        f"train/{FIRST}",
        f"train/{SECOND}",
    }
    weights = found[f"weights/{SECOND}"]
    assert weights.sources.keys() == {"model"} and weights.config["by"] == "reference"
    fewer = graph(path, "method={name: rho1, share: 0.3}")
    assert changed(found, fewer) == {f"train/{FIRST}", f"train/{SECOND}"}


def test_reviewed_rows_are_all_kept_and_replayed_from_the_first_task_on(path: Path) -> None:
    review = REVIEW.format(path.parent)
    found, plain = graph(path, REPLAY, review), graph(path, REPLAY)
    assert found.keys() - plain.keys() == {"ingest/review", "sample/review"}
    sample = found["sample/review"]
    assert sample.config == {"ratio": 1.0, "rows": None, "seed": 0}
    for task in (FIRST, SECOND):
        assert found[f"train/{task}"].inputs["replay.review"] == sample
        assert found[f"train/{task}"].config["method"]["name"] == "replay"
        assert "batch_ratio" in found[f"train/{task}"].config
    assert "batch_ratio" not in plain[f"train/{FIRST}"].config
    weighed = graph(path, REPLAY, review, WEIGHED)
    assert "weights.review" in weighed[f"train/{FIRST}"].inputs
    assert weighed["weights/review"].inputs["data"] == found["ingest/review"]


def test_all_tasks_at_once_have_the_weights_of_all(path: Path) -> None:
    found = graph(path, "method={name: mtl}", WEIGHED)
    inputs = found["train/all"].inputs
    assert {f"weights.{FIRST}", f"weights.{SECOND}", "probes.new"} < inputs.keys()


def test_the_example_of_lama_ckl_opens_with_the_published_files_columns(
    path: Path, tmp_path: Path
) -> None:
    data = path.parent / "data"
    for published, own in (
        ("variant", "new"),
        ("invariant_descriptive", "known"),
        ("invariant_schematic", "meta"),
    ):
        shutil.copy(data / f"{own}.jsonl", tmp_path / f"{published}.jsonl")
    example = Path(__file__).parents[2] / "examples" / "lama_ckl_tiny.yaml"
    changes = (f"data_root={tmp_path}", f"storage={tmp_path / 'store'}")
    kinds = {
        name: {stage.name for stage in open_stream(example, [*changes, *more]).stages}
        for name, more in {
            "taalm": (),
            "plain": ("token_weights=null",),
            "oracle": ("token_weights.by=focus",),
            "rho1": ("token_weights=null", "method.name=rho1"),
        }.items()
    }
    plain = {"ingest", "train", "probe"}
    assert kinds == {
        "taalm": plain | {"meta", "weights"},
        "plain": plain,
        "oracle": plain | {"weights"},
        "rho1": plain | {"weights"},
    }
