"""Train-Attention finds the facts planted among filler, and what it finds helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from seekr.models import tiny_llama
from seekr.taalm.episodes import MetaItem, collate_items
from seekr.taalm.hypergradient import InnerLoop
from seekr.taalm.inner import AdamW
from seekr.taalm.meta import MetaSettings, MetaStep, MetaTraining
from seekr.taalm.network import TrainAttention
from seekr.taalm.validation import Validation, ValidationSettings, validate
from tests.seekr.taalm.taalm_problem import item

START, MARK, FILLER, KEYS, VALUES = 1, 2, (10, 30), (30, 35), (35, 40)
VOCABULARY = 40
# One step of 0.01 moves the tiny model's probabilities visibly.
LEARNING = AdamW(learning_rate=0.01, damping=1e-8)
ONE_STEP = ValidationSettings(optimizer=LEARNING, epochs=1, batch_size=1)


def planted_facts(count: int, seed: int) -> list[MetaItem]:
    """Twelve tokens of filler with `MARK key value` somewhere inside; the task asks for the value."""
    draw = np.random.default_rng(seed)
    found: list[MetaItem] = []
    for _ in range(count):
        filler = draw.integers(*FILLER, size=12).tolist()
        at = int(draw.integers(2, 11))
        fact = [MARK, int(draw.integers(*KEYS)), int(draw.integers(*VALUES))]
        found.append(item([START, *filler[:at], *fact, *filler[at:]], [START, *fact], [3]))
    return found


@pytest.fixture(scope="module")
def learnt() -> tuple[torch.nn.Module, TrainAttention, list[MetaStep]]:
    """A learner, a Train-Attention after meta-training on 64 facts, and the steps it took."""
    theta = tiny_llama(vocab_size=VOCABULARY, hidden=32, seed=0)
    phi = TrainAttention(tiny_llama(vocab_size=VOCABULARY, hidden=32, seed=1).base_model)
    settings = MetaSettings(
        inner=InnerLoop(optimizer=LEARNING, dummy_steps=1),
        optimizer=AdamW(learning_rate=0.01),
        epochs=10,
        batch_size=16,
        episode_size=16,
    )
    steps: list[MetaStep] = []
    MetaTraining(theta, phi, planted_facts(64, seed=0), settings, pad_id=0).run(report=steps.append)
    return theta, phi, steps


def mean_weight(ids_BT: Tensor, weights_BT: Tensor, span: tuple[int, int]) -> float:
    return float(weights_BT[(ids_BT >= span[0]) & (ids_BT < span[1])].mean())


def test_values_that_are_asked_for_weigh_more_than_filler(
    learnt: tuple[torch.nn.Module, TrainAttention, list[MetaStep]],
) -> None:
    _, phi, _ = learnt
    documents = collate_items(planted_facts(64, seed=1), pad_id=0).documents
    with torch.no_grad():
        weights_BT = phi(documents)
    value, filler = (mean_weight(documents.input_ids_BT, weights_BT, s) for s in (VALUES, FILLER))
    assert value > 2 * filler


def test_a_weighted_step_teaches_more_than_a_uniform_one(
    learnt: tuple[torch.nn.Module, TrainAttention, list[MetaStep]],
) -> None:
    theta, phi, _ = learnt

    def after(by: TrainAttention | None) -> list[Validation]:
        held_out = planted_facts(32, seed=1)
        return [validate(theta, by, [one], ONE_STEP, pad_id=0) for one in held_out]

    weighted, uniform = after(phi), after(None)
    gain = [u.nll - w.nll for w, u in zip(weighted, uniform, strict=True)]
    assert np.mean(gain) > 2 * np.std(gain) / len(gain) ** 0.5
    assert np.mean([w.accuracy for w in weighted]) > np.mean([u.accuracy for u in uniform])
    assert np.mean([u.nll for u in uniform]) < np.mean([u.nll_before for u in uniform])


def test_the_watch_for_collapse_moves(
    learnt: tuple[torch.nn.Module, TrainAttention, list[MetaStep]],
) -> None:
    _, _, steps = learnt
    assert steps[0].entropy == pytest.approx(1.0, abs=1e-4)
    assert steps[0].mean_weight == pytest.approx(0.982, abs=1e-3)
    assert 0.3 < steps[-1].entropy < 0.99


def test_validation_before_any_epoch_is_the_model_itself() -> None:
    theta = tiny_llama(vocab_size=VOCABULARY, hidden=32)
    found = validate(
        theta, None, planted_facts(5, seed=2), ValidationSettings(epochs=0, batch_size=2), pad_id=0
    )
    assert found.nll == found.nll_before and found.accuracy == found.accuracy_before
