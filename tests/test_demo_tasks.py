"""The demo's string tasks: the maps themselves, and files that never change or leak."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.demo.pretrain import DRILLS
from examples.demo.tasks import TASKS, rows, write
from seekr.models import load_model, load_tokenizer, model_shape
from seekr.prompts import check_vocabulary

ROOT = Path(__file__).parents[1]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("task", "even", "odd"),
    [
        ("reverse", "fedcba", "edcba"),
        ("swap", "badcfe", "badce"),
        ("rotate", "cdefab", "cdeab"),
        ("fold", "afbecd", "aebdc"),
    ],
)
def test_each_task_moves_letters_as_its_docstring_says(task: str, even: str, odd: str):
    assert TASKS[task]("abcdef") == even
    assert TASKS[task]("abcde") == odd
    assert even in (TASKS[task].__doc__ or "")


def test_no_task_agrees_with_another_on_long_distinct_letters():
    answers = [move("abcdefgh") for move in TASKS.values()]
    assert len(set(answers)) == len(TASKS)


def test_no_demo_task_is_among_the_pretraining_drills():
    import random

    for text in ("abcdefgh", "qwertyu"):
        targets = {move(text) for move in TASKS.values()}
        drilled = {
            drill(text, random.Random(seed))[1] for drill in DRILLS.values() for seed in range(20)
        }
        assert not targets & drilled
    assert not set(TASKS) & set(DRILLS)


def test_files_are_the_same_for_the_same_seed_and_hold_no_test_string_in_train(tmp_path: Path):
    write(tmp_path / "a", train_rows=500, test_rows=100, seed=0)
    write(tmp_path / "b", train_rows=500, test_rows=100, seed=0)
    write(tmp_path / "c", train_rows=500, test_rows=100, seed=1)
    for task in TASKS:
        train, test = (read(tmp_path / "a" / task / f"{name}.jsonl") for name in ("train", "test"))
        assert (len(train), len(test)) == (500, 100)
        prompts = [row["prompt"] for row in train + test]
        assert len(set(prompts)) == 600
        for name in ("train", "test"):
            first, again, other = (
                (tmp_path / copy / task / f"{name}.jsonl").read_bytes() for copy in "abc"
            )
            assert first == again != other


def test_every_answer_is_the_task_applied_to_the_string_in_the_prompt():
    for task, move in TASKS.items():
        for row in rows(task, 50, seed=3):
            text = row["prompt"].removeprefix(f"{task}: ").removesuffix(" = ")
            assert text.isalpha() and row["answer"] == move(text)


def test_fewer_train_rows_are_a_prefix_and_keep_the_test_set(tmp_path: Path):
    write(tmp_path / "small", train_rows=50, test_rows=20, seed=0)
    write(tmp_path / "large", train_rows=90, test_rows=20, seed=0)
    for task in TASKS:
        for name in ("train", "test"):
            small = read(tmp_path / "small" / task / f"{name}.jsonl")
            assert read(tmp_path / "large" / task / f"{name}.jsonl")[: len(small)] == small


def test_the_command_writes_the_stream(tmp_path: Path):
    command = [sys.executable, "-m", "examples.demo.tasks", "--out", str(tmp_path)]
    subprocess.run([*command, "--train-rows", "20", "--test-rows", "5"], check=True, cwd=ROOT)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TASKS)
    assert len(read(tmp_path / "fold" / "train.jsonl")) == 20


def test_the_committed_base_model_loads_and_has_room_for_long_prompts():
    folder = ROOT / "examples" / "tiny-llama"
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    shape = model_shape(model.config)
    assert shape.num_heads > shape.num_kv_heads
    assert model.config.max_position_embeddings >= 1024
    check_vocabulary(tokenizer, model.config)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= 3 * 2**20
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_the_first_rows_of_the_default_stream_never_change():
    text = json.dumps({task: rows(task, 20, seed=0) for task in TASKS}, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6bd44e52a2665f6b"
