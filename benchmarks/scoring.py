"""What scoring heads costs on top of the passes through the models that it needs.

    python -m benchmarks.scoring --out benchmarks/results/scoring.json

Two random Llamas and one row at a time. `scoring` is `score_batch`. `plain` is one forward and
backward of the model after the task, down to the embeddings, and one forward of the model before,
through the same attention and without probes. `lean` is `plain` without the logits that no answer
needs, which scoring leaves out as well: against it stands what the probes alone cost. The three run
in turn in one process; times are medians over the rounds. Peak memory is the growth of a fresh
process over its size with models and libraries loaded. Actors are Ray actors with one thread each.

Prediction: gradient sums cost next to nothing. A layer's two maps cost half of what SDPA's four
products of the forward passes and its five of the backward do, so the share grows with the row
towards 2/9: below 1.10 up to 4096 tokens. Extra memory is the probes' blocks, linear in the row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.machine import OWN_PAGES, describe, peak_memory, reset_peak_memory
from seekr.attention import register, token_positions
from seekr.collation import IGNORE_LABEL, Batch, collate
from seekr.importance import score_batch
from seekr.losses import answer_nll, answer_positions
from seekr.prompts import TokenizedRow
from seekr.sampling import query_positions
from seekr.teacher import place_positions

GOAL_RATIO = 1.10
ANSWER, QUERIES = 64, 100
WAYS = ("plain", "lean", "scoring")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The two models."""

    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    width: int = 512
    intermediate: int = 1376
    vocabulary: int = 4096

    def build(self, seed: int) -> PreTrainedModel:
        """Return a random model in float32; the same seed gives the same weights."""
        register()
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=1 << 14,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="seekr").eval()
        return model.requires_grad_(False)


class Bench:
    """Two models and the ways to take a row through them."""

    def __init__(self, shape: Shape, threads: int) -> None:
        torch.set_num_threads(threads)
        self._shape = shape
        self._before, self._after = shape.build(1), shape.build(0)

    def way(self, name: str, tokens: int) -> Callable[[], object]:
        """Return one of WAYS for a row of so many tokens."""
        batch = self._row(tokens)
        if name == "scoring":
            positions = query_positions(0, batch.row_ids[0], tokens, QUERIES)
            placed_BQ = place_positions([positions], batch)
            return lambda: score_batch(self._before, self._after, batch, placed_BQ)
        return lambda: self._passes(batch, lean=name == "lean")

    def _row(self, tokens: int) -> Batch:
        ids = np.random.default_rng(tokens).integers(1, self._shape.vocabulary, size=tokens)
        row = TokenizedRow(
            row_id=f"row-{tokens}",
            input="",
            references=("",),
            input_ids=ids.astype(np.int32),
            prompt_length=tokens - ANSWER,
        )
        return collate([row], pad_id=0)

    def _passes(self, batch: Batch, *, lean: bool) -> None:
        """One forward, backward to the embeddings, and forward of the other model."""
        embeds = self._after.get_input_embeddings()(batch.input_ids_BT).requires_grad_()
        common = {
            "attention_mask": batch.attention_mask_BT,
            "position_ids": token_positions(batch.attention_mask_BT),
            "use_cache": False,
        }
        labels_BT, kept_T = batch.labels_BT, answer_positions(batch.labels_BT)[1]
        if lean:
            labels_BT = functional.pad(labels_BT[:, kept_T + 1], (1, 0), value=IGNORE_LABEL)
        keep = {"logits_to_keep": kept_T} if lean else {}
        logits_BTV = self._after(inputs_embeds=embeds, **common, **keep).logits
        nll_B, count_B = answer_nll(logits_BTV, labels_BT)
        torch.autograd.grad((nll_B / count_B).sum(), embeds)
        keep = {"logits_to_keep": 1} if lean else {}
        with torch.no_grad():
            self._before(input_ids=batch.input_ids_BT, **common, **keep)


def measure_time(bench: Bench, tokens: int, rounds: int) -> dict[str, Any]:
    """Run every way in turn, `rounds` times after one that does not count; seconds and ratios."""
    ways = {name: bench.way(name, tokens) for name in WAYS}
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for index in range(rounds + 1):
        for name in WAYS[index % 3 :] + WAYS[: index % 3]:
            start = time.perf_counter()
            ways[name]()
            if index:
                taken[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "tokens": tokens,
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "over_plain": round(medians["scoring"] / medians["plain"], 3),
        "over_lean": round(medians["scoring"] / medians["lean"], 3),
        "rounds": {name: [round(value, 4) for value in times] for name, times in taken.items()},
    }


def measure_memory(tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the peak growth of each way in MiB, in a process of its own."""
    peaks: dict[str, float] = {}
    for name in WAYS:
        command = [sys.executable, "-m", "benchmarks.scoring", "--peak-of", name]
        command += ["--tokens", str(tokens), "--kv-heads", str(args.kv_heads)]
        command += ["--threads", str(args.threads)]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | OWN_PAGES
        )
        peaks[name] = float(done.stdout)
    extra = peaks["scoring"] - peaks["lean"]
    return {
        "tokens": tokens,
        "peak_mib": {name: round(value, 1) for name, value in peaks.items()},
        "extra_over_lean_mib": round(extra, 1),
        "extra_kib_per_token": round(extra * 1024 / tokens, 2),
    }


def peak_growth(bench: Bench, name: str, tokens: int) -> float:
    """Return by how many MiB a process grows at most while a row goes one way."""
    bench.way(name, 2 * ANSWER)()  # what libraries allocate once
    run = bench.way(name, tokens)
    reset_peak_memory()
    start = peak_memory()
    run()
    return (peak_memory() - start) / (1 << 20)


class _Scorer:
    """An actor with two models and one thread."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        self._score = Bench(shape, threads=1).way("scoring", tokens)
        self._score()

    def ready(self) -> None:
        """Return when the models are warm."""

    def run(self, rows: int) -> None:
        """Score so many rows."""
        for _ in range(rows):
            self._score()


def measure_actors(shape: Shape, tokens: int, rows: int) -> list[dict[str, Any]]:
    """Return rows per second of one and of two actors that share the rows."""
    found: list[dict[str, Any]] = []
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        actor_class: Any = ray.remote(num_cpus=1)(_Scorer)
        for count in (1, 2):
            actors = [actor_class.remote(shape, tokens) for _ in range(count)]
            ray.get([actor.ready.remote() for actor in actors])
            start = time.perf_counter()
            ray.get([actor.run.remote(rows // count) for actor in actors])
            rate = rows / (time.perf_counter() - start)
            found.append({"actors": count, "tokens": tokens, "rows_per_second": round(rate, 3)})
            for actor in actors:
                ray.kill(actor)
    finally:
        ray.shutdown()
    return found


def show(found: dict[str, Any]) -> None:
    """Print the figures as tables."""
    console = Console(width=110)
    table = Table("tokens", *(f"{name} s" for name in WAYS), "/ plain", "/ lean", title="time")
    for row in found["time"]:
        seconds = [f"{row['seconds'][name]:.3f}" for name in WAYS]
        ratios = (f"{row['over_plain']:.3f}", f"{row['over_lean']:.3f}")
        table.add_row(str(row["tokens"]), *seconds, *ratios)
    console.print(table)
    extra = ("scoring - lean", "KiB per token")
    table = Table("tokens", *(f"{name} MiB" for name in WAYS), *extra, title="peak memory")
    for row in found["memory"]:
        peaks = [f"{row['peak_mib'][name]:.0f}" for name in WAYS]
        more = (f"{row['extra_over_lean_mib']:.1f}", f"{row['extra_kib_per_token']:.1f}")
        table.add_row(str(row["tokens"]), *peaks, *more)
    console.print(table)
    table = Table("actors", "tokens", "rows/s", title="throughput")
    for row in found["actors"]:
        table.add_row(*(str(row[name]) for name in ("actors", "tokens", "rows_per_second")))
    console.print(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Measure what scoring heads costs.")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--memory-tokens", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--actor-tokens", type=int, default=512)
    parser.add_argument("--actor-rows", type=int, default=12, help="0: no actors; else even")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak-of", choices=WAYS, help="print MiB for the first of --tokens")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape = Shape(kv_heads=args.kv_heads)
    if args.peak_of:
        print(peak_growth(Bench(shape, args.threads), args.peak_of, args.tokens[0]))
        return
    memory = [measure_memory(tokens, args) for tokens in args.memory_tokens]
    bench = Bench(shape, args.threads)
    found: dict[str, Any] = {
        **describe(),
        "threads": args.threads,
        "shape": asdict(shape),
        "goal_over_plain": GOAL_RATIO,
        "time": [measure_time(bench, tokens, args.rounds) for tokens in args.tokens],
        "memory": memory,
        "actors": (
            measure_actors(shape, args.actor_tokens, args.actor_rows) if args.actor_rows else []
        ),
    }
    show(found)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
