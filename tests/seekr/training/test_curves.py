"""Twenty steps of SEEKR under every strategy, against a simple loop in one process.

Workers, accumulation, activation checkpointing, packing and adapters may not change the loss curve
beyond rounding. Tolerance: the loss and its parts within 2e-4 of themselves at every step, the norm of
the gradient within 1e-3. All sums are float32; a different order of summation moves a loss by parts in
10^7, and AdamW, which divides by the gradient's size, makes more of it step after step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seekr.training.build import Origin
from seekr.training.loop import Training, Workers
from seekr.training.settings import Execution, Lora
from seekr.training.strategy import create_strategy
from tests.seekr.training.problem import (
    LORA,
    METHOD,
    PAD_ID,
    STEPS,
    recipe,
    training_rows,
    write_model,
)
from tests.seekr.training.reference import reference_curve
from tests.seekr.training.worlds import run_world

STRATEGIES = {
    "ddp": Execution(strategy="ddp"),
    "fsdp": Execution(strategy="fsdp"),
    "zero1": Execution(strategy="deepspeed", zero_stage=1),
    "zero2": Execution(strategy="deepspeed", zero_stage=2),
    "zero3": Execution(strategy="deepspeed", zero_stage=3),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"micro_batch_size": 1},
    "checkpointing": {"activation_checkpointing": True, "micro_batch_size": 2},
    "packing": {"pack_tokens": 48},
    "lora": {"micro_batch_size": 2},
    "compiled": {"compile": True},
    "all": {"activation_checkpointing": True, "micro_batch_size": 1, "pack_tokens": 40},
}
CASES = [(s, v, w) for w in (1, 2) for s in STRATEGIES for v in VARIANTS if v != "compiled"]


def _is_quick(strategy: str, variant: str, workers: int) -> bool:
    """Everything for two workers under the strategies that differ most, the extremes for the others."""
    wide = workers == 2 and strategy in ("ddp", "fsdp", "zero3")
    return wide or variant in ("plain", "all")


MARKED = [pytest.param(*case, marks=() if _is_quick(*case) else pytest.mark.slow) for case in CASES]


def _lora_of(variant: str) -> Lora | None:
    return LORA if variant in ("lora", "all") else None


def curve(
    folder: Path, strategy: str, variant: str, rank: int, world_size: int
) -> list[dict[str, Any]]:
    """Train in this process, one of several."""
    execution = replace(STRATEGIES[strategy], **VARIANTS[variant])
    chosen, device = recipe(lora=_lora_of(variant)), torch.device("cpu")
    built = create_strategy(Origin(folder=folder), chosen, execution, device)
    workers = Workers(rank=rank, world_size=world_size)
    training = Training(chosen, execution, METHOD, training_rows(), built, device, PAD_ID, workers)
    return [training.step(step) for step in range(training.num_steps)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def curves(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, Any]:
    """Train what tests of this run ask for; a group of workers goes through its cases."""
    asked = {
        tuple(item.callspec.params.values())  # pyright: ignore
        for item in request.session.items
        if item.nodeid.partition("[")[0].endswith("equals_that_of_one_simple_process")
    }
    found: dict[Any, Any] = {}
    for size in (1, 2):
        cases = {
            f"{s}/{v}": {"folder": model, "strategy": s, "variant": v}
            for s, v, w in CASES
            if w == size and (s, v, w) in asked
        }
        results = run_world(size, curve, cases, tmp_path_factory.mktemp("world"))
        found |= {(*name.split("/"), size): value for name, value in results.items()}
    return found


@pytest.fixture(scope="module")
def references(model: Path) -> dict[bool, list[dict[str, float]]]:
    return {
        adapted: reference_curve(model, recipe(lora=LORA if adapted else None))
        for adapted in (False, True)
    }


@pytest.mark.parametrize(("strategy", "variant", "workers"), MARKED)
def test_a_loss_curve_equals_that_of_one_simple_process(
    curves: dict[Any, Any],
    references: dict[bool, list[dict[str, float]]],
    strategy: str,
    variant: str,
    workers: int,
) -> None:
    found = curves.get((strategy, variant, workers), "an earlier case of its group failed")
    assert not isinstance(found, str), found
    expected = references[_lora_of(variant) is not None]
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "task", "replay", "logits", "attention"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), (name, ours)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), ours


@pytest.mark.slow
def test_compiled_layers_give_the_same_curve(
    model: Path, references: dict[bool, list[dict[str, float]]], tmp_path: Path
) -> None:
    case = {"folder": model, "strategy": "ddp", "variant": "compiled"}
    found = run_world(1, curve, {"compiled": case}, tmp_path)["compiled"]
    assert not isinstance(found, str), found
    expected = [step["loss"] for step in references[False]]
    assert [step["loss"] for step in found] == pytest.approx(expected, rel=2e-4)


def test_the_training_learns(references: dict[bool, list[dict[str, float]]]) -> None:
    epoch = STEPS // 5
    for steps in references.values():
        losses = [step["loss"] for step in steps]
        assert sum(losses[-epoch:]) < sum(losses[:epoch])
        assert steps[0]["attention"] > 0.1 and steps[0]["logits"] > 0.003
    assert references[False][-1]["loss"] < 0.8 * references[False][0]["loss"]
