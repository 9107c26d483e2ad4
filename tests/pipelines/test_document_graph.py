"""Documents, probes and token weights in a stream's graph: what they add, reach and leave alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.planted_facts.model import word_tokenizer
from pipelines.graph import build_graph
from pipelines.load import load_config
from pipelines.stage import Stage
from pipelines.stream import open_stream
from pipelines.survey import survey
from seekr.errors import ConfigError, DataError
from seekr.taalm.network import TrainAttention
from tests.pipelines.documents import ATTENTION, FIRST, SECOND, make_documents
from tests.pipelines.streams import RULES, make_model, make_stream

Graph = dict[str, Stage]
Draw = Callable[..., Graph]
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


UNFOCUSED = "data.columns={text: evidence}"
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a focus of no document": (("data.columns={focus: object}",), "focus is about documents"),
    "questions without a test": (("data.columns={}",), "task one has no test"),
    "a test for some": (
        ("tasks.0.test=x.jsonl", "data.columns.input=object"),
        "task two has no test and other tasks have one",
    ),
    "a validation of documents": (("evaluate.split=validation",), "task one learns documents"),
    "two who say what counts": (
        ("method={name: rho1}", FOCUSED),
        "method rho1 says itself which tokens count",
    ),
    "weights of own answers": (
        (REPLAY, "replay.answers=on_policy", FOCUSED),
        "token_weights is set and replay.answers makes answers of its own",
    ),
    "weights of opr's answers": (
        ("method={name: opr}", FOCUSED),
        "token_weights is set and method opr makes answers of its own",
    ),
    "weights of borrowed rows": (
        (REPLAY, "replay.borrowed=2", FOCUSED),
        "token_weights is set and replay.borrowed makes answers of its own",
    ),
    "answers to documents": (
        ("method={name: opr}",),
        "task one learns documents, which ask nothing, and method opr lets the model answer",
    ),
    "probes of an addition": (("method={name: l2p}",), "probes is set and method l2p"),
    "weights for an addition": (
        ("method={name: l2p}", "probes=[]", FOCUSED),
        "token_weights is set and method l2p",
    ),
    "no focus": ((FOCUSED, UNFOCUSED), "task one has no columns.focus"),
    "no focus of what is reviewed": (
        (
            *(REPLAY, FOCUSED, UNFOCUSED, "replay.review=x.jsonl"),
            *(f"tasks.{i}.columns={{text: evidence, focus: object}}" for i in (0, 1)),
        ),
        "replay.review has no columns.focus",
    ),
    "no network": (
        ("token_weights={by: train_attention}",),
        "network and meta.pairs are both null",
    ),
    "two networks": (
        (WEIGHED, "token_weights.network=x"),
        "network and meta.pairs are both set",
    ),
    "a beginning of a trained network": (
        ("token_weights={by: train_attention, network: x, model: y}",),
        "network is trained already and model is what one begins as",
    ),
    "two probes of one name": (("probes.1.name=NEW",), "the name 'new' occurs twice"),
    "two probes of one role": (("probes.1.role=to_learn",), "the role 'to_learn' occurs twice"),
    "a review without replay": (("replay.review=x.jsonl",), "method seqft replays nothing"),
    "a review without targets": (
        ("method={name: derpp}", "replay.review=x.jsonl"),
        "method derpp has targets for what it replays",
    ),
    "packed rows for rho1": (("method={name: rho1}", "train.pack_tokens=64"), "pack_tokens is 64"),
    "a task called review": (("tasks.0.name=Review",), "'Review' is reserved"),
    "a share of no tokens": (("method={name: rho1, share: 0}",), "method.share"),
    "another source": (("token_weights={by: magic}",), "token_weights.by"),
}


@pytest.mark.parametrize(("overrides", "told"), REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_go_together_is_refused(
    path: Path, overrides: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert told in str(refused.value)


MISSING = {
    "a probe's file": ("probes.0.data=nowhere.jsonl", "probes.new.data", "does not exist"),
    "a probe's column": ("probes.0.sentence=sentense", "probes.new.data", "no column 'sentense'"),
    "pairs": ("token_weights.meta.pairs=nowhere.jsonl", "token_weights.meta.pairs", "not exist"),
    "what is excluded": (
        "token_weights.meta.exclude=[/nowhere.jsonl]",
        "token_weights.meta.exclude",
        "not exist",
    ),
    "a pair's column": ("token_weights.meta.columns.answer=objekt", "did you mean 'object'?", ""),
    "a document's column": (
        "data.columns.text=evidense",
        "did you mean 'evidence'?",
        "columns.text",
    ),
    "the focus": (
        "data.columns.focus=uuid",
        "(column 'uuid') is not in the document",
        "one.jsonl:1",
    ),
    "a beginning": ("token_weights.model=nowhere", "nowhere", "exist"),
    "reviewed rows": ("replay={review: nowhere.jsonl}", "replay.review", "not exist"),
}


@pytest.mark.parametrize(("override", "where", "told"), MISSING.values(), ids=list(MISSING))
def test_what_is_not_there_is_told_before_the_start(
    path: Path, override: str, where: str, told: str
) -> None:
    with pytest.raises((ConfigError, DataError)) as refused:
        open_stream(path, [REPLAY, WEIGHED, override])
    assert where in str(refused.value) and told in str(refused.value)


@pytest.mark.parametrize("what", ["network", "model"])
def test_a_network_that_reads_other_tokens_is_refused(
    path: Path, tmp_path: Path, what: str
) -> None:
    folder = make_model(tmp_path / "bytes")
    own = "" if what == "network" else f", meta: {{pairs: {path.parent}/data/meta.jsonl}}"
    with pytest.raises(ConfigError, match="Weights belong to tokens"):
        open_stream(path, [f"token_weights={{by: train_attention, {what}: {folder}{own}}}"])
