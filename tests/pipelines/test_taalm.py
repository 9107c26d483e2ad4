"""Documents, weights of their tokens and facts that are asked for, in real streams on Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray.data
import torch

from pipelines.artifact import Artifact
from pipelines.ingest import QUARANTINE
from pipelines.meta import HISTORY, NETWORK
from pipelines.probe import load_probes
from pipelines.report import render_report
from pipelines.results import EXAMPLES
from pipelines.rowsets import (
    REPLAY,
    TRAIN,
    kind_folder,
    load_rows_table,
    load_table,
    read_rows,
    rows_of,
    smallest,
)
from pipelines.stream import finished_view, open_stream, run_streams
from pipelines.tables import knowledge_table
from pipelines.training_rows import load_training_rows
from pipelines.weights import load_weights
from seekr.collation import collate
from seekr.fact_probes import score_probes
from seekr.models import load_model, load_tokenizer
from seekr.prompts import TokenizedRow
from seekr.sampling import priority
from seekr.taalm.network import TrainAttention
from tests.pipelines.documents import ATTENTION, FIRST, ROWS, SECOND, make_documents
from tests.pipelines.running import Find, run_to_end
from tests.pipelines.streams import write_rows

pytestmark = pytest.mark.ray
WEIGHED = ("method={name: replay}", f"token_weights={json.dumps(ATTENTION)}")
FOCUSED = ("token_weights={by: focus}",)
EXCESS = ("method={name: rho1, share: 0.5}",)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_documents(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def weighed(path: Path) -> Find:
    return run_to_end(path, *WEIGHED)


@pytest.fixture(scope="module")
def focused(path: Path) -> Find:
    return run_to_end(path, *FOCUSED)


@pytest.fixture(scope="module")
def excess(path: Path) -> Find:
    return run_to_end(path, *EXCESS)


def documents(find: Find, task: str) -> list[TokenizedRow]:
    return rows_of(load_rows_table(find(f"ingest/{task}"), kind_folder(TRAIN)))


def steps(artifact: Artifact) -> list[dict[str, Any]]:
    return artifact.read_json("history.json")["steps"]


def alone(values_BT: torch.Tensor, row: TokenizedRow) -> np.ndarray:
    assert values_BT.shape == (1, len(row.input_ids))
    return values_BT[0].detach().float().numpy()


def test_a_stream_of_documents_has_a_network_weights_and_probes_and_no_evaluation(
    weighed: Find, path: Path
) -> None:
    found = [str(stage) for stage in open_stream(path, WEIGHED).stages]
    tasks = [f"{kind}/{task}" for kind in ("ingest", "weights", "sample", "train")
             for task in (FIRST, SECOND)]  # fmt: skip
    assert sorted(found) == sorted(["meta/base", "probe/new", "probe/old", *tasks])
    meta = weighed("meta/base")
    history = meta.read_json(HISTORY)
    # 10 pairs, 2 held out, 4 per update, 2 passes.
    assert [step["step"] for step in history["steps"]] == [0, 1, 2, 3]
    assert all(np.isfinite(list(step.values())).all() for step in history["steps"])
    assert {"nll_before", "nll_weighted", "nll_plain"} < history["held_out"].keys()
    assert not meta.store.list(meta.path("checkpoints"))


def test_a_row_s_weights_are_what_the_network_says_of_it(weighed: Find) -> None:
    network = TrainAttention.load(weighed("meta/base").local(NETWORK))
    for task in (FIRST, SECOND):
        rows = documents(weighed, task)
        numbers = load_weights({task: weighed(f"weights/{task}")})
        assert numbers.keys() == {f"{task}/{row.row_id}" for row in rows} and len(rows) == ROWS
        for row in rows:
            expected = alone(network(collate([row], pad_id=0)), row)
            own = numbers[f"{task}/{row.row_id}"]
            np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-7)
            assert own[0] == 0 and (own[1:] > 0).all()


def test_every_row_that_is_learnt_or_replayed_carries_weights_of_mean_one(weighed: Find) -> None:
    rows = load_training_rows(
        {SECOND: weighed(f"ingest/{SECOND}")},
        {FIRST: weighed(f"sample/{FIRST}")},
        {},
        {},
        {task: weighed(f"weights/{task}") for task in (FIRST, SECOND)},
        "weights",
    )
    kept = rows_of(load_rows_table(weighed(f"sample/{FIRST}"), REPLAY))
    assert [row.row_id for row in rows.replay] == [row.row_id for row in kept] and kept
    assert len(rows.task) == ROWS
    for row in (*rows.task, *rows.replay):
        assert row.weights is not None and row.reference_nll is None
        assert row.weights[0] == 0
        assert row.weights[1:].mean() == pytest.approx(1, abs=1e-6)
    inputs = weighed(f"train/{SECOND}").record.payload["inputs"]
    assert {f"weights.{FIRST}", f"weights.{SECOND}", f"replay.{FIRST}"} < inputs.keys()


def test_facts_are_asked_before_the_first_step_and_after_every_epoch(
    weighed: Find, path: Path
) -> None:
    models = {"before": path.parent / "model", FIRST: weighed(f"train/{FIRST}").local("model")}
    first, second = (steps(weighed(f"train/{task}")) for task in (FIRST, SECOND))
    for history in (first, second):
        asked = ["probes.new.accuracy" in step for step in history]
        before = ["probes_before.old.nll" in step for step in history]
        assert asked == [False, True, False, True]  # 6 rows in batches of 4, twice
        assert before == [True, False, False, False]
    scored = {
        "before": {key.removeprefix("probes_before."): v for key, v in first[0].items()},
        FIRST: {key.removeprefix("probes."): value for key, value in first[-1].items()},
    }
    for when, folder in models.items():
        model = load_model(folder, dtype=torch.float32, attention="sdpa")
        for name in ("new", "old"):
            probes = load_probes(weighed(f"probe/{name}"))
            accuracy, nll = score_probes(model, probes, batch_size=3, pad_id=0, device="cpu")
            assert scored[when][f"{name}.accuracy"] == pytest.approx(accuracy.mean(), abs=1e-9)
            assert scored[when][f"{name}.nll"] == pytest.approx(nll.mean(), rel=1e-5)
    # What the second task starts from is what the first one has ended with.
    assert second[0]["probes_before.new.nll"] == pytest.approx(
        first[-1]["probes.new.nll"], rel=1e-6
    )


def test_the_report_shows_facts_and_what_tokens_count(weighed: Find, path: Path) -> None:
    view = finished_view(open_stream(path, WEIGHED))
    page = render_report([view])
    assert "<h2" in page and ">Facts<" in page and ">What tokens count<" in page
    assert "Facts known by documents after each epoch" in page
    example = weighed(f"weights/{FIRST}").read_json(EXAMPLES)[0]
    assert len(example["tokens"]) == len(example["weights"])
    assert example["tokens"][3] in page
    assert knowledge_table([view]) is not None


def test_a_second_run_computes_nothing(weighed: Find, path: Path) -> None:
    stream = open_stream(path, WEIGHED, writable=True)
    events: list[Any] = []
    run_streams([stream], lambda event, *_: events.append(event), warn=pytest.fail)
    kinds = {event.kind for event in events if hasattr(event, "kind")}
    assert kinds == {"reused"}, kinds


def test_by_focus_the_object_s_tokens_count_and_nothing_else(focused: Find, path: Path) -> None:
    tokenizer = load_tokenizer(path.parent / "model", trust_remote_code=False)
    told = [
        json.loads(line) for line in (path.parent / f"data/{FIRST}.jsonl").read_text().splitlines()
    ]
    objects = {row["evidence"]: row["object"] for row in told}
    numbers = load_weights({FIRST: focused(f"weights/{FIRST}")})
    for row in documents(focused, FIRST):
        answer = objects[row.references[0]]
        # A token is a word, and a word may carry a full stop.
        words = [tokenizer.decode([token]) for token in row.input_ids]
        expected = [float(answer in word) for word in words]
        expected[0] = 0.0
        assert sum(expected) > 0
        assert numbers[f"{FIRST}/{row.row_id}"].tolist() == expected
    assert all(np.isfinite(step["loss"]) for step in steps(focused(f"train/{SECOND}")))


def test_rho1_is_given_the_base_model_s_loss_of_every_token(excess: Find, path: Path) -> None:
    model = load_model(path.parent / "model", dtype=torch.float64, attention="sdpa")
    for task in (FIRST, SECOND):
        numbers = load_weights({task: excess(f"weights/{task}")})
        for row in documents(excess, task):
            ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
            with torch.no_grad():
                logits_TV = model(input_ids=ids, use_cache=False).logits[0]
            log_p_TV = logits_TV.log_softmax(dim=-1)
            expected = [0.0, *(-log_p_TV[:-1].gather(1, ids[0, 1:, None])[:, 0]).tolist()]
            np.testing.assert_allclose(
                numbers[f"{task}/{row.row_id}"], expected, rtol=1e-4, atol=1e-5
            )
    page = render_report([finished_view(open_stream(path, EXCESS))])
    assert "What tokens count" not in page and ">Facts<" in page
    assert all(np.isfinite(step["task"]) for step in steps(excess(f"train/{SECOND}")))


def test_streams_share_what_does_not_depend_on_weights(weighed: Find, focused: Find) -> None:
    for name in ("ingest/one", "ingest/two", "probe/new", "probe/old"):
        assert weighed(name).record.fingerprint == focused(name).record.fingerprint
    assert load_table(weighed("ingest/one"), kind_folder(TRAIN)).num_rows == ROWS


def test_the_rows_with_the_smallest_hash_are_all_there_are_or_none(excess: Find) -> None:
    rows = read_rows(excess(f"ingest/{FIRST}"), kind_folder(TRAIN))
    ids = [row.row_id for row in documents(excess, FIRST)]
    assert sorted(smallest(rows, None, 2 * ROWS, seed=3).to_pylist()) == sorted(ids)
    wanted = sorted(ids, key=lambda row_id: (priority(3, row_id), row_id))
    assert sorted(smallest(rows, None, 2, seed=3).to_pylist()) == sorted(wanted[:2])
    kinds = pa.table({"row_id": ids, "kind": ["train"] * ROWS})
    none = smallest(ray.data.from_arrow(kinds), "test", 4, seed=0)
    assert none.to_pylist() == [] and none.type == pa.string()


def test_documents_without_focus_left_and_bad_ones_are_ingested_beside_others(
    path: Path, tmp_path: Path
) -> None:
    """One file begins with a bad row, another has its focus behind the cut."""
    lines = (path.parent / f"data/{FIRST}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    bad = rows[0] | {"object": "nowhere to be found"}
    late = rows[1] | {"evidence": " ".join(["the"] * 60) + f" {rows[1]['object']}"}
    parts = {"a": [bad, *rows[2:]], "b": [late]}
    for name, some in parts.items():
        write_rows(tmp_path / "rows" / f"{name}.jsonl", some)
    find = run_to_end(
        path, *FOCUSED, "probes=[]", "data.max_bad_share=0.5", "train.epochs=1",
        f"tasks=[{{name: one, train: {tmp_path}/rows}}]",
    )  # fmt: skip
    stats = find("weights/one").record.stats
    numbers = load_weights({FIRST: find("weights/one")})
    assert len(numbers) == ROWS - 1 and stats["rows_without"] == 1
    assert sorted(bool(own.any()) for own in numbers.values()) == [False] + [True] * (ROWS - 2)
    (told,) = find("ingest/one").read_json(QUARANTINE)
    assert told["line"] == 1 and "is not in the document" in told["reason"]
