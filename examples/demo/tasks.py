"""The demo's stream: four string tasks that need attention and overwrite one another.

    python -m examples.demo.tasks --out DIR

writes DIR/<task>/{train,test}.jsonl with {"prompt", "answer"} rows. Every task maps a short random
string to another by moving its letters, so all of them compete for the same heads: what one task
moves forward the next moves elsewhere, and a model trained on them one after another forgets. The
rows are a pure function of (seed, task, sizes); no string of a task's test set is in its train set.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LENGTHS = (5, 6, 7, 8)


def reverse(text: str) -> str:
    """abcdef -> fedcba."""
    return text[::-1]


def swap(text: str) -> str:
    """abcdef -> badcfe: neighbours change places, an odd last letter stays."""
    return "".join(text[start : start + 2][::-1] for start in range(0, len(text), 2))


def rotate(text: str) -> str:
    """abcdef -> cdefab: the first two letters go to the end."""
    return text[2:] + text[:2]


def fold(text: str) -> str:
    """abcdef -> afbecd: letters are taken from both ends in turn."""
    return "".join(
        text[step // 2] if step % 2 == 0 else text[-1 - step // 2] for step in range(len(text))
    )


TASKS: dict[str, Callable[[str], str]] = {
    "reverse": reverse,
    "swap": swap,
    "rotate": rotate,
    "fold": fold,
}


def rows(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` rows of a task with distinct strings; fewer rows are a prefix of more."""
    draw = random.Random(f"{seed}/{task}")
    strings: dict[str, None] = {}
    while len(strings) < count:
        strings["".join(draw.choices(ALPHABET, k=draw.choice(LENGTHS)))] = None
    return [{"prompt": f"{task}: {text} = ", "answer": TASKS[task](text)} for text in strings]


def write(out: Path, *, train_rows: int, test_rows: int, seed: int) -> None:
    """Write all tasks. The test rows are drawn first, so they stay when the train set grows."""
    for task in TASKS:
        drawn = rows(task, test_rows + train_rows, seed)
        folder = out / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, part in (("test", drawn[:test_rows]), ("train", drawn[test_rows:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{split}.jsonl").write_text(lines, encoding="ascii")


def main() -> None:
    """Parse the command line and write the tasks."""
    parser = argparse.ArgumentParser(description="Write the demo's string tasks.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write <task>/ into")
    parser.add_argument("--train-rows", type=int, default=1000, help="train rows per task")
    parser.add_argument("--test-rows", type=int, default=100, help="test rows per task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the strings")
    args = parser.parse_args()
    write(args.out, train_rows=args.train_rows, test_rows=args.test_rows, seed=args.seed)
    print(f"wrote {', '.join(TASKS)} to {args.out}")


if __name__ == "__main__":
    main()
