"""Losses with a weight per token against loops, and what must not matter to them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from seekr.collation import Side, collate
from seekr.forward import batch_logits
from seekr.taalm.episodes import collate_items
from seekr.taalm.inner import AdamState, AdamW, weighted_step
from seekr.taalm.weighted import counted, object_nll, token_nll, weighted_nll, weights_entropy
from tests.seekr import tiny
from tests.seekr.taalm import taalm_reference as reference
from tests.seekr.taalm.taalm_problem import learner, random_items, row

ROWS = [row([3, 4, 5, 6, 7, 8], prompt=1), row([9, 2, 11, 3], prompt=2), row([5, 6, 7], prompt=1)]


def weights_like(rows: list, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(len(r.input_ids), generator=generator).double() + 0.01 for r in rows]


def loss_of(theta: torch.nn.Module, weights: list[torch.Tensor], side: Side, wider: int) -> float:
    batch = collate(ROWS, tiny.PAD_ID, side, multiple_of=wider)
    weights_BT = torch.full(batch.labels_BT.shape, 7.0, dtype=torch.float64)
    for index, own in enumerate(weights):
        start = int(batch.start_B[index])
        weights_BT[index, start : start + len(own)] = own
    nll_BT = token_nll(batch_logits(theta, batch), batch.labels_BT)
    return float(weighted_nll(nll_BT, weights_BT, batch.labels_BT))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("wider", [1, 16])
@torch.no_grad()
def test_the_loss_is_that_of_the_loops_whatever_the_padding_weighs(side: Side, wider: int) -> None:
    theta, weights = learner(), weights_like(ROWS)
    expected = float(reference.weighted_loss(theta, ROWS, weights))
    assert loss_of(theta, weights, side, wider) == pytest.approx(expected, rel=1e-12)


@torch.no_grad()
def test_the_scale_of_weights_does_not_matter() -> None:
    theta, weights = learner(), weights_like(ROWS)
    scaled = [factor * own for factor, own in zip((100.0, 1e3, 10.0), weights, strict=True)]
    # What is left is the 1e-6 beside a sum of weights of about 1.
    assert loss_of(theta, scaled, "right", 1) == pytest.approx(
        loss_of(theta, weights, "right", 1), rel=1e-5
    )


@torch.no_grad()
def test_equal_weights_give_the_plain_masked_loss() -> None:
    theta = learner()
    losses = []
    for r in ROWS:
        ids, first = reference.ids_of(r), reference.first_label(r)
        logits_TV = theta(input_ids=ids).logits[0]
        losses.append(functional.cross_entropy(logits_TV[first - 1 : -1], ids[0, first:]))
    ones = [torch.ones(len(r.input_ids)).double() for r in ROWS]
    expected = float(torch.stack(losses).mean())
    assert loss_of(theta, ones, "right", 1) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_the_object_loss_is_that_of_the_loops() -> None:
    theta, items = learner(), random_items(3)
    tasks = collate_items(items, tiny.PAD_ID).tasks
    logits = theta(input_ids=tasks.input_ids_BT, attention_mask=tasks.attention_mask_BT).logits
    found = float(object_nll(token_nll(logits, tasks.labels_BT), tasks.labels_BT))
    assert found == pytest.approx(float(reference.object_loss(theta, items)), rel=1e-12)


def test_nothing_is_lost_on_the_first_column() -> None:
    labels_BT = torch.tensor([[4, 5, -100]])
    assert counted(labels_BT).tolist() == [[False, True, False]]
    nll_BT = token_nll(torch.randn(1, 3, 9), labels_BT)
    assert nll_BT[0, 1] > 0 and nll_BT[0, [0, 2]].tolist() == [0, 0]


def test_a_document_without_weight_has_no_loss_and_no_gradient() -> None:
    labels_BT = torch.tensor([[4, 5, 6]])
    weights_BT = torch.zeros(1, 3, requires_grad=True)
    loss = weighted_nll(torch.ones(1, 3), weights_BT, labels_BT)
    loss.backward()
    assert loss.detach() == 0 and torch.isfinite(weights_BT.grad).all()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([9.0, 0.3, 0.3, 0.3, 0.3, 5.0], 1.0),
        ([9.0, 0.0, 0.7, 0.0, 0.0, 5.0], 0.0),
        ([9.0, 0.2, 0.2, 0.0, 0.0, 5.0], math.log(2) / math.log(4)),
    ],
)
def test_entropy_is_one_for_equal_weights_and_zero_for_one_token(
    weights: list[float], expected: float
) -> None:
    labels_BT = torch.tensor([[3, 3, 3, 3, 3, -100]])
    found = weights_entropy(torch.tensor([weights]), labels_BT)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_a_document_of_one_label_has_entropy_one() -> None:
    assert float(weights_entropy(torch.tensor([[1.0, 0.4]]), torch.tensor([[3, 3]]))) == 1.0


def test_packed_documents_are_refused() -> None:
    batch = replace(collate(ROWS, tiny.PAD_ID), position_ids_BT=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="use collate"):
        weighted_step(learner(), {}, AdamState.zeros({}), batch, torch.ones(3, 6), AdamW())
