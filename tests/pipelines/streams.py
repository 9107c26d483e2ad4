"""A small whole stream on the disk for tests: a random model, tiny tasks, and the YAML that names
them.

The model is a Llama with grouped-query attention (2 layers, 4 heads, 2 KV heads, hidden 32) and the
byte tokenizer; each task is a rule about short words, with 40 training and 10 test rows. Everything
is a pure function of the arguments, so two folders hold the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from seekr.models import byte_tokenizer, save_model, tiny_llama

NUM_LAYERS, NUM_HEADS = 2, 4
NUM_TRAIN, NUM_TEST = 40, 10
MAX_LENGTH = 48
RULES: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "reverse": lambda word: word[::-1],
    "first": lambda word: word[0],
    "sort": lambda word: "".join(sorted(word)),
    "last": lambda word: word[-1],
}
SEEKR_METHOD = {"name": "seekr", "layer_budget": 1, "head_budget": 2, "query_budget": 8}


def make_stream(
    folder: Path,
    *,
    tasks: int = 2,
    method: Mapping[str, Any] = SEEKR_METHOD,
    **overrides: Any,
) -> Path:
    """Write model, data and YAML into `folder`, and return the path of the YAML.

    Args:
        folder: made when needed; what it holds of an earlier call is written again.
        tasks: how many, at most `len(RULES)`; a longer stream begins with a shorter one's tasks.
        method: the YAML's section.
        overrides: sections and fields of the YAML; a mapping is merged into what is there, so
            `train={"workers": 2}` keeps the other training settings. None removes a section.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    values = stream_values(tasks=tasks, method=method)
    for task in values["tasks"]:
        write_task(folder / "data" / task["name"], task["name"])
    for key, value in overrides.items():
        if value is None:
            values.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(values.get(key), dict):
            values[key] |= value
        else:
            values[key] = value
    values["storage"] = str(folder / values["storage"])
    return write_yaml(folder / "stream.yaml", values)


def stream_values(*, tasks: int = 2, method: Mapping[str, Any] = SEEKR_METHOD) -> dict[str, Any]:
    """Return the YAML of `make_stream` as plain values; paths are relative to its folder."""
    return {
        "name": "small",
        "model": {"path": "model"},
        "method": dict(method),
        "data": {"max_length": MAX_LENGTH, "max_answer_length": 8},
        "tasks": [
            {"name": name, "train": f"data/{name}/train.jsonl", "test": f"data/{name}/test.jsonl"}
            for name in list(RULES)[:tasks]
        ],
        "replay": {"ratio": 0.1},
        "train": {"batch_size": 8, "micro_batch_size": 4, "learning_rate": 0.001},
        "tracking": {"uri": "off"},
        "ray": {"num_cpus": 2},
        "storage": "store",
    }


def make_model(folder: Path, **shape: int) -> Path:
    """Write the random model and its tokenizer; `shape` as in `seekr.models.tiny_llama`."""
    sizes = {"hidden": 32, "layers": NUM_LAYERS, "heads": NUM_HEADS, "max_positions": 64} | shape
    save_model(tiny_llama(**sizes), byte_tokenizer(), folder)
    return folder


def write_task(folder: Path, name: str, *, train: int = NUM_TRAIN, test: int = NUM_TEST) -> None:
    """Write a task's train.jsonl and test.jsonl; no row is in both."""
    rows = task_rows(name, train + test)
    write_rows(folder / "train.jsonl", rows[:train])
    write_rows(folder / "test.jsonl", rows[train:])


def task_rows(name: str, count: int) -> list[dict[str, str]]:
    """Return `count` different rows of a task."""
    source = random.Random(name)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(source.choices("abcdefgh", k=source.randint(3, 6)))] = None
    return [{"input": f"{name} {word}: ", "output": RULES[name](word)} for word in words]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_yaml(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a stream's YAML."""
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    return path
