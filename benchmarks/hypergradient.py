"""What the gradient of Train-Attention costs, three ways (`python -m benchmarks.hypergradient`).

One episode of one document and a task of 32 tokens, one dummy step. theta and phi are the same small
Llama with adapters of rank 8 on all linear layers, in float32. Each way is timed beside `plain`, in
turn in one process:

    plain      two training steps of theta, and a forward and backward of phi: what any way has to do
    unrolled   differentiates through the last step, attention in its plain form there
    jvp        one directional derivative by forward differentiation, attention in its plain form there
    central    the same by central differences, attention fused everywhere

Times are those of the processor, so that whatever else runs on the machine bears less on them. Memory
is the peak of a process that does nothing else, with what it held before the episode taken off.

Predictions, in forward passes over the document, a backward pass under adapters counting as one: plain
takes 6. `central` adds two: 1.3x. `jvp` adds a pass with twice the work and slower attention: 1.4x.
`unrolled` adds a backward pass through a forward and a backward: 1.5x. The last two rise with the
length. Memory: `unrolled` keeps the graph of both and maps of all layers, which grow with the square of
the length: 2x at 128 tokens, 3x at 512. `jvp` and `central` keep no graph in their extra passes: 1.1x
at most. (One round at 128 tokens, with all weights trained, had been seen: 1.69x, 1.65x and 1.12x.)
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.machine import OWN_PAGES, describe, peak_memory, reset_peak_memory
from seekr.prompts import TokenizedRow
from seekr.taalm.adapters import add_adapters
from seekr.taalm.episodes import Episode, MetaItem, collate_items
from seekr.taalm.hypergradient import InnerLoop, hypergradient
from seekr.taalm.inner import AdamState, AdamW, gradients, trained_parameters, weighted_step
from seekr.taalm.network import TrainAttention
from seekr.training.settings import Lora

WAYS = ("plain", "unrolled", "jvp", "central")
RESULT = Path(__file__).parent / "results" / "hypergradient.json"
VOCABULARY, TASK_TOKENS = 4096, 32
OPTIMIZER = AdamW(damping=1e-8)
LORA = Lora(rank=8, alpha=16.0)


def build(seed: int) -> Any:
    """Return a random Llama of 4 layers, 8 heads of which pairs share keys, width 256."""
    torch.manual_seed(seed)
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def episode(tokens: int) -> Episode:
    """Return one document of this length and its task, random tokens."""
    draw = np.random.default_rng(1)
    document, task = (_row(draw.integers(1, VOCABULARY, size=n)) for n in (tokens, TASK_TOKENS))
    mask = np.arange(TASK_TOKENS) >= TASK_TOKENS - 4
    return collate_items([MetaItem(document=document, task=task, object_mask_T=mask)], pad_id=0)


def _row(ids: Any) -> TokenizedRow:
    return TokenizedRow(
        row_id="row", input="", references=("",), input_ids=ids.astype(np.int32), prompt_length=1
    )


def step_of(way: str, tokens: int) -> Callable[[], None]:
    """Return what is timed: one episode, this way."""
    theta, seen = build(0), episode(tokens)
    add_adapters(theta, LORA, "theta")
    phi = TrainAttention(build(1).base_model, LORA)
    if way == "plain":
        return lambda: _plain(theta, phi, seen)
    backend: Any = way
    settings = InnerLoop(optimizer=OPTIMIZER, dummy_steps=1, backend=backend)

    def step() -> None:
        hypergradient(theta, phi, seen, settings)

    return step


def _plain(theta: Any, phi: TrainAttention, seen: Episode) -> None:
    weights_BT = phi(seen.documents)
    params = trained_parameters(theta)
    state = AdamState.zeros(params)
    for _ in range(2):
        params, state = weighted_step(theta, params, state, seen.documents, weights_BT, OPTIMIZER)
    gradients(weights_BT.sum(), {n: p for n, p in phi.named_parameters() if p.requires_grad})


def measure(tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds per way, in turn and in changing order, after one warm-up of each."""
    steps = {way: step_of(way, tokens) for way in WAYS}
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        for way in WAYS if turn % 2 else reversed(WAYS):
            start = time.process_time()
            steps[way]()
            if turn:
                found[way].append(time.process_time() - start)
    return found


def peaks_of(way: str, lengths: list[int]) -> list[int]:
    """Return, per length, bytes that a process of this way's own takes beside the models."""
    command = [sys.executable, "-m", "benchmarks.hypergradient", "--peak", way]
    command += ["--tokens", *map(str, lengths)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | OWN_PAGES
    )
    return [int(line) for line in done.stdout.splitlines()[-len(lengths) :]]


def measured_peaks(lengths: list[int]) -> dict[tuple[str, int], int]:
    """Return the peaks of all ways at all lengths."""
    found = {way: peaks_of(way, lengths) for way in WAYS}
    return {(way, n): peak for way in WAYS for n, peak in zip(lengths, found[way], strict=True)}


def known_peaks(path: Path) -> dict[tuple[str, int], int]:
    """Return the same from an earlier result."""
    cells = json.loads(path.read_text())["cells"]
    return {(one["way"], one["tokens"]): one["peak_bytes"] for one in cells}


def print_peaks(way: str, lengths: list[int]) -> None:
    """Print the same from inside that process; code is loaded by a short episode first."""
    step_of(way, TASK_TOKENS)()
    for tokens in lengths:
        step = step_of(way, tokens)
        reset_peak_memory()
        held = peak_memory()
        for _ in range(2):
            step()
        print(peak_memory() - held)


def cell(tokens: int, way: str, seconds: dict[str, list[float]], peak: int) -> dict[str, Any]:
    """Return the figures of one way at one length."""
    ratios = [own / plain for own, plain in zip(seconds[way], seconds["plain"], strict=True)]
    return {
        "tokens": tokens,
        "way": way,
        "seconds": statistics.median(seconds[way]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_bytes": peak,
    }


def show(cells: list[dict[str, Any]]) -> None:
    """Print the figures as a table."""
    table = Table("tokens", "way", "seconds", "over plain", "spread", "peak MiB")
    for one in cells:
        spread = f"{one['ratio_min']:.2f}..{one['ratio_max']:.2f}"
        row = [str(one["tokens"]), one["way"], f"{one['seconds']:.3f}", f"{one['ratio']:.2f}"]
        table.add_row(*row, spread, f"{one['peak_bytes'] / 2**20:.0f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true", help="keep the peaks that --out has")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print_peaks(args.peak, args.tokens)
    cells: list[dict[str, Any]] = []
    peaks = known_peaks(args.out) if args.no_memory else measured_peaks(args.tokens)
    for tokens in args.tokens:
        seconds = measure(tokens, args.rounds)
        cells += [cell(tokens, way, seconds, peaks[way, tokens]) for way in WAYS]
    show(cells)
    result = describe() | {"rounds": args.rounds, "threads": torch.get_num_threads()}
    args.out.write_text(json.dumps(result | {"cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
