"""Validation against a loop that trains a copy of the model in place."""

from __future__ import annotations

import copy

import pytest
import torch

from seekr.taalm.inner import AdamW
from seekr.taalm.validation import ValidationSettings, validate
from tests.seekr import tiny
from tests.seekr.taalm import taalm_reference as reference
from tests.seekr.taalm.taalm_problem import item, learner, random_items, train_attention

# Tasks that are the documents themselves, so that a few steps bear on them.
RECITED = [
    item(ids, ids, [2, 4]) for ids in ([1, 5, 6, 7, 8], [2, 9, 11, 4, 3, 12], [3, 20, 21, 22, 23])
]


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "uniform"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_validation_trains_and_scores_as_the_loops_do(lora: bool, weighted: bool) -> None:
    theta, items = learner(lora, spread=0.3), RECITED
    phi = train_attention() if weighted else None
    optimizer = AdamW(learning_rate=0.05, weight_decay=0.1)
    found = validate(
        theta,
        phi,
        items,
        ValidationSettings(optimizer=optimizer, epochs=6, batch_size=3),
        tiny.PAD_ID,
    )
    rows = [item.document for item in items]
    with torch.no_grad():
        weights = [
            torch.ones(len(row.input_ids)).double() if phi is None else reference.weights(phi, row)
            for row in rows
        ]
    changed = copy.deepcopy(theta)
    loop = reference.InPlaceAdamW(changed, optimizer)
    for _ in range(6):
        loop.step(reference.weighted_loss(changed, rows, weights))
    with torch.no_grad():
        for model, nll, accuracy in (
            (theta, found.nll_before, found.accuracy_before),
            (changed, found.nll, found.accuracy),
        ):
            assert nll == pytest.approx(float(reference.object_loss(model, items)), rel=1e-6)
            assert accuracy == pytest.approx(reference.object_accuracy(model, items), abs=1e-6)
    assert found.accuracy > found.accuracy_before


def test_validation_leaves_the_model_as_it_is() -> None:
    theta = learner().train()
    before = {name: p.clone() for name, p in theta.named_parameters()}
    settings = ValidationSettings(epochs=1, batch_size=2)
    first, second = (
        validate(theta, train_attention(), random_items(3), settings, tiny.PAD_ID) for _ in range(2)
    )
    assert first == second and theta.training
    assert all(torch.equal(p, before[name]) for name, p in theta.named_parameters())
