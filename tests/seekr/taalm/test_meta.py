"""Meta-training: what a step is, that it can be resumed, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seekr.errors import ConfigError, DataError
from seekr.taalm.episodes import MetaItem, collate_items
from seekr.taalm.hypergradient import InnerLoop, hypergradient
from seekr.taalm.inner import AdamW
from seekr.taalm.meta import STATE, MetaSettings, MetaStep, MetaTraining
from tests.seekr import tiny
from tests.seekr.taalm.taalm_problem import (
    item,
    learner,
    random_items,
    row,
    train_attention,
    trained,
)

INNER = InnerLoop(optimizer=AdamW(learning_rate=0.02, damping=1e-8), dummy_steps=1)
SETTINGS = MetaSettings(
    inner=INNER, optimizer=AdamW(learning_rate=0.01), epochs=2, batch_size=3, episode_size=2
)


def training(
    settings: MetaSettings = SETTINGS, items: list[MetaItem] | None = None, lora: bool = False
) -> MetaTraining:
    items = random_items(5) if items is None else items
    return MetaTraining(learner(), train_attention(lora), items, settings, tiny.PAD_ID)


def test_a_step_is_adamw_on_the_mean_of_the_items_hypergradients() -> None:
    settings = replace(SETTINGS, batch_size=5, episode_size=1)
    own = training(settings)
    theta, phi, items = learner(), train_attention(), random_items(5)
    found = [hypergradient(theta, phi, collate_items([i], 0), INNER) for i in items]
    figures = own.step()
    optimizer = torch.optim.AdamW(trained(phi).values(), lr=0.01)
    for name, p in trained(phi).items():
        p.grad = torch.stack([grads[name] for grads, _ in found]).mean(dim=0)
    norm = torch.stack([p.grad.norm() for p in trained(phi).values() if p.grad is not None]).norm()
    optimizer.step()
    for name, p in trained(own.phi).items():
        torch.testing.assert_close(p, trained(phi)[name], rtol=1e-6, atol=1e-9)
    assert figures.step == own.steps_done == 1
    assert figures.gradient_norm == pytest.approx(float(norm), rel=1e-9)
    for name in ("outer_nll", "entropy", "mean_weight"):
        mean = sum(getattr(seen, name) for _, seen in found) / 5
        assert getattr(figures, name) == pytest.approx(mean, rel=1e-9)


def test_items_count_alike_in_episodes_of_unequal_size() -> None:
    settings = replace(SETTINGS, batch_size=3, episode_size=2)
    items = random_items(3)
    theta, phi = learner(), train_attention()
    own = MetaTraining(theta, phi, items, settings, tiny.PAD_ID)
    order = own._plan.step(0).task  # pyright: ignore[reportPrivateUsage]
    parts = ([items[i] for i in order[:2]], [items[order[2]]])
    (two, seen_two), (one, seen_one) = (
        hypergradient(theta, phi, collate_items(part, 0), INNER) for part in parts
    )
    norm = torch.stack([((2 * two[n] + one[n]) / 3).norm() for n in two]).norm()
    figures = own.step()
    assert figures.gradient_norm == pytest.approx(float(norm), rel=1e-9)
    assert figures.outer_nll == pytest.approx((2 * seen_two.outer_nll + seen_one.outer_nll) / 3)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("backend", ["unrolled", "jvp", "central"])
def test_a_resumed_training_ends_with_the_bits_of_an_uninterrupted_one(
    backend: Any, lora: bool, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, inner=replace(INNER, backend=backend))
    whole, first, second = (training(settings, lora=lora) for _ in range(3))
    seen: list[MetaStep] = []
    whole.run(report=seen.append)
    assert [figures.step for figures in seen] == [1, 2, 3, 4] and whole.num_steps == 4
    first.run(until=2)
    first.save(tmp_path)
    second.load(tmp_path)
    assert second.steps_done == 2
    again: list[MetaStep] = []
    second.run(report=again.append)
    assert again == seen[2:]
    for name, p in trained(whole.phi).items():
        assert torch.equal(p, trained(second.phi)[name]), name


def test_the_order_of_items_given_does_not_matter() -> None:
    one, other = training(), training(items=random_items(5)[::-1])
    assert one.step() == other.step()


def test_theta_is_not_changed() -> None:
    own = training()
    before = {name: p.clone() for name, p in own.theta.named_parameters()}
    own.run(until=2)
    assert all(torch.equal(p, before[name]) for name, p in own.theta.named_parameters())


def test_a_state_of_other_settings_items_or_tensors_is_refused(tmp_path: Path) -> None:
    training().save(tmp_path)
    with pytest.raises(ConfigError, match="has other settings"):
        training(replace(SETTINGS, seed=1)).load(tmp_path)
    with pytest.raises(ConfigError, match="has other items"):
        training(items=random_items(4)).load(tmp_path)
    with pytest.raises(ConfigError, match="trains other tensors"):  # adapters instead of weights
        training(lora=True).load(tmp_path)
    with pytest.raises(ConfigError, match=f"has no {STATE}"):
        training().load(tmp_path / "elsewhere")
    assert json.loads((tmp_path / STATE).read_text())["step"] == 0


def test_items_without_an_object_or_labels_are_refused() -> None:
    document, task = row([3, 4, 5]), row([6, 7, 8])
    for mask in ([False] * 3, [True, False, False]):
        with pytest.raises(DataError, match="has no object token behind its first token"):
            MetaItem(document=document, task=task, object_mask_T=np.array(mask))
    with pytest.raises(DataError, match=r"object mask of shape \(2,\)"):
        MetaItem(document=document, task=task, object_mask_T=np.array([False, True]))
    with pytest.raises(DataError, match="one label or more is needed"):
        item([3], [6, 7], [1])
    with pytest.raises(DataError, match="given no items"):
        training(items=[])
    with pytest.raises(DataError, match="given an item twice"):
        training(items=random_items(2) + random_items(1))


def test_a_gradient_that_is_not_finite_stops_the_training_and_leaves_phi() -> None:
    own = training()
    with torch.no_grad():
        dict(own.theta.named_parameters())["model.norm.weight"].fill_(torch.nan)
    before = {name: p.clone() for name, p in trained(own.phi).items()}
    with pytest.raises(DataError, match=r"hypergradient of step 1 is nan, on the items"):
        own.step()
    assert all(torch.equal(p, before[name]) for name, p in trained(own.phi).items())


@pytest.mark.parametrize("wrong", ["epochs", "batch_size", "episode_size"])
def test_counts_below_one_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        replace(SETTINGS, **{wrong: 0})
