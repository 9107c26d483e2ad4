"""A training that goes on elsewhere: another strategy, another number of workers, the same training.

Every case saves after step 5 of 12 and goes on in fresh objects. What is loaded is equal to the bit to
what was saved: masters, both of AdamW's means, its count. Going on under the same strategy with as many
workers gives the same bits as never having stopped. Elsewhere sums are taken in another order: losses
agree within 2e-4 of themselves, the tolerance of `test_curves`; under bfloat16 passes within 2e-2.

The moves that are tried first begin and end everywhere; those from everywhere to everywhere are slow.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seekr.errors import StoreError
from seekr.training.build import Origin, file_name
from seekr.training.checkpoint import (
    Shards,
    Snapshot,
    Writer,
    check_masters,
    load_checkpoint,
    take_snapshot,
    writer_of,
)
from seekr.training.loop import Training, Workers
from seekr.training.ranges import check_equal
from seekr.training.settings import Execution, Recipe
from seekr.training.strategy import Strategy, create_strategy
from tests.seekr.training.problem import (
    LORA,
    METHOD,
    PAD_ID,
    recipe,
    training_rows,
    write_model,
)
from tests.seekr.training.worlds import run_world

EPOCHS, STEPS, SAVED_AT = 3, 12, 5
STRATEGIES = {
    "ddp": Execution(strategy="ddp"),
    "fsdp": Execution(strategy="fsdp"),
    "zero1": Execution(strategy="deepspeed", zero_stage=1),
    "zero2": Execution(strategy="deepspeed", zero_stage=2),
    "zero3": Execution(strategy="deepspeed", zero_stage=3),
}
# (strategy, workers) of the saved training.
ORIGINS = [(strategy, size) for size in (1, 2) for strategy in STRATEGIES]
# What is trained: everything in float32, everything under bfloat16 passes, adapters.
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "adapters": {"lora": LORA},
}
RING = list(zip(STRATEGIES, [*list(STRATEGIES)[1:], "ddp"], strict=True))
Move = tuple[str, str, int, str, int]
FIRST: list[Move] = [
    *(("full", name, 2, name, 2) for name in STRATEGIES),
    *(("full", name, 1, name, 1) for name in ("ddp", "zero3")),
    *(("full", one, 2, other, 1) for one, other in RING),
    *(("full", one, 1, other, 2) for one, other in RING),
    ("bfloat16", "fsdp", 2, "fsdp", 2),
    ("bfloat16", "zero3", 2, "zero3", 2),
    ("bfloat16", "fsdp", 2, "zero3", 1),
    ("adapters", "fsdp", 2, "zero3", 2),
]
ALL: list[Move] = [
    *(("full", *origin, *goal) for origin in ORIGINS for goal in ORIGINS),
    *(("bfloat16", name, 2, name, 2) for name in STRATEGIES),
    *(("bfloat16", one, 2, other, 1) for one, other in RING),
    *(("adapters", name, 2, name, 2) for name in STRATEGIES),
    *(("adapters", one, 1, other, 2) for one, other in RING),
]


def build(model: Path, kind: str, strategy: str) -> Strategy:
    return create_strategy(
        Origin(folder=model), recipe_of(kind), STRATEGIES[strategy], torch.device("cpu")
    )


def recipe_of(kind: str) -> Recipe:
    return recipe(epochs=EPOCHS, **KINDS[kind])


def write(built: Strategy, folder: Path) -> None:
    """Write a checkpoint; called on all workers."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = built.blocks()
    take_snapshot(blocks, built.optimizer).save(folder, writer_of(blocks))
    if dist.is_initialized():
        dist.barrier()


def read(built: Strategy, folder: Path) -> None:
    """Load a checkpoint as a worker does."""
    load_checkpoint(folder, built.blocks(), built.optimizer)
    built.refresh()
    check_masters(folder, built.blocks())


def train(
    model: Path,
    kind: str,
    strategy: str,
    rank: int,
    world_size: int,
    *,
    origin: Path | None = None,
    out: Path,
) -> list[dict[str, Any]]:
    """Train to the end, from `origin` if given, and write checkpoints into `out`."""
    built = build(model, kind, strategy)
    execution, chosen = STRATEGIES[strategy], recipe_of(kind)
    workers = Workers(rank=rank, world_size=world_size)
    rows, device = training_rows(), torch.device("cpu")
    training = Training(chosen, execution, METHOD, rows, built, device, PAD_ID, workers)
    first = 0
    if origin is not None:
        read(built, origin)
        write(built, out / "loaded")
        first = SAVED_AT
    curve: list[dict[str, Any]] = []
    for step in range(first, training.num_steps):
        if step == SAVED_AT and origin is None:
            write(built, out / "middle")
        curve.append(training.step(step))
    write(built, out / "end")
    return curve


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def run_all(
    cases: dict[str, tuple[int, dict[str, Any]]], folder: Path
) -> dict[str, list[dict[str, Any]] | str]:
    """Run cases, each in its number of processes."""
    found: dict[str, Any] = {}
    for size in (1, 2):
        mine = {name: case for name, (wanted, case) in cases.items() if wanted == size}
        found |= run_world(size, train, mine, folder / f"world-{size}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainings:
    """Trainings that were never stopped and those that went on elsewhere: curves and checkpoints."""

    folder: Path
    curves: dict[str, list[dict[str, Any]] | str]

    def curve(self, name: str) -> list[dict[str, Any]]:
        found = self.curves.get(name, "an earlier case of its group failed")
        assert isinstance(found, list), found
        return found


def train_all(model: Path, moves: list[Move], folder: Path) -> Trainings:
    common = {"model": model}
    whole = {
        title(origin): (
            int(origin[2]),
            common | {"kind": origin[0], "strategy": origin[1], "out": folder / title(origin)},
        )
        for origin in sorted({move[:3] for move in moves})
    }
    curves = run_all(whole, folder)
    resumed = {
        title(move): (
            move[4],
            common
            | {"kind": move[0], "strategy": move[3], "out": folder / title(move)}
            | {"origin": folder / title(move[:3]) / "middle"},
        )
        for move in moves
    }
    return Trainings(folder=folder, curves=curves | run_all(resumed, folder))


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return train_all(model, FIRST, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def everywhere(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return train_all(model, ALL, tmp_path_factory.mktemp("all"))


def title(move: tuple[Any, ...]) -> str:
    return "-".join(map(str, move))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, joined from its pieces, flat."""
    sizes: dict[str, int] = {}
    for index in folder.glob("*.json"):
        for key, entry in json.loads(index.read_text()).items():
            sizes[key] = max(sizes.get(key, 0), entry["start"] + entry["length"])
    shards = Shards(folder)
    return {key: shards.read(key, 0, size) for key, size in sizes.items()}


def same(one: Path, other: Path) -> bool:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("move", FIRST, ids=title)
def test_a_training_goes_on_elsewhere_with_the_state_it_had(first: Trainings, move: Move) -> None:
    check_move(first, move)


@pytest.mark.slow
@pytest.mark.parametrize("move", ALL, ids=title)
def test_a_training_goes_on_from_everywhere_to_everywhere(
    everywhere: Trainings, move: Move
) -> None:
    check_move(everywhere, move)


def check_move(found: Trainings, move: Move) -> None:
    origin, folder = title(move[:3]), found.folder
    before, after = found.curve(origin), found.curve(title(move))
    assert same(folder / origin / "middle", folder / title(move) / "loaded")
    assert len(before) == STEPS
    assert [entry["step"] for entry in after] == list(range(SAVED_AT, STEPS))
    if move[1:3] == move[3:5]:
        numbers = ("loss", "task", "replay", "logits", "attention", "grad_norm")
        for ours, theirs in zip(after, before[SAVED_AT:], strict=True):
            assert {n: ours[n] for n in numbers} == {n: theirs[n] for n in numbers}
        assert same(folder / origin / "end", folder / title(move) / "end")
        return
    tolerance = 2e-2 if move[0] == "bfloat16" else 2e-4
    for ours, theirs in zip(after, before[SAVED_AT:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)


def test_a_checkpoint_holds_weights_and_all_of_adamws_state_once(first: Trainings) -> None:
    found = {
        origin: tensors(first.folder / title(("full", *origin)) / "middle") for origin in ORIGINS
    }
    names = {key.partition("/")[0] for key in found["ddp", 1]}
    assert names == {"master", "exp_avg", "exp_avg_sq", "step"}
    for origin, values in found.items():
        assert values.keys() == found["ddp", 1].keys(), origin
        assert all(v.item() == SAVED_AT for k, v in values.items() if k.startswith("step/"))
    writers = {
        name: len(list((first.folder / f"full-{name}-2/middle").glob("*.safetensors")))
        for name in STRATEGIES
    }
    assert writers == {"ddp": 1, "fsdp": 2, "zero1": 2, "zero2": 2, "zero3": 2}


@pytest.fixture
def saved(first: Trainings, tmp_path: Path) -> Path:
    """A copy of a checkpoint that two workers have written."""
    return Path(shutil.copytree(first.folder / "full-fsdp-2/middle", tmp_path / "step-5-abc"))


SECOND = "shard-00001-of-00002"
Damage = Callable[[Path], Any]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no weights": (lambda f: (f / f"{SECOND}.safetensors").unlink(), f"{SECOND}.safetensors"),
    "no index": (lambda f: (f / f"{SECOND}.json").unlink(), f"{SECOND}.json"),
    "neither": (
        lambda f: [(f / f"{SECOND}{end}").unlink() for end in (".json", ".safetensors")],
        f"{SECOND}.json, {SECOND}.safetensors are missing",
    ),
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], "shard-00000-of-00001.json"),
    "half of the weights": (lambda f: _cut(f / f"{SECOND}.safetensors"), f"{SECOND}.safetensors"),
    "half of the index": (lambda f: _cut(f / f"{SECOND}.json"), f"{SECOND}.json"),
    "an index of something else": (
        lambda f: (f / f"{SECOND}.json").write_text('{"a": 1}'),
        f"{SECOND}.json",
    ),
    "a tensor less": (lambda f: _drop(f / f"{SECOND}.json"), "numbers of exp_avg/"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _drop(index: Path) -> None:
    entries = json.loads(index.read_text())
    del entries[min(entries)]
    index.write_text(json.dumps(entries))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(
    model: Path, saved: Path, damage: str
) -> None:
    hurt, told = DAMAGES[damage]
    hurt(saved)
    built = build(model, "full", "ddp")
    with pytest.raises(StoreError) as refused:
        read(built, saved)
    text = str(refused.value)
    assert saved.name in text and told in text
    assert "remove the stage's checkpoints folder" in text


def test_files_of_another_group_of_writers_do_not_pass_for_a_whole_checkpoint(
    model: Path, saved: Path
) -> None:
    built = build(model, "full", "ddp")
    blocks = built.blocks()
    take_snapshot(blocks, built.optimizer).save(saved, Writer(number=0, count=3))
    with pytest.raises(StoreError, match=r"shard-00001-of-00003\.json"):
        read(built, saved)


def test_masters_that_are_not_what_the_checkpoint_holds_are_found(model: Path, saved: Path) -> None:
    built = build(model, "full", "ddp")
    read(built, saved)
    block = next(block for block in built.blocks() if "down_proj" in block.name)
    with torch.no_grad():
        number = block.part(block.master)[17:18]
        number += 1e-6 * number.abs().clamp(min=1e-3)
    with pytest.raises(StoreError, match=rf"{block.name} differ.*first at number 17;"):
        check_masters(saved, built.blocks())


def test_masters_that_are_not_what_the_model_file_holds_are_found(model: Path) -> None:
    built = build(model, "full", "ddp")
    blocks = {block.name: block for block in built.blocks()}
    block = blocks["model.layers.0.self_attn.q_proj.weight"]

    def check() -> None:
        name, values = file_name(block.name), block.part(block.master)
        check_equal(built.source, name, block.start, values, "master weights")

    check()
    with torch.no_grad():
        block.part(block.master)[3] = float("nan")
    with pytest.raises(StoreError, match=r"q_proj\.weight differ.*first at number 3;"):
        check()


def test_a_snapshot_does_not_follow_the_training(model: Path, tmp_path: Path) -> None:
    built = build(model, "full", "ddp")
    snapshot: Snapshot = take_snapshot(built.blocks(), built.optimizer)
    before = {key: value.clone() for key, value in snapshot.tensors.items()}
    with torch.no_grad():
        for block in built.blocks():
            block.part(block.master).zero_()
    assert all(torch.equal(snapshot.tensors[key], value) for key, value in before.items())
