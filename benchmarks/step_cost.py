"""What attention distillation adds to a replay step (`python -m benchmarks.step_cost`).

One replay row, forward and backward, no optimizer step (it would only dilute the ratio). Each way is
paired with plain replay, in turn in one process:

    plain         SDPA and the answer's NLL: what plain replay does
    rows_100      SEEKR with 100 query rows per head; the timed step decodes and places the target too
    rows_all      SEEKR with all query rows, the teacher given as queries and keys
    stored_all    SEEKR with all query rows, from a stored target of 24 entries per row
    materialised  distilled layers form their maps, as the official code does; teacher maps at hand

Predictions: 100 rows visit 100 n / 2 entries per head, next to nothing beside a replay step. All rows
visit n^2 / 2, with four matrix products of head size and two exponentials each: 1.1x to 1.3x at 2048
tokens here. Memory: one number per row, so nothing.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from benchmarks.machine import OWN_PAGES, describe, reset_peak_memory
from benchmarks.machine import peak_memory as peak_of_process
from seekr.answers import WholeLogits
from seekr.attention import Observation, probing, register
from seekr.attention_kl import TeacherPair, reduce_attention_kl
from seekr.batch_targets import collate_targets
from seekr.collation import Batch, collate
from seekr.distillation import DistillationProbe
from seekr.losses import AnswerNLL, LogitKL, answer_nll
from seekr.prompts import TokenizedRow
from seekr.sampling import query_positions
from seekr.teacher import Keep, place_positions, teach_batch
from seekr.teacher_store import decode_target, encode_target

VARIANTS = ("plain", "rows_100", "rows_all", "stored_all", "materialised")
RESULT = Path(__file__).parent / "results" / "step_cost.json"
LOGIT_WEIGHT, ATTENTION_WEIGHT = 0.5, 1000.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, and how many of its layers and heads per layer are distilled."""

    layers: int
    width: int
    heads: int
    groups: int
    inner: int
    vocab: int
    distilled_layers: int
    distilled_heads: tuple[int, ...]


SHAPES = {
    "small": Shape(8, 512, 8, 8, 1376, 4096, 6, (4,) * 6),
    "small-gqa": Shape(8, 512, 8, 2, 1376, 4096, 6, (4,) * 6),
    "7b": Shape(32, 4096, 32, 32, 11008, 32000, 24, (6,) * 8 + (5,) * 16),
}


def build(shape: Shape, attention: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a random Llama of this shape; one seed, so every process has the same."""
    register()
    AttentionInterface.register("materialised", _materialising_attention)
    AttentionMaskInterface.register("materialised", sdpa_mask)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=8192,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.train()


def heads_of(shape: Shape) -> dict[int, tuple[int, ...]]:
    """Return the distilled heads: the last layers, every other head."""
    first = shape.layers - shape.distilled_layers
    return {
        first + index: tuple(head * shape.heads // count for head in range(count))
        for index, count in enumerate(shape.distilled_heads)
    }


def replay_row(shape: Shape, tokens: int) -> TokenizedRow:
    """Return random tokens, the last eighth of them the answer."""
    ids = np.random.default_rng(1).integers(1, shape.vocab, size=tokens).astype(np.int32)
    return TokenizedRow(
        row_id="row", input="", references=("",), input_ids=ids, prompt_length=tokens - tokens // 8
    )


def _materialising_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The usual way: whole maps of all heads where a layer is distilled, SDPA elsewhere."""
    wanted = getattr(module, "wanted_heads", None)
    if wanted is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)  # pyright: ignore
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(future, -torch.inf)
    maps = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    module.maps = maps[:, wanted]  # pyright: ignore
    return (maps @ value).transpose(1, 2), None


class _Capture:
    """Keeps the teacher's queries and keys of the distilled heads."""

    def __init__(self, heads: dict[int, tuple[int, ...]]) -> None:
        self.layers = frozenset(heads)
        self._heads = heads
        self.pairs: dict[int, TeacherPair] = {}

    def observe(self, seen: Observation) -> None:
        heads = list(self._heads[seen.layer])
        ratio = seen.query_BHTD.shape[1] // seen.key_BGTD.shape[1]
        query = seen.query_BHTD[:, heads].detach().clone()
        self.pairs[seen.layer] = TeacherPair(
            query_BSQD=query,
            key_BSTD=seen.key_BGTD[:, [head // ratio for head in heads]].detach().clone(),
            scaling=seen.scaling,
            valid_BSQ=torch.ones(query.shape[:3], dtype=torch.bool, device=query.device),
        )


def step_of(
    variant: str, model: PreTrainedModel, batch: Batch, heads: dict[int, tuple[int, ...]]
) -> Callable[[], None]:
    """Prepare one variant's targets and return its timed step."""
    if variant == "plain":
        return lambda: _backward(_nll(_logits(model, batch), batch))
    if variant == "materialised":
        return _materialised(model, batch, heads)
    length = int(batch.lengths_B[0])
    budget = 100 if variant == "rows_100" else None
    positions = [query_positions(0, "row", length, budget)]
    keep = Keep(logits=64, attention=24)
    stored_heads = None if variant == "rows_all" else heads
    with torch.no_grad():
        (target,) = teach_batch(model, batch, stored_heads, positions, logits=True, keep=keep)
        capture = _Capture(heads)
        if variant == "rows_all":
            with probing(model, capture):
                _logits(model, batch)
    data = encode_target(target)
    everything = place_positions(positions, batch)

    def step() -> None:
        targets = collate_targets([decode_target(data)], batch)
        probe = DistillationProbe(
            heads,
            everything if variant == "rows_all" else targets.positions_BQ,
            capture.pairs if variant == "rows_all" else targets.attention,
        )
        with probing(model, probe):
            nll = AnswerNLL(batch.labels_BT)
            nll_B, kl_B = WholeLogits(_logits(model, batch)).sums(nll, LogitKL(targets))
            valid = {layer: torch.ones_like(kl).bool() for layer, kl in probe.kl_by_layer.items()}
            attention = reduce_attention_kl(probe.kl_by_layer, valid).mean()
            _backward(
                nll_B.sum() / len(nll.row_A)
                + LOGIT_WEIGHT * kl_B.mean()
                + ATTENTION_WEIGHT * attention
            )

    return step


def _materialised(
    model: PreTrainedModel, batch: Batch, heads: dict[int, tuple[int, ...]]
) -> Callable[[], None]:
    modules = {layer: model.model.layers[layer].self_attn for layer in heads}
    for layer, module in modules.items():
        module.wanted_heads = list(heads[layer])
    with torch.no_grad():
        logits = _logits(model, batch)
        teacher = {layer: module.maps.clone() for layer, module in modules.items()}
        answers = (batch.labels_BT != -100).nonzero(as_tuple=True)
        soft = logits[answers[0], answers[1] - 1].float().softmax(dim=-1)

    def step() -> None:
        logits = _logits(model, batch)
        parts = []
        for layer, module in modules.items():
            t = teacher[layer].float()
            parts.append(
                (t * (t.clamp(min=1e-8).log() - (module.maps + 1e-8).log())).sum(-1).mean()
            )
        student = logits[answers[0], answers[1] - 1].float().log_softmax(dim=-1)
        kl = -(soft * student).sum(dim=-1).mean()
        attention = torch.stack(parts).mean()
        _backward(_nll(logits, batch) + LOGIT_WEIGHT * kl + ATTENTION_WEIGHT * attention)
        for module in modules.values():
            del module.maps

    return step


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(input_ids=batch.input_ids_BT, use_cache=False).logits


def _nll(logits: Tensor, batch: Batch) -> Tensor:
    nll_B, count_B = answer_nll(logits, batch.labels_BT)
    return nll_B.sum() / count_B.sum()


def _backward(loss: Tensor) -> None:
    loss.backward()


def prepare(
    variant: str, tokens: int, args: argparse.Namespace
) -> tuple[Callable[[], None], nn.Module]:
    shape = SHAPES[args.shape]
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    attention = "materialised" if variant == "materialised" else "seekr"
    model = build(shape, attention, args.device, dtype)
    batch = collate([replay_row(shape, tokens)], pad_id=0).to(args.device)
    return step_of(variant, model, batch, heads_of(shape)), model


def timed(step: Callable[[], None], model: nn.Module, device: str) -> float:
    """Seconds of one step; gradients are dropped before, outside the clock."""
    model.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_pair(variant: str, tokens: int, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of (plain, variant), in turn and in changing order, after one warm-up of both."""
    steps = {name: prepare(name, tokens, args) for name in ("plain", variant)}
    found: list[tuple[float, float]] = []
    for turn in range(args.rounds + 1):
        seconds: dict[str, float] = {}
        for name in sorted(steps, reverse=turn % 2 == 0):
            step, model = steps[name]
            seconds[name] = timed(step, model, args.device)
            model.zero_grad(set_to_none=True)
        if turn:
            found.append((seconds["plain"], seconds[variant]))
    return found


def peak_memory(variant: str, tokens: int, args: argparse.Namespace) -> int:
    """Peak bytes of a process that only does this variant's steps."""
    command = [sys.executable, "-m", "benchmarks.step_cost", "--peak", variant]
    command += ["--tokens", str(tokens), "--shape", args.shape, "--device", args.device]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | OWN_PAGES
    )
    return int(done.stdout)


def print_peak(args: argparse.Namespace) -> None:
    step, model = prepare(args.peak, args.tokens[0], args)
    cuda = args.device == "cuda"
    torch.cuda.reset_peak_memory_stats() if cuda else reset_peak_memory()
    for _ in range(2):
        timed(step, model, args.device)
    print(torch.cuda.max_memory_allocated() if cuda else peak_of_process())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--add", action="store_true", help="keep what --out has besides")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print_peak(args)
    known: dict[tuple[int, str], dict[str, Any]] = {}
    if args.add:
        cells = json.loads(args.out.read_text())["cells"]
        known = {(cell["tokens"], cell["variant"]): cell for cell in cells}
    for tokens in args.tokens:
        for variant in args.variants:
            cell = known.setdefault((tokens, variant), {"tokens": tokens, "variant": variant})
            if variant != "plain":
                cell |= _times(measure_pair(variant, tokens, args))
            if not args.no_memory:
                cell["peak_bytes"] = peak_memory(variant, tokens, args)
    ordered = sorted(known, key=lambda key: (key[0], VARIANTS.index(key[1])))
    show([known[key] for key in ordered])
    settings = {"shape": args.shape, "device": args.device}
    result = describe() | settings | {"cells": [known[key] for key in ordered]}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def _times(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [own / plain for plain, own in pairs]
    return {
        "rounds": len(pairs),
        "plain_seconds": statistics.median(plain for plain, _ in pairs),
        "seconds": statistics.median(own for _, own in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def show(cells: list[dict[str, Any]]) -> None:
    """Print the figures as a table."""
    table = Table("tokens", "variant", "plain s", "seconds", "ratio", "spread", "peak MB", "ratio")
    plain = {cell["tokens"]: cell.get("peak_bytes") for cell in cells if cell["variant"] == "plain"}
    for cell in cells:
        row = [str(cell["tokens"]), cell["variant"], *[""] * 4]
        if "ratio" in cell:
            spread = f"{cell['ratio_min']:.2f}..{cell['ratio_max']:.2f}"
            row[2:] = [f"{cell[name]:.3f}" for name in ("plain_seconds", "seconds", "ratio")]
            row.append(spread)
        if cell.get("peak_bytes") and plain.get(cell["tokens"]):
            row.append(f"{cell['peak_bytes'] / 1e6:.0f}")
            row.append(f"{cell['peak_bytes'] / plain[cell['tokens']]:.3f}")
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
