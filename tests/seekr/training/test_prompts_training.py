"""One task's prompts after another's: what is trained, what is left alone, what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seekr.addition_files import read_added, read_addition
from seekr.methods import METHODS
from seekr.models import load_tokenizer
from seekr.training.build import Origin, addition_after
from seekr.training.export import export_model
from seekr.training.loop import Training, Workers
from seekr.training.settings import Execution
from seekr.training.strategy import Plain
from tests.seekr.training.problem import PAD_ID, recipe, training_rows, write_model

EMBEDDING = "model.embed_tokens.seekr_prompt"


def learn(name: str, task: str, origin: Path, folder: Path) -> Path:
    """Train a task's prompts and write the model."""
    method: Any = METHODS[name].model_validate({"name": name})
    chosen = recipe(epochs=2, addition=method.addition, task=task)
    place, device = Origin(folder=origin), torch.device("cpu")
    execution = Execution(micro_batch_size=6)
    strategy = Plain(place, chosen, execution, device)
    rows = training_rows(replay=False)
    addition = addition_after(place, method.addition, task)
    rows = replace(rows, task=addition.before(rows.task, 258))
    training = Training(chosen, execution, method, rows, strategy, device, PAD_ID, Workers())
    for step in range(training.num_steps):
        training.step(step)
    folder.mkdir()
    export_model(strategy, chosen, place, load_tokenizer(origin), folder, Workers())
    return folder


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_progressive_prompts_leave_earlier_prompts_and_the_model_untouched(
    origin: Path, tmp_path: Path
) -> None:
    first = learn("pp", "first", origin, tmp_path / "first")
    second = learn("pp", "second", first, tmp_path / "second")
    found = read_addition(second)
    assert found is not None and found.tasks == ("first", "second")
    before, after = read_added(first), read_added(second)
    assert before.keys() < after.keys()
    for name, values in before.items():
        assert torch.equal(after[name], values)
    assert not torch.equal(after[f"{EMBEDDING}_1"], after[f"{EMBEDDING}_0"])
    base = load_file(origin / "model.safetensors")
    for folder in (first, second):
        whole = load_file(folder / "model.safetensors")
        assert whole.keys() == base.keys()
        assert all(torch.equal(whole[name], base[name]) for name in base)


def test_a_pool_is_learnt_on_by_every_task(origin: Path, tmp_path: Path) -> None:
    first = learn("l2p", "first", origin, tmp_path / "first")
    second = learn("l2p", "second", first, tmp_path / "second")
    before, after = read_added(first), read_added(second)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.shape == after[name].shape and not torch.equal(values, after[name])
