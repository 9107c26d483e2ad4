"""The 8-bit optimizer: near AdamW, and exact over a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seekr.errors import ConfigError
from seekr.training.build import Origin
from seekr.training.checkpoint import Writer, load_checkpoint, take_snapshot
from seekr.training.loop import Training, Workers
from seekr.training.optimizers import check_optimizer
from seekr.training.settings import Execution
from seekr.training.strategy import create_strategy
from tests.seekr.training.problem import METHOD, PAD_ID, recipe, training_rows, write_model


def training_of(folder: Path, optimizer: str) -> Training:
    chosen = recipe(optimizer=optimizer, warmup_steps=0)
    device = torch.device("cpu")
    strategy = create_strategy(Origin(folder=folder), chosen, Execution(), device)
    rows = training_rows()
    return Training(chosen, Execution(), METHOD, rows, strategy, device, PAD_ID, Workers())


def test_eight_bits_follow_the_float32_optimizer_and_survive_a_restart(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = write_model(tmp_path / "model")
    exact, coarse = training_of(folder, "adamw"), training_of(folder, "adamw_8bit")
    expected = [exact.step(step)["loss"] for step in range(8)]
    found: list[float] = []
    for step in range(8):
        found.append(coarse.step(step)["loss"])
        if step == 3:
            blocks = coarse.strategy.blocks()
            snapshot = take_snapshot(blocks, coarse.strategy.optimizer)
            snapshot.save(tmp_path, Writer(number=0, count=1))
    assert found == pytest.approx(expected, rel=0.03) and found != expected
    kinds = {key.partition("/")[0] for key in snapshot.tensors}
    assert {"master", "state1", "state2", "absmax1", "count"} <= kinds
    again = training_of(folder, "adamw_8bit")
    load_checkpoint(tmp_path, again.strategy.blocks(), again.strategy.optimizer)
    assert [again.step(step)["loss"] for step in range(4, 8)] == found[4:]


def test_eight_bits_under_shards_are_refused() -> None:
    chosen = replace(recipe(), optimizer="adamw_8bit")
    with pytest.raises(ConfigError, match=r"train\.strategy fsdp; blocks of 8-bit state do not"):
        check_optimizer(chosen, "fsdp")
