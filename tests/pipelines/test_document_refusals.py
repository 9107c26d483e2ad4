"""What a stream about documents, probes and token weights is refused for, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.load import load_config
from pipelines.stream import open_stream
from seekr.errors import ConfigError, DataError
from tests.pipelines.documents import ATTENTION, make_documents
from tests.pipelines.streams import make_model

WEIGHED = f"token_weights={json.dumps(ATTENTION)}"
FOCUSED = "token_weights={by: focus}"
REPLAY = "method={name: replay}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_documents(tmp_path_factory.mktemp("documents"))


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
        "part 1 of column 'uuid' is not in the document",
        "one.jsonl:1",
    ),
    "a document that is too long": (
        "token_weights.meta.max_length=4096",
        "token_weights.meta.max_length is 4096",
        "positions; lower it",
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
