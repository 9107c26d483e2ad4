"""RecAdam against its update written out in float64, and what its pull does to weights alone."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.special import expit
from torch import Tensor

from seekr.batches import BatchPlan
from seekr.collation import collate
from seekr.losses import answer_nll
from seekr.methods.penalty import Shard
from seekr.methods.recadam import RecAdam, annealing
from seekr.models import load_model
from seekr.training.build import Origin
from seekr.training.loop import Training, Workers
from seekr.training.ranges import flat
from seekr.training.schedule import learning_rate
from seekr.training.settings import Execution, Recipe
from seekr.training.strategy import create_strategy
from tests.seekr import tiny
from tests.seekr.training.problem import LORA, PAD_ID, recipe, training_rows, write_model

METHOD = RecAdam(pull_weight=60.0, steepness=0.4, midpoint=6)
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def begin(folder: Path, method: RecAdam, chosen: Recipe) -> Training:
    device, execution = torch.device("cpu"), Execution(micro_batch_size=4)
    strategy = create_strategy(Origin(folder=folder), chosen, execution, device)
    rows = training_rows(replay=False)
    return Training(chosen, execution, method, rows, strategy, device, PAD_ID, Workers())


def weights(training: Training) -> dict[str, Tensor]:
    named = training.strategy.model.named_parameters()
    return {name: p.detach().double() for name, p in named if p.requires_grad}


def by_hand(folder: Path, chosen: Recipe) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The update of the module's docstring, Adam and clipping written out, all in float64."""
    model: Any = tiny.to_exact(load_model(folder, dtype=torch.float32)).train()
    theta = dict(model.named_parameters())
    start = {name: p.detach().clone() for name, p in theta.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in theta.items()} for _ in range(2))
    rows = training_rows(replay=False)
    plan = BatchPlan(
        row_ids=rows.task_ids,
        replay_ids=[],
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        batch_ratio=chosen.batch_ratio,
        seed=chosen.seed,
    )
    log: list[dict[str, float]] = []
    for t in range(1, STEPS + 1):
        batch = collate([rows.task[i] for i in plan.step(t - 1).task], PAD_ID)
        nll, count = answer_nll(model(**batch.inputs()).logits, batch.labels_BT)
        loss = nll.sum() / count.sum()
        grads = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        rate = learning_rate(chosen, t - 1, plan.num_steps)
        a = 1 / (1 + math.exp(-METHOD.steepness * (t - METHOD.midpoint)))
        away = sum(float((theta[n].detach() - start[n]).square().sum()) for n in theta) / 2
        total = a * float(loss.detach()) + (1 - a) * METHOD.pull_weight * away
        log.append(
            {"loss": total, "penalty": away, "grad_norm": norm, "task": float(loss.detach())}
        )
        with torch.no_grad():
            for name, p in theta.items():
                g = grads[name] * min(1.0, chosen.max_grad_norm / (norm + 1e-6))
                m[name] = chosen.beta1 * m[name] + (1 - chosen.beta1) * g
                v[name] = chosen.beta2 * v[name] + (1 - chosen.beta2) * g**2
                mean, square = m[name] / (1 - chosen.beta1**t), v[name] / (1 - chosen.beta2**t)
                pulled = p - rate * (1 - a) * METHOD.pull_weight * (p - start[name])
                u = mean / (square.sqrt() + 1e-8) + chosen.weight_decay * pulled
                p.copy_(pulled - rate * a * u)
    return {name: p.detach() for name, p in theta.items()}, log


def test_the_update_is_the_one_that_is_written_out(folder: Path) -> None:
    chosen = recipe(epochs=3)
    expected, log = by_hand(folder, chosen)
    training = begin(folder, METHOD, chosen)
    assert training.num_steps == STEPS
    before = {name: values.clone() for name, values in weights(training).items()}
    for step in range(STEPS):
        entry = training.step(step)
        for part, value in log[step].items():
            assert entry[part] == pytest.approx(value, rel=1e-4, abs=1e-9), (step, part)
    for name, values in weights(training).items():
        moved = (expected[name] - before[name]).norm()
        assert moved > 0
        assert (values - expected[name]).norm() < 1e-3 * moved, name


def test_the_share_of_the_task_is_a_sigmoid_of_the_step_counted_from_one() -> None:
    for steepness, midpoint in ((0.5, 250), (0.01, 0), (3.0, 7)):
        for step in range(0, 20000, 37):
            expected = expit(steepness * (step + 1 - midpoint))
            assert annealing(step, steepness, midpoint) == pytest.approx(expected, rel=1e-12)
    assert annealing(6, 3.0, 7) == 0.5


def test_where_the_task_has_no_share_weights_go_back_by_the_same_part_each_step(
    folder: Path,
) -> None:
    """Adapters as well, whose start is a draw and zero."""
    for lora in (None, LORA):
        chosen = recipe(lora=lora, schedule="constant", warmup_steps=0, learning_rate=1e-3)
        training = begin(folder, RecAdam(pull_weight=250.0, midpoint=100000), chosen)
        start = {name: values.clone() for name, values in weights(training).items()}
        for block in training.strategy.blocks():
            flat(block.master).add_(1.0)
        for step in range(3):
            entry = training.step(step)
            left = 0.75 ** (step + 1)
            for name, values in weights(training).items():
                torch.testing.assert_close(
                    values - start[name], torch.full_like(values, left), rtol=0, atol=2e-6
                )
            numbers = sum(values.numel() for values in start.values())
            expected = numbers * (left / 0.75) ** 2 / 2
            assert entry["penalty"] == pytest.approx(expected, rel=1e-4)
            assert entry["loss"] == pytest.approx(250.0 * expected, rel=1e-4)


def test_where_the_task_has_it_all_nothing_is_pulled(folder: Path) -> None:
    chosen = recipe(epochs=1, warmup_steps=0)
    free = begin(folder, RecAdam(steepness=1000.0, midpoint=0), chosen)
    other = begin(folder, RecAdam(steepness=1000.0, midpoint=0, pull_weight=1.0), chosen)
    for step in range(free.num_steps):
        assert free.step(step)["loss"] == other.step(step)["loss"]
    for name, values in weights(free).items():
        assert torch.equal(values, weights(other)[name])


def test_cuts_of_a_tensor_are_pulled_as_the_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    start, now = (torch.randn(30, generator=draw, dtype=torch.float64) for _ in range(2))
    a = 1 / (1 + math.exp(-0.4 * (3 - 6)))
    expected = now - 0.01 * 60.0 * (1 - a) * (now - start)
    for edges in ((0, 30), (0, 7, 30), (0, 1, 29, 30)):
        pull = METHOD.pull(lambda name, first, length: start[first : first + length])
        assert pull.weight(2) == pytest.approx(60.0 * (1 - a), rel=1e-12)
        found, value = now.clone(), 0.0
        for first, last in itertools.pairwise(edges):
            shard = Shard(
                name="w",
                shape=(30,),
                start=first,
                values=found[first:last],
                gradient=torch.zeros(last - first),
                counts=True,
            )
            value += float(pull.move(shard, 2, 0.01))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert value == pytest.approx(float((now - start).square().sum()) / 2, rel=1e-12)
