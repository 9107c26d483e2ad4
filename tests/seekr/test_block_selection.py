"""SAPT's loss against sums written out; and whether rows find their own task's block by it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seekr.addition import addition_of, seeing
from seekr.answers import WholeLogits
from seekr.batch_targets import collate_targets
from seekr.collation import Batch, collate
from seekr.forward import batch_logits
from seekr.losses import own_block_nll, weights_kl
from seekr.methods import Outputs
from seekr.methods.sapt import SAPT
from seekr.models import load_tokenizer
from seekr.prompts import TokenizedRow
from seekr.shared_attention import Attending, weights_of
from seekr.teacher import TeacherTarget
from seekr.teacher_store import encode_target
from seekr.training.build import Origin
from seekr.training.export import export_model
from seekr.training.loop import Training, Workers
from seekr.training.microbatches import TrainingRows
from seekr.training.settings import Execution
from seekr.training.strategy import Plain
from tests.seekr.test_shared_attention import ROWS, model, spec_of, weights_by_hand
from tests.seekr.training.problem import recipe, write_model

RECORDED = (0.8, 0.2)


def target(row: TokenizedRow, weights: tuple[float, ...]) -> TeacherTarget:
    return TeacherTarget(
        length=len(row.input_ids),
        shift=True,
        logits=None,
        heads_by_layer={},
        query_positions=np.zeros(0, dtype=np.int64),
        attention=None,
        weights=torch.tensor(weights),
    )


def outputs(made: Any, batch: Batch, recorded: tuple[float, ...]) -> Outputs:
    """What the loop hands to the method, kept after the pass."""
    with seeing(made, batch) as seen:
        logits = batch_logits(made, batch)
        assert isinstance(seen, Attending)
        kept = Attending(seen.spec)
        kept.weights_BS = seen.weights_BS
    targets = collate_targets([target(row, recorded) for row in ROWS], batch)
    return Outputs(answers=WholeLogits(logits), batch=batch, targets=targets, added=kept)


def test_the_loss_is_the_tasks_the_selection_and_the_reflection() -> None:
    spec, batch = spec_of(3), collate(ROWS, pad_id=0)
    made = model(spec)
    method = SAPT(selection_weight=0.7, reflection_weight=3.0)
    found = outputs(made, batch, RECORDED)
    terms = method.task_terms(found)
    assert terms.keys() == {"task", "selection"}
    terms |= method.replay_terms(found)
    weights = [weights_by_hand(made, spec, row).tolist() for row in ROWS]
    own = -sum(math.log(row[2]) for row in weights)
    held = sum(
        sum(p * math.log(p / a) for p, a in zip(RECORDED, row, strict=False)) for row in weights
    )
    for name, weight, expected, unit in (
        ("selection", 0.7, own, "task_rows"),
        ("reflection", 3.0, held, "replay_rows"),
    ):
        term = terms[name]
        assert (term.weight, term.per) == (weight, unit)
        assert float(term.total.detach()) == pytest.approx(expected, rel=1e-6)


def test_the_selection_is_the_divergence_from_the_newest_block_alone() -> None:
    weights = torch.softmax(torch.randn(5, 4, dtype=torch.float64), dim=-1)
    alone = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64).expand(5, 4)
    torch.testing.assert_close(own_block_nll(weights), weights_kl(alone, weights))


@pytest.mark.parametrize(("weight", "count"), [(0.0, 3), (1.0, 1)])
def test_without_weight_or_with_one_block_there_is_nothing_to_select(
    weight: float, count: int
) -> None:
    found = outputs(model(spec_of(count)), collate(ROWS, pad_id=0), (1.0,))
    assert SAPT(selection_weight=weight).task_terms(found).keys() == {"task"}


def test_the_selection_moves_keys_and_queries_and_no_block() -> None:
    made, batch = model(spec_of(3)), collate(ROWS, pad_id=0)
    found = outputs(made, batch, RECORDED)
    SAPT().task_terms(found)["selection"].total.backward()
    moved = {n.rpartition(".")[2] for n, p in made.named_parameters() if p.grad is not None}
    query = {f"seekr_query_{part}" for part in ("down", "up", "norm", "shift")}
    assert moved == {"seekr_key_2", *query}


def task_rows(name: str, word: bytes, seed: int, count: int) -> list[TokenizedRow]:
    """Rows of a word, four random letters and an answer that only the word decides."""
    draw = np.random.default_rng(seed)
    rows: list[TokenizedRow] = []
    for index in range(count):
        letters = draw.integers(97, 123, size=4)
        ids = np.array([*word, *letters, *word[:2], -1], dtype=np.int32) + 2
        rows.append(
            TokenizedRow(
                row_id=f"{name}-{index}",
                input="",
                references=("",),
                input_ids=ids,
                prompt_length=len(word) + 4,
            )
        )
    return rows


def learn(
    folder: Path, method: SAPT, origin: Path, rows: TrainingRows, task: str
) -> tuple[Path, Any]:
    place, device = Origin(folder=origin), torch.device("cpu")
    chosen = recipe(
        epochs=6, batch_size=16, batch_ratio=0.5, addition=method.addition, task=task,
        learning_rate=5e-3,
    )  # fmt: skip
    execution = Execution(micro_batch_size=16)
    strategy = Plain(place, chosen, execution, device)
    training = Training(chosen, execution, method, rows, strategy, device, 0, Workers())
    for step in range(training.num_steps):
        training.step(step)
    folder.mkdir()
    export_model(strategy, chosen, place, load_tokenizer(origin), folder, Workers())
    return folder, strategy.model


def test_rows_of_two_tasks_find_their_own_blocks(tmp_path: Path) -> None:
    origin = write_model(tmp_path / "base")
    first, second = (task_rows(name, name.encode(), 1, 160) for name in ("deal", "cut"))
    nothing = TrainingRows(
        task=first, task_ids=[row.row_id for row in first], replay=(), replay_ids=(), targets=None
    )
    kept = first[:8]
    both = replace(
        nothing,
        task=second,
        task_ids=[row.row_id for row in second],
        replay=kept,
        replay_ids=[row.row_id for row in kept],
        targets=[encode_target(target(row, (1.0,))) for row in kept],
    )
    method = SAPT(rank=4, query_width=16)
    folder, _ = learn(tmp_path / "first", method, origin, nothing, "deal")
    _, made = learn(tmp_path / "second", method, folder, both, "cut")
    assert addition_of(made) is not None
    for own, name in enumerate(("deal", "cut")):
        unseen = task_rows(name, name.encode(), 2, 100)
        weights_BS = weights_of(made, collate(unseen, pad_id=0))
        assert float((weights_BS.argmax(dim=-1) == own).float().mean()) >= 0.9, name
