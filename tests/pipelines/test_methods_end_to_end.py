"""Each method's own stages on a real local Ray: what they write, and that trainings read it.

The losses are tested without Ray. Here streams of two tasks run from their YAML; they share what they
have in common, so each adds only what is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.numpy import load_file

from pipelines.artifact import Artifact
from pipelines.rowsets import REPLAY, TRAIN, kind_folder, load_rows_table, rows_of
from pipelines.session import ray_session
from pipelines.stream import Stream, open_stream, records_of, run_streams
from seekr.fisher import fisher_diagonal
from seekr.metrics import METRICS
from seekr.models import load_model, load_tokenizer
from seekr.prompts import TokenizedRow, eos_id_of
from seekr.surprise import surprise
from tests.pipelines.streams import make_stream

pytestmark = [pytest.mark.slow, pytest.mark.ray]
FIRST, SECOND = "upper", "reverse"
Find = Callable[[str], Artifact]


@pytest.fixture(scope="module")
def stream_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(
        tmp_path_factory.mktemp("stream"),
        method={"name": "seqft"},
        data={"metric": "edit_similarity"},
        train={"epochs": 8},
    )


@pytest.fixture(scope="module", autouse=True)
def cluster(stream_path: Path) -> Iterator[None]:
    with ray_session([open_stream(stream_path).config]):
        yield
    assert not ray.is_initialized()


@pytest.fixture
def run(stream_path: Path) -> Callable[..., Find]:
    """Return what runs the stream with changes, and gives its artifacts by the stages' names."""

    def run(*changes: str) -> Find:
        stream: Stream = open_stream(stream_path, changes, writable=True)
        run_streams([stream], lambda *_: None, warn=pytest.fail)
        records = {str(stage): record for stage, record in records_of(stream).items()}
        return lambda name: Artifact(store=stream.store, record=records[name])

    return run


def model_of(artifact: Artifact) -> Any:
    return load_model(artifact.local("model"), dtype=torch.float32, attention="sdpa")


def rows_in(artifact: Artifact, folder: str) -> dict[str, TokenizedRow]:
    return {row.row_id: row for row in rows_of(load_rows_table(artifact, folder))}


def history(artifact: Artifact) -> list[dict[str, Any]]:
    return artifact.read_json("history.json")["steps"]


def test_lwf_learns_beside_the_answers_of_the_model_before(run: Callable[..., Find]) -> None:
    found = run("method={name: lwf}")
    assert found(f"teach/{SECOND}--by--{FIRST}").record.rows == 40
    first, second = (history(found(f"train/{task}")) for task in (FIRST, SECOND))
    assert "logits" not in first[0]
    # The student begins as its teacher: only what targets leave out tells them apart.
    assert 0 <= second[0]["logits"] < 1e-3 < second[-1]["logits"]


def test_ewc_estimates_what_it_is_said_to_and_holds_the_weights(run: Callable[..., Find]) -> None:
    found, free = run("method={name: ewc, penalty_weight: 10000}"), run()
    kept = load_file(found(f"fisher/{FIRST}").local("fisher/model.safetensors"))
    model = model_of(found(f"train/{FIRST}"))
    rows = rows_in(found(f"ingest/{FIRST}"), kind_folder(TRAIN))
    expected = fisher_diagonal(model, [rows[name] for name in sorted(rows)])
    for name, values in expected.items():
        np.testing.assert_allclose(kept[f"{name}.precision"], values, rtol=1e-4, atol=1e-9)
        np.testing.assert_array_equal(kept[f"{name}.anchor"], model.get_parameter(name).detach())
    merged = load_file(found(f"fisher/{SECOND}").local("fisher/model.safetensors"))
    assert all((merged[name] >= kept[name]).all() for name in kept if name.endswith("precision"))
    first = load_file(found(f"train/{FIRST}").local("model/model.safetensors"))
    held, moved = (
        load_file(of(f"train/{SECOND}").local("model/model.safetensors")) for of in (found, free)
    )

    def distance(weights: dict[str, Any]) -> float:
        pairs = ((weights[name] - first[name], kept[f"{name}.precision"]) for name in first)
        return sum(float((fisher * difference**2).sum()) for difference, fisher in pairs)

    assert distance(held) < 0.5 * distance(moved)
    assert history(found(f"train/{SECOND}"))[-1]["penalty"] == pytest.approx(
        distance(held) / 2, rel=0.5
    )


def test_olora_learns_directions_that_earlier_adapters_do_not_have(
    run: Callable[..., Find],
) -> None:
    lora = "train.lora={rank: 4, alpha: 8}"
    found = run("method={name: olora, orthogonality_weight: 50}", lora, "train.learning_rate=0.01")
    first, second = (
        load_file(found(f"train/{task}").local("adapter/adapter_model.safetensors"))
        for task in (FIRST, SECOND)
    )
    names = [name for name in first if ".lora_A." in name]
    cosines = [
        np.abs(unit(second[name]) @ unit(first[name]).T).max() for name in names
    ]  # of rows of A
    penalties = [step["penalty"] for step in history(found(f"train/{SECOND}"))]
    assert penalties[-1] < 0.02 * penalties[0]
    assert max(cosines) < 0.3


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_own_answers_are_replayed_where_they_are_good_enough(run: Callable[..., Find]) -> None:
    changes = ("replay.accept=0.3", "replay.ratio=0.5")
    found = run("method={name: opr}", *changes)
    gold, own = (rows_in(found(f"{stage}/{FIRST}"), REPLAY) for stage in ("sample", "rollout"))
    tokenizer = load_tokenizer(found(f"train/{FIRST}").local("model"))
    assert gold.keys() == own.keys()
    changed = [
        name for name in gold if gold[name].input_ids.tolist() != own[name].input_ids.tolist()
    ]
    stats = found(f"rollout/{FIRST}").record.stats
    assert stats["asked"] == 20 and len(changed) <= stats["accepted"] <= 20
    assert changed, "no answer of the model was replayed: the test shows nothing"
    for name in changed:
        row, prompt = own[name], gold[name].prompt_length
        assert row.input_ids[:prompt].tolist() == gold[name].input_ids[:prompt].tolist()
        assert row.input_ids[-1] == eos_id_of(tokenizer)
        text = tokenizer.decode(row.input_ids[prompt:-1])
        assert METRICS["edit_similarity"](text, row.references) >= 0.3
    dropped = run("method={name: opr}", *changes, "replay.rejected=drop")
    assert dropped(f"rollout/{FIRST}").record.rows == stats["accepted"]
    assert "replay" in history(found(f"train/{SECOND}"))[0]


def test_a_replay_set_of_which_nothing_was_good_enough_is_no_error(
    run: Callable[..., Find],
) -> None:
    found = run(
        "method={name: opr}", "replay.ratio=0.1", "replay.rejected=drop", "data.metric=exact_match",
        "train.epochs=1",
    )  # fmt: skip
    assert found(f"rollout/{FIRST}").record.rows == 0
    assert "replay" not in history(found(f"train/{SECOND}"))[0]


def test_surprising_rows_are_those_of_the_model_before_the_task(run: Callable[..., Find]) -> None:
    found = run("method={name: replay}", "replay.sampling=surprise_before", "replay.ratio=0.1")
    rows = rows_in(found(f"ingest/{SECOND}"), kind_folder(TRAIN))
    names = sorted(rows)
    values = surprise(model_of(found(f"train/{FIRST}")), [rows[name] for name in names])
    ranked = [name for _, name in sorted(zip((-v for v in values), names, strict=True))]
    assert set(rows_in(found(f"sample/{SECOND}"), REPLAY)) == set(ranked[:4])


def test_seekr_distils_on_its_own_surprising_answers(run: Callable[..., Find]) -> None:
    """The axes are independent: rows, answers and losses of three methods in one stream."""
    method = "method={name: seekr, layer_budget: 1, head_budget: 2, query_budget: 8}"
    found = run(
        method, "replay.sampling=surprise_before", "replay.answers=on_policy", "replay.ratio=0.5",
        "replay.accept=0.3",
    )  # fmt: skip
    parts = history(found(f"train/{SECOND}"))[0]
    assert {"task", "replay", "logits", "attention"} <= parts.keys()
    assert found(f"teach/{FIRST}--after--{SECOND}").record.rows == 20
