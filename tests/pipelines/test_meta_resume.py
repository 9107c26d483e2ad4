"""A meta-training that is killed and taken up again, against one that nobody disturbs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.load import load_config
from pipelines.meta import NETWORK, _MetaTrainer, read_pairs
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, PoolConfig
from pipelines.store import Store
from pipelines.workspace import CHECKPOINTS
from seekr.errors import DataError
from seekr.sampling import draw
from tests.pipelines.documents import ATTENTION, META, make_documents

pytestmark = pytest.mark.slow
KEY = "meta/base/key"
GO = pa.table({"go": [True]})


class Ending(Reporter):
    """Kills its process when a step is told of."""

    last: int

    def named(self, name: str) -> Reporter:
        return self

    def post(self, *, force: bool = False, **fields: Any) -> None:
        if fields["steps_done"] == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(path: Path, store: Path, report: Reporter, *changes: str) -> _MetaTrainer:
    config = load_config(path, changes)
    assert config.token_weights is not None
    own = config.token_weights.meta
    items, _ = read_pairs(config, own)
    held_out = draw([item.item_id for item in items], own.held_out, config.seed)
    base = config.model.path
    return _MetaTrainer(
        model=ModelSource(artifact=None, base=base, trust_remote_code=False, dtype="float32"),
        config=config,
        learnt=[item for item in items if item.item_id not in held_out],
        watched=[item for item in items if item.item_id in held_out],
        store=Store.open(store),
        key=KEY,
        report=report,
        pool=PoolConfig(),
    )


def die_at(path: Path, store: Path, step: int, changes: tuple[str, ...]) -> None:
    """Run in a process of its own until a step is told of, before it is saved."""
    report = Ending(None, KEY)
    report.last = step
    trainer(path, store, report, *changes)(GO)


def killed(path: Path, store: Path, step: int, *changes: str) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=die_at, args=(path, store, step, changes)
    )
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL


def train(path: Path, store: Path, *changes: str) -> tuple[dict[str, bytes], Any]:
    """Train to the end; returns the network's files and the history."""
    table = trainer(path, store, Reporter(None, KEY), *changes)(GO)
    folder = store / KEY / NETWORK
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "model.safetensors" in files and "tokenizer.json" in files
    return files, json.loads(table["history"][0].as_py())


def saved(store: Path) -> set[str]:
    return {folder.name for folder in (store / KEY / CHECKPOINTS).iterdir()}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_documents(tmp_path_factory.mktemp("stream"), token_weights=ATTENTION)


@pytest.fixture(scope="module")
def whole(path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Any]:
    return train(path, tmp_path_factory.mktemp("whole"))


def test_a_killed_meta_training_goes_on_and_ends_with_the_same_bits(
    path: Path, whole: Any, tmp_path: Path
) -> None:
    assert len(whole[1]["steps"]) == 4
    killed(path, tmp_path, 2)
    assert saved(tmp_path) == {"step-1"}  # step 2 died before it was saved
    killed(path, tmp_path, 4)
    assert saved(tmp_path) == {"step-3"}
    assert train(path, tmp_path) == whole


def test_half_a_checkpoint_is_passed_over(path: Path, whole: Any, tmp_path: Path) -> None:
    killed(path, tmp_path, 4, "token_weights.meta.checkpoint_every=1")
    (tmp_path / KEY / CHECKPOINTS / "step-3" / "steps.json").unlink()
    assert train(path, tmp_path, "token_weights.meta.checkpoint_every=2") == whole


def test_a_meta_training_that_diverges_leaves_no_network(path: Path, tmp_path: Path) -> None:
    learner = trainer(path, tmp_path, Reporter(None, KEY), "token_weights.meta.learning_rate=1e38")
    history = json.loads(learner(GO)["history"][0].as_py())
    assert history.keys() == {"diverged"}
    assert "the hypergradient of step 2 is nan" in history["diverged"]
    assert not (tmp_path / KEY / NETWORK).exists()


def test_pairs_that_share_a_text_with_an_excluded_file_are_left_out(path: Path) -> None:
    config = load_config(path)
    assert config.token_weights is not None
    own = config.token_weights.meta
    everything, counts = read_pairs(config, own)
    assert len(everything) == 10 and counts == {"excluded": 0, "quarantined": 0}
    lines = (path.parent / "data/meta.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # One shares the sentence, one the document, one nothing.
    parts = [
        rows[0] | {"evidence": "something else entirely"},
        rows[1] | {"task_schematic": f"something else {rows[1]['object']}"},
        rows[2] | {"evidence": "something else", "task_schematic": f"else, {rows[2]['object']}"},
    ]
    other = path.parent / "data/other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in parts))
    left, counts = read_pairs(config, own.model_copy(update={"exclude": (str(other),)}))
    assert counts == {"excluded": 2, "quarantined": 0}
    wanted = {item.item_id for item in everything} - {item.item_id for item in left}
    gone = [item for item in everything if item.item_id in wanted]
    assert {item.document.references[0] for item in gone} == {r["evidence"] for r in rows[:2]}
    with pytest.raises(DataError, match="of 10 pairs 10 are excluded"):
        read_pairs(
            config, own.model_copy(update={"exclude": (str(path.parent / "data/meta.jsonl"),)})
        )
    assert META["held_out"] == 2
    with pytest.raises(DataError, match="more than held_out = 10 are needed"):
        read_pairs(config, own.model_copy(update={"held_out": 10}))
