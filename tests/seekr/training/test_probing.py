"""Facts asked under way: the same figures on any workers, and a training that does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from seekr.fact_probes import Probe, score_probes
from seekr.methods import METHODS
from seekr.models import load_model
from seekr.training.build import Origin
from seekr.training.loop import Training, Workers
from seekr.training.probing import Probing
from seekr.training.settings import Execution
from seekr.training.strategy import create_strategy
from tests.seekr.training.problem import LORA, PAD_ID, recipe, training_rows, write_model
from tests.seekr.training.worlds import run_world

DEVICE = torch.device("cpu")
STEPS = 4
EXECUTIONS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "zero2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
}
# Workers, strategy, dropout of adapters. DeepSpeed draws like the others: once is enough.
CASES = [
    *((1, "ddp", dropout) for dropout in (0.0, 0.3)),
    *((2, name, dropout) for name in ("ddp", "fsdp") for dropout in (0.0, 0.3)),
    *((2, name, 0.0) for name in ("zero2", "zero3")),
]
# One probe for two workers; more than a batch of them, of uneven length.
SETS = {"lone": 1, "many": 7}


def probes() -> dict[str, list[Probe]]:
    draw = np.random.default_rng(5)
    found: dict[str, list[Probe]] = {}
    for name, count in SETS.items():
        found[name] = []
        for index in range(count):
            length = int(draw.integers(5, 20))
            first = int(draw.integers(1, length))
            found[name].append(
                Probe(
                    row_id=f"{name}-{index}",
                    input_ids=draw.integers(2, 258, size=length).astype(np.int32),
                    positions=np.arange(first, min(length, first + 3)),
                )
            )
    return found


def train(
    folder: Path, strategy: str, asked: bool, dropout: float, rank: int, world_size: int
) -> tuple[list[float], list[dict[str, float]], dict[str, Tensor]]:
    """Train four steps; returns losses, what probes say before and after each, and the weights."""
    lora = LORA if not dropout else type(LORA)(rank=4, alpha=8.0, dropout=dropout)
    chosen = recipe(epochs=1, lora=lora if dropout else None)
    execution = Execution(micro_batch_size=2, **EXECUTIONS[strategy])
    built = create_strategy(Origin(folder=folder), chosen, execution, DEVICE)
    workers = Workers(rank=rank, world_size=world_size)
    method = METHODS["seqft"].model_validate({"name": "seqft"})
    training = Training(
        chosen, execution, method, training_rows(replay=False), built, DEVICE, PAD_ID, workers
    )
    probing = Probing(probes(), built, workers, batch_size=3, pad_id=PAD_ID, device=DEVICE)
    said = [probing.scores("probes")] if asked else []
    losses = []
    for step in range(STEPS):
        losses.append(training.step(step)["loss"])
        if asked:
            said.append(probing.scores("probes"))
            modules = list(built.module.modules())
            assert all(module.training for module in modules)
            sharded = [m for m in modules if isinstance(m, FSDPModule)]
            assert len(sharded) == (3 if strategy == "fsdp" else 0)
            held = [p for module in sharded for p in module.parameters()]
            assert all(isinstance(parameter, DTensor) for parameter in held)
    names = [name for name, _ in built.model.named_parameters()]
    weights = {name: built.whole(name).clone() for name in names}
    return losses, said, weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], Any]:
    results: dict[tuple[Any, ...], Any] = {}
    for workers in (1, 2):
        keys = [(s, asked, d) for size, s, d in CASES if size == workers for asked in (True, False)]
        cases = {
            f"{s}/{asked}/{d}": {"folder": model, "strategy": s, "asked": asked, "dropout": d}
            for s, asked, d in keys
        }
        of_world = run_world(workers, train, cases, tmp_path_factory.mktemp("world"))
        for (s, asked, d), result in zip(keys, of_world.values(), strict=True):
            assert not isinstance(result, str), result
            results[workers, s, asked, d] = result
    return results


def test_before_the_first_step_probes_say_what_the_model_on_disk_says(
    found: dict[tuple[Any, ...], Any], model: Path
) -> None:
    loaded = load_model(model, dtype=torch.float32, attention="sdpa")
    first = found[1, "ddp", True, 0.0][1][0]
    assert first.keys() == {f"probes.{n}.{kind}" for n in SETS for kind in ("accuracy", "nll")}
    for name, own in probes().items():
        accuracy, nll = score_probes(loaded, own, batch_size=2, pad_id=PAD_ID, device="cpu")
        assert first[f"probes.{name}.accuracy"] == pytest.approx(accuracy.mean(), abs=1e-12)
        assert first[f"probes.{name}.nll"] == pytest.approx(nll.mean(), rel=1e-6)


@pytest.mark.parametrize("strategy", EXECUTIONS)
def test_two_workers_say_what_one_says(found: dict[tuple[Any, ...], Any], strategy: str) -> None:
    one, two = found[1, "ddp", True, 0.0][1], found[2, strategy, True, 0.0][1]
    assert len(one) == len(two) == STEPS + 1
    for index, (ours, theirs) in enumerate(zip(two, one, strict=True)):
        assert ours.keys() == theirs.keys()
        # After a step the weights themselves differ, by the order in which gradients are added.
        near = 1e-6 if index == 0 else 1e-4
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=near, abs=1e-9), (index, name)
    assert one[0] != one[-1]


@pytest.mark.parametrize(("size", "strategy", "dropout"), CASES)
def test_a_training_that_is_asked_takes_the_same_steps_to_the_bit(
    found: dict[tuple[Any, ...], Any], size: int, strategy: str, dropout: float
) -> None:
    asked, alone = (found[size, strategy, asked, dropout] for asked in (True, False))
    assert asked[0] == alone[0] and alone[1] == []
    assert asked[2].keys() == alone[2].keys()
    for name, value in asked[2].items():
        assert torch.equal(value, alone[2][name]), name
