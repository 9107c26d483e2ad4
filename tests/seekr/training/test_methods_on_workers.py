"""Every method under two FSDP2 workers, a row per pass, against one worker that sees whole batches.

What each method's loss is, is tested elsewhere, in float64. Here: that workers, shards and passes do not
change it, whatever the method adds to rows or to weights.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seekr.addition import is_added
from seekr.methods import METHODS, Method
from seekr.methods.penalty import Past
from seekr.prompts import TokenizedRow
from seekr.token_weights import relative_weights
from seekr.training.build import Origin
from seekr.training.checkpoint import load_checkpoint, take_snapshot, writer_of
from seekr.training.loop import Training, Workers
from seekr.training.ranges import flat
from seekr.training.settings import Execution
from seekr.training.strategy import create_strategy
from tests.seekr.training.problem import (
    LORA,
    METHOD,
    PAD_ID,
    recipe,
    recorded_weights,
    task_targets,
    training_rows,
    write_model,
)
from tests.seekr.training.worlds import run_world

# Replay of rows whose tokens count differently.
WEIGHTED = "weighted"
STREAMED = [
    *sorted(name for name, method in METHODS.items() if not method.needs.all_tasks),
    WEIGHTED,
]
STEPS = 8


def method_named(name: str) -> Method:
    # Task and pull both count in the few steps that are taken.
    own = {"pull_weight": 100.0, "midpoint": 4} if name == "recadam" else {}
    name = "replay" if name == WEIGHTED else name
    return METHOD if name == "seekr" else METHODS[name].model_validate({"name": name, **own})


def past_of(method: Method) -> Past:
    """Return numbers that depend on a tensor's name alone."""

    def read(name: str, start: int, length: int) -> Tensor:
        draw = np.random.default_rng(zlib.crc32(name.encode()))
        return torch.from_numpy(draw.random(start + length)[start:]).float() * 0.2

    if method.needs.fisher:
        return {"fisher": read}
    return (
        {"old": read, "older": lambda name, *at: read(f"{name}2", *at)}
        if (method.needs.adapters)
        else {}
    )


def per_token(row: TokenizedRow, kind: str) -> TokenizedRow:
    """Return a row with a number for each token, which follows from its id."""
    draw = np.random.default_rng(zlib.crc32(row.row_id.encode()))
    values = (draw.random(len(row.input_ids)) * 6).astype(np.float32)
    values[-1] = 0.0
    if kind == "weights":
        values = relative_weights(values, row.prompt_length)
    return replace(row, **{kind: values})


def begin(
    folder: Path, name: str, strategy: Any, size: int, rank: int = 0, world_size: int = 1
) -> Training:
    """Return a method's training before its first step."""
    method, device = method_named(name), torch.device("cpu")
    lora = LORA if method.needs.adapters else None
    addition = method.addition
    if addition is not None and method.needs.weights:
        addition = addition.with_task("old")  # alone, a block has all the weight
    chosen = recipe(lora=lora, epochs=2, addition=addition, task="new")
    execution = Execution(strategy=strategy, micro_batch_size=size)
    built = create_strategy(Origin(folder=folder), chosen, execution, device)
    rows = training_rows(
        replay=method.needs.replay, targets=task_targets() if method.needs.task_logits else None
    )
    if method.needs.weights:
        rows = replace(rows, targets=recorded_weights())
    if method.needs.reference:
        rows = replace(rows, task=[per_token(row, "reference_nll") for row in rows.task])
    if name == WEIGHTED:
        task, replay = (
            [per_token(r, "weights") for r in some] for some in (rows.task, rows.replay)
        )
        rows = replace(rows, task=task, replay=replay, targets=None)
    if addition is not None:
        rows = replace(rows, task=addition.with_task("new").before(rows.task, 258))
    workers = Workers(rank=rank, world_size=world_size)
    return Training(
        chosen, execution, method, rows, built, device, PAD_ID, workers,
        method.penalty(past_of(method)),
    )  # fmt: skip


def train(folder: Path, name: str, strategy: Any, size: int, rank: int, world_size: int) -> Any:
    """Train in this process, one of several; returns the steps and how far weights have moved."""
    training = begin(folder, name, strategy, size, rank, world_size)
    built = training.strategy
    before = {n: flat(p).clone() for n, p in built.model.named_parameters()}
    steps = [training.step(step) for step in range(training.num_steps)]
    moved = {n: bool((flat(p) != before[n]).any()) for n, p in built.model.named_parameters()}
    return steps, moved


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    results: dict[tuple[str, int], Any] = {}
    for workers, strategy, size in ((1, "ddp", 6), (2, "fsdp", 1)):
        cases = {
            name: {"folder": model, "name": name, "strategy": strategy, "size": size}
            for name in STREAMED
        }
        of_world = run_world(workers, train, cases, tmp_path_factory.mktemp("world"))
        results |= {(name, workers): result for name, result in of_world.items()}
    return results


@pytest.mark.parametrize("name", STREAMED)
def test_two_workers_with_a_row_per_pass_compute_what_one_computes(
    found: dict[tuple[str, int], Any], name: str
) -> None:
    one, two = found[name, 1], found.get((name, 2), "an earlier method failed")
    assert not isinstance(one, str), one
    assert not isinstance(two, str), two
    assert len(one[0]) == len(two[0]) == STEPS
    for ours, theirs in zip(two[0], one[0], strict=True):
        assert ours.keys() == theirs.keys()
        parts = ours.keys() - {"seconds", "wishes", "step"}
        for part in parts:
            assert ours[part] == pytest.approx(theirs[part], rel=1e-3, abs=1e-6), (part, ours)


@pytest.mark.parametrize("name", STREAMED)
def test_training_changes_exactly_what_the_method_trains(
    found: dict[tuple[str, int], Any], name: str
) -> None:
    _, moved = found[name, 1]
    needs = method_named(name).needs
    for parameter, has_moved in moved.items():
        trained = not needs.addition or is_added(parameter)
        trained = trained and "seekr_block_0" not in parameter  # an earlier task's
        trained = trained and (not needs.adapters or ".lora_" in parameter)
        assert has_moved == trained, parameter


@pytest.mark.parametrize("name", STREAMED)
def test_the_parts_of_a_loss_that_are_logged_are_those_of_the_method(
    found: dict[tuple[str, int], Any], name: str
) -> None:
    needs, steps = method_named(name).needs, found[name, 1][0]
    expected = {"task"}
    expected |= {"replay"} if needs.replay and not needs.weights else set()
    expected |= {"reflection"} if needs.weights else set()
    expected |= {"logits"} if needs.logits or needs.task_logits else set()
    expected |= {"attention"} if needs.heads else set()
    expected |= {"penalty"} if needs.penalty else set()
    expected |= {"pull"} if name == "l2p" else set()
    names = {"task", "replay", "logits", "attention", "penalty", "pull", "reflection"}
    assert set(steps[0]) & names == expected
    for part in expected:
        assert all(np.isfinite(step[part]) for step in steps)
        # Before the first step nothing is away from where it started.
        assert steps[int(part == "penalty" and needs.start)][part] > 0


@pytest.mark.parametrize("name", STREAMED)
def test_a_training_that_is_left_and_taken_up_again_ends_with_the_same_bits(
    name: str, model: Path, tmp_path: Path
) -> None:
    whole, left, again = (begin(model, name, "ddp", 6) for _ in range(3))
    steps = [whole.step(step) for step in range(STEPS)]
    for step in range(3):
        left.step(step)
    blocks = left.strategy.blocks()
    take_snapshot(blocks, left.strategy.optimizer).save(tmp_path, writer_of(blocks))
    load_checkpoint(tmp_path, again.strategy.blocks(), again.strategy.optimizer)
    again.strategy.refresh()
    for step in range(3, STEPS):
        assert again.step(step)["loss"] == steps[step]["loss"]
    ends = [dict(training.strategy.model.named_parameters()) for training in (whole, again)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
