"""Tokens per second of our training loop, TRL's SFTTrainer and the plain Hugging Face Trainer.

    python -m benchmarks.train_throughput --out benchmarks/results/train_throughput.json

All are given the same model folder, the same rows in the same batches, the same accumulation, AdamW,
clipping and precision, and train on answers alone, without evaluation, saving or logging. In one
process, each with a model of its own, they take turns of a few optimizer steps, in changing order.
The figure is real tokens (not padding) per second; a ratio is ours over theirs within one turn, and the
median over turns counts. The first turn is not timed: in it the loss and the gradient norm of every
step are held against ours, and in all turns the mean loss and the number of tokens.

    seekr                   our loop        hf, trl                     theirs, padded
    seekr_packed            pack_tokens     trl_padding_free            TRL's padding_free
    seekr_checkpointing     both with activations computed again: hf_checkpointing, trl_checkpointing

`hf_sorted` and `trl_sorted` get each batch longest row first, as our loop orders it by itself: what is
left of the difference is not padding.

Prediction. Two things are saved. Padding: with rows of 32 to 256 tokens in passes of 4 a random order
pads a third of the columns and the sorted one a tenth, so 1.25x. Logits: a third of the tokens are
answers, the head is 2/5 of the products here, and is multiplied 4 times there instead of 3 times
everywhere, so another 1.25x over the plain Trainer. TRL forms logits in tiles as well: on CUDA at answers
alone, so there padding is all that is left, on CPU at all tokens and 4 times. So 1.5x over hf and 1.6x over
trl on CPU, 1.1x to 1.2x over trl on a GPU. Packing spends nothing on padding, and more on attention with a
mask: even with seekr on CPU. Checkpointing takes a third more of all but the head: the same ratios or higher.
Goals: 1.0x on CPU, 1.1x on a GPU, over both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.train_problem import PAD_ID, SHAPES, Problem, Turn, Way
from benchmarks.trainers import Theirs
from seekr.methods import SeqFT
from seekr.training.build import Origin
from seekr.training.loop import Training, Workers
from seekr.training.microbatches import TrainingRows
from seekr.training.settings import DTYPES, Execution, Lora, Recipe
from seekr.training.strategy import create_strategy

RESULT = Path(__file__).parent / "results" / "train_throughput.json"
OURS = ("seekr", "seekr_packed", "seekr_checkpointing")
THEIRS = ("hf", "trl", "hf_checkpointing", "trl_checkpointing")
MORE = ("trl_padding_free", "hf_sorted", "trl_sorted")
PAIRS = {
    "seekr": ("hf", "trl", "hf_sorted", "trl_sorted"),
    "seekr_packed": ("hf", "trl", "trl_padding_free", "seekr"),
    "seekr_checkpointing": ("hf_checkpointing", "trl_checkpointing"),
}
# What rounding may do to a loss and a gradient's norm; above it the ways train differently.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


class Ours:
    """Our loop, without Ray around it."""

    def __init__(self, name: str, problem: Problem) -> None:
        self._problem = problem
        self._execution = Execution(
            micro_batch_size=problem.micro_batch_size,
            pack_tokens=problem.pack_tokens if name == "seekr_packed" else None,
            activation_checkpointing=name == "seekr_checkpointing",
        )
        ids = [row.row_id for row in problem.rows]
        self._rows = TrainingRows(
            task=problem.rows, task_ids=ids, replay=[], replay_ids=[], targets=None
        )
        strategy = create_strategy(
            Origin(folder=problem.folder), problem.recipe, self._execution, problem.device
        )
        method, workers = SeqFT(name="seqft"), Workers()
        arguments = (method, self._rows, strategy, problem.device, PAD_ID, workers)
        self._training = Training(problem.recipe, self._execution, *arguments)

    def take(self, turn: int) -> Turn:
        first = turn * self._problem.steps
        steps = range(first, first + self._problem.steps)
        self._problem.settle()
        started = time.perf_counter()
        entries = [self._training.step(step) for step in steps]
        self._problem.settle()
        seconds = time.perf_counter() - started
        losses = [entry["loss"] for entry in entries]
        return Turn(
            seconds=seconds,
            tokens=sum(entry["tokens"] for entry in entries),
            columns=sum(self._columns(step) for step in steps),
            loss=statistics.mean(losses),
            losses=losses if turn == 0 else [],
            norms=[entry["grad_norm"] for entry in entries] if turn == 0 else [],
        )

    def _columns(self, step: int) -> int:
        settings = self._execution
        passes = self._rows.micro_batches(
            self._training.plan.step(step), 0, 1, settings.micro_batch_size, settings.pack_tokens
        )
        batches = [each.tensors(PAD_ID, torch.device("cpu"))[0] for each in passes]
        return sum(batch.input_ids_BT.numel() for batch in batches)


def measure(ways: dict[str, Way], rounds: int, problem: Problem) -> dict[str, list[Turn]]:
    """Let the ways take turns, in an order that rotates, after one turn that is not timed."""
    check_equal({name: way.take(0) for name, way in ways.items()}, problem)
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(1, rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            turns[name].append(ways[name].take(number))
        check_equal({name: found[-1] for name, found in turns.items()}, problem)
        print(f"round {number} of {rounds}", flush=True)
    return turns


def check_equal(turns: dict[str, Turn], problem: Problem) -> None:
    """Stop unless all ways trained alike: on as many tokens, with the same losses and gradients.

    Adapters are drawn by each library in its own way, and their gradients are not compared.
    """
    dtype = next(name for name, value in DTYPES.items() if value == problem.recipe.dtype)
    near = {"tokens": 0.0} | dict.fromkeys(("loss", "losses", "norms"), TOLERANCE[dtype])
    if problem.recipe.lora is not None:
        del near["norms"]
    reference, *others = turns
    for name in others:
        for what, tolerance in near.items():
            expected, found = getattr(turns[reference], what), getattr(turns[name], what)
            if not np.allclose(found, expected, rtol=tolerance, atol=0.0):
                raise SystemExit(
                    f"{what} of {reference}: {expected}, of {name}: {found}; not equal"
                )


def summary(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Return speed and padding per way, and ratios of ours to theirs within each round."""
    speeds = {name: [each.tokens / each.seconds for each in found] for name, found in turns.items()}
    ways = {
        name: {
            "tokens_per_second": round(statistics.median(speeds[name]), 1),
            "padding": round(1 - sum(t.tokens for t in found) / sum(t.columns for t in found), 3),
            "seconds": [round(turn.seconds, 4) for turn in found],
        }
        for name, found in turns.items()
    }
    ratios: list[dict[str, Any]] = []
    for own, others in PAIRS.items():
        for other in others:
            if own in speeds and other in speeds:
                each = [a / b for a, b in zip(speeds[own], speeds[other], strict=True)]
                low, high = round(min(each), 3), round(max(each), 3)
                middle = round(statistics.median(each), 3)
                ratios.append({"of": own, "to": other, "ratio": middle, "min": low, "max": high})
    return {"ways": ways, "ratios": ratios}


def show(found: dict[str, Any]) -> None:
    """Print speeds and ratios as tables."""
    speeds = Table("way", "tokens/s", "padding")
    for name, way in found["ways"].items():
        speeds.add_row(name, f"{way['tokens_per_second']:.0f}", f"{way['padding']:.0%}")
    ratios = Table("ours", "theirs", "ratio", "spread")
    for row in found["ratios"]:
        spread = f"{row['min']:.2f}..{row['max']:.2f}"
        ratios.add_row(row["of"], row["to"], f"{row['ratio']:.2f}", spread)
    Console().print(speeds, ratios)


def problem_of(args: argparse.Namespace, folder: Path) -> Problem:
    """Write the model and draw the rows."""
    shape = SHAPES[args.shape]
    shape.write(folder / "model", args.device)
    recipe = Recipe(
        epochs=args.rounds + 1,
        batch_size=args.batch_size,
        learning_rate=1e-5,
        lora=Lora(rank=args.lora, alpha=2.0 * args.lora) if args.lora else None,
        dtype=DTYPES[args.dtype],
    )
    return Problem(
        folder=folder / "model",
        rows=shape.rows(args.batch_size * args.steps),
        recipe=recipe,
        steps=args.steps,
        micro_batch_size=args.micro_batch_size,
        pack_tokens=args.pack_tokens or 2 * shape.longest,
        device=torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu"),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on cpu, else bfloat16")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument(
        "--ways", nargs="+", choices=[*OURS, *THEIRS, *MORE], default=[*OURS, *THEIRS]
    )
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--pack-tokens", type=int, help="default: two of the longest rows")
    parser.add_argument(
        "--lora", type=int, default=0, help="rank of adapters; 0 trains all weights"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.batch_size % args.micro_batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def main() -> None:
    args = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="seekr-throughput-") as name:
        folder = Path(name)
        problem = problem_of(args, folder)
        ways: dict[str, Way] = {
            way: Ours(way, problem) if way in OURS else Theirs(way, problem, folder)
            for way in args.ways
        }
        found = summary(measure(ways, args.rounds, problem))
    show(found)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "ways")}
    settings |= {"threads": torch.get_num_threads(), "pack_tokens": problem.pack_tokens}
    result = describe() | settings | {"model": asdict(SHAPES[args.shape])} | found
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
