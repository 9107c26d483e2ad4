"""The tasks: maps of a short random string to another that compete for the same heads.

All take the same kind of input, so nothing but the instruction in front of it tells them apart, and all
move letters, which is what attention does. None of them is among the drills that the base model was
trained on. Rows are a pure function of (seed, task, sizes); a string of a test set is never in the train
set of its task.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from examples.demo.tasks import ALPHABET, fold, reverse, rotate, swap

LENGTHS = (4, 5, 6)


def deal(text: str) -> str:
    """abcdefg -> acegbdf: every other letter, then the rest."""
    return text[::2] + text[1::2]


def cut(text: str) -> str:
    """abcdefg -> defgabc: the halves change places, the second with the middle letter."""
    half = len(text) // 2
    return text[half:] + text[:half]


TASKS: dict[str, Callable[[str], str]] = {
    "reverse": reverse,
    "swap": swap,
    "rotate": rotate,
    "fold": fold,
    "deal": deal,
    "cut": cut,
}
ORDERS = {
    "1": ("reverse", "swap", "rotate", "fold", "deal", "cut"),
    "2": ("cut", "fold", "swap", "deal", "reverse", "rotate"),
}
TEMPLATE = "{task}: {{input}} = "


def rows(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` rows with distinct strings; fewer rows are a prefix of more."""
    draw = random.Random(f"retention/{seed}/{task}")
    strings: dict[str, None] = {}
    while len(strings) < count:
        strings["".join(draw.choices(ALPHABET, k=draw.choice(LENGTHS)))] = None
    return [{"input": text, "output": TASKS[task](text)} for text in strings]


def write(folder: Path, *, train_rows: int, test_rows: int, seed: int) -> None:
    """Write `folder/<task>/{train,test}.jsonl`, test rows first drawn."""
    for task in TASKS:
        drawn = rows(task, test_rows + train_rows, seed)
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, part in (("test", drawn[:test_rows]), ("train", drawn[test_rows:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / task / f"{split}.jsonl").write_text(lines, encoding="ascii")
