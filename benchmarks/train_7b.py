"""Speed, utilisation and memory of training a 7B model on one GPU, and what SEEKR's replay adds.

    python -m benchmarks.train_7b --device cuda --out 7b.json

It runs on a bare host: neither Ray nor MLflow, pyarrow or a model is needed, as weights are drawn on the
device. Trained is the loop of `seekr.training`, with adapters over a frozen bfloat16 model and with
all weights (float32 masters, AdamW, activations computed again), on rows of 1024 and of 4096 tokens. Two
steps take turns on the same rows and the same model: `plain`, on task rows, and `replay`, on replay rows
alone with SEEKR's three losses. Targets are made by the start model: 128 heads in 24 layers, 100 query
rows, 24 entries kept of each and 64 logits per answer token; an eighth of a row is its answer.

MFU is `seekr.training.flops` per second over the device's dense bfloat16 peak: PaLM's count, with the
head at answers alone and 4 operations instead of 6 per frozen weight. SEEKR's own products are not
counted, so its overhead shows in MFU as well. Steps that warm up are not timed.

Prediction for an H200: the products reach half of the peak, and activation checkpointing costs a quarter
of MFU, so 0.45 with adapters (the norms and small products of the adapters) and 0.40 with all weights.
100 query rows are next to nothing beside whole maps, and decoding a target on the CPU is a few ms per
row: replay at most 1.05 of plain. Memory: all weights take 16 bytes each and a bfloat16 copy, 121 GB.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.machine import describe
from benchmarks.train_problem import PAD_ID, SHAPES, Shape, settle
from seekr.batches import BatchPlan, StepRows
from seekr.collation import collate
from seekr.methods import SEEKR, Method, SeqFT
from seekr.prompts import TokenizedRow
from seekr.sampling import query_positions
from seekr.teacher import Keep, teach_batch
from seekr.teacher_store import encode_target
from seekr.training.build import Origin, is_adapter
from seekr.training.flops import device_peak, training_flops
from seekr.training.loop import Training, Workers
from seekr.training.microbatches import TrainingRows
from seekr.training.settings import DTYPES, Execution, Lora, Recipe
from seekr.training.strategy import Plain

RESULT = Path(__file__).parent / "results" / "train_7b.json"
TOKENS = {"tiny": (64, 128), "small": (256, 512), "1b": (1024, 4096), "7b": (1024, 4096)}
QUERY_ROWS, KEEP = 100, Keep(logits=64, attention=24)
ANSWER_PART = 8
KINDS = ("plain", "replay")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration: which weights are trained, and on rows of how many tokens."""

    shape: Shape
    mode: str
    tokens: int
    rows: int
    recipe: Recipe
    execution: Execution
    device: torch.device

    def heads(self) -> dict[int, tuple[int, ...]]:
        """Return the distilled heads: an eighth of all, spread over the last 3/4 of the layers."""
        shape = self.shape
        layers = max(1, 3 * shape.layers // 4)
        whole, rest = divmod(shape.layers * shape.heads // 8, layers)
        found: dict[int, tuple[int, ...]] = {}
        for index in range(layers):
            count = whole + (index < rest)
            chosen = tuple(head * shape.heads // count for head in range(count))
            found[shape.layers - layers + index] = chosen
        return found

    def draw_rows(self) -> list[TokenizedRow]:
        """Return rows that are all of the same length."""
        draw = np.random.default_rng(0)
        return [self.shape.row(draw, index, self.tokens, ANSWER_PART) for index in range(self.rows)]

    @property
    def flops(self) -> int:
        """Model FLOPs of one step."""
        lengths, answers = [self.tokens] * self.rows, self.rows * (self.tokens // ANSWER_PART)
        return training_flops(self.shape.config(), lengths, answers, self.recipe.lora)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A source of weights that draws them on the device: norms are 1, an adapter's B is 0."""

    device: torch.device

    def read(self, name: str, start: int, length: int) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(length, device=self.device)
        if is_adapter(name) and ".lora_B." in name:
            return torch.zeros(length, device=self.device)
        generator = torch.Generator(self.device).manual_seed(crc32(f"{name}/{start}".encode()))
        return torch.randn(length, device=self.device, generator=generator) * 0.02


class PlainDrawn(Plain):
    """The strategy of one worker, with drawn weights in the place of those of the model's files."""

    def _build(self) -> None:
        self.source = Drawn(self._device)
        super()._build()


def write_names(shape: Shape, folder: Path) -> None:
    """Write a model folder that has everything but numbers: config, names of tensors, an empty file."""
    shape.config().save_pretrained(folder)
    with torch.device("meta"):
        names = [name for name, _ in LlamaForCausalLM(shape.config()).named_parameters()]
    index = {"weight_map": dict.fromkeys(names, "none.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "none.safetensors").touch()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayAlone(BatchPlan):
    """Batches without their task rows."""

    def step(self, index: int) -> StepRows:
        return replace(BatchPlan.step(self, index), task=np.zeros(0, dtype=np.int64))


def teach(case: Case, strategy: Plain, rows: list[TokenizedRow]) -> list[bytes]:
    """Return the rows' targets, made and encoded as the pipeline does."""
    found: list[bytes] = []
    size, heads = case.execution.micro_batch_size, case.heads()
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        positions = [query_positions(0, row.row_id, case.tokens, QUERY_ROWS) for row in part]
        batch = collate(part, PAD_ID).to(case.device)
        with strategy.micro_batch(last=True):
            targets = teach_batch(strategy.model, batch, heads, positions, logits=True, keep=KEEP)
        found += [encode_target(target) for target in targets]
    return found


def trainings(case: Case, strategy: Plain) -> dict[str, Training]:
    """Return both kinds of training, on the same rows, with the same model and optimizer."""
    rows = case.draw_rows()
    ids = [row.row_id for row in rows]
    found: dict[str, Training] = {}
    for kind, method in zip(KINDS, (SeqFT(), SEEKR()), strict=True):
        replayed = kind == "replay"
        data = TrainingRows(
            task=rows,
            task_ids=ids,
            replay=rows if replayed else [],
            replay_ids=ids if replayed else [],
            targets=teach(case, strategy, rows) if replayed else None,
        )
        found[kind] = training_of(case, method, data, strategy)
    plan = found["replay"].plan
    names = ("row_ids", "replay_ids", "epochs", "batch_size", "batch_ratio", "seed")
    found["replay"].plan = ReplayAlone(**{name: getattr(plan, name) for name in names})
    return found


def training_of(case: Case, method: Method, data: TrainingRows, strategy: Plain) -> Training:
    """Return one training of a worker that is alone."""
    settings = (case.recipe, case.execution, method, data)
    return Training(*settings, strategy, case.device, PAD_ID, Workers())


class Bench:
    """One configuration in memory."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case = case
        self._strategy = PlainDrawn(Origin(folder=folder), case.recipe, case.execution, case.device)
        self._trainings = trainings(case, self._strategy)

    def measure(self, warmup: int, steps: int) -> dict[str, Any]:
        """Let both kinds of step take turns; returns times and peaks of memory."""
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        peaks: dict[str, int | None] = {}
        for index in range(warmup + steps):
            for kind in KINDS if index % 2 else KINDS[::-1]:
                taken, peaks[kind] = self._step(kind, index)
                if index >= warmup:
                    seconds[kind].append(taken)
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        found: dict[str, Any] = {
            kind: self._figures(seconds[kind]) | {"peak_bytes": peaks[kind]} for kind in KINDS
        }
        spread = {"min": min(ratios), "max": max(ratios)}
        return found | {"overhead": {"ratio": statistics.median(ratios)} | spread}

    def _step(self, kind: str, index: int) -> tuple[float, int | None]:
        device = self._case.device
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        settle(device)
        started = time.perf_counter()
        entry = self._trainings[kind].step(index)
        settle(device)
        taken = time.perf_counter() - started
        if not math.isfinite(entry["loss"]):
            raise SystemExit(f"the loss of step {index} ({kind}) is {entry['loss']}")
        return taken, torch.cuda.max_memory_allocated(device) if cuda else None

    def _figures(self, seconds: list[float]) -> dict[str, Any]:
        case, middle = self._case, statistics.median(seconds)
        name = torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else ""
        peak = device_peak(name)
        achieved = case.flops / middle
        return {
            "seconds": [round(value, 5) for value in seconds],
            "tokens_per_second": round(case.rows * case.tokens / middle, 1),
            "model_flops_per_second": achieved,
            "mfu": None if peak is None else round(achieved / peak, 4),
        }


def run(case: Case, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one configuration; one that does not fit into memory is a result too."""
    entry: dict[str, Any] = {
        "mode": case.mode,
        "tokens": case.tokens,
        "rows_per_step": case.rows,
        "rows_per_pass": case.execution.micro_batch_size,
        "activation_checkpointing": case.execution.activation_checkpointing,
        "model_flops": case.flops,
    }
    try:
        return entry | Bench(case, folder).measure(args.warmup, args.steps)
    except torch.OutOfMemoryError as error:
        return entry | {"out_of_memory": str(error).splitlines()[0]}


def case_of(mode: str, tokens: int, args: argparse.Namespace) -> Case:
    """Return a configuration; a pass has as many tokens as the longest rows, a step four times that."""
    longest = max(args.tokens)
    rows = 4 * longest // tokens
    checkpointing = {"auto": mode == "full", "always": True, "never": False}[args.checkpointing]
    recipe = Recipe(
        epochs=args.warmup + args.steps,
        batch_size=rows,
        learning_rate=1e-6,
        optimizer=args.optimizer,
        lora=Lora(rank=args.rank, alpha=2.0 * args.rank) if mode == "lora" else None,
        dtype=DTYPES[args.dtype],
    )
    return Case(
        shape=SHAPES[args.shape],
        mode=mode,
        tokens=tokens,
        rows=rows,
        recipe=recipe,
        execution=Execution(
            micro_batch_size=longest // tokens, activation_checkpointing=checkpointing
        ),
        device=torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu"),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on cpu, else bfloat16")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--modes", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--tokens", type=int, nargs="+", help="of a row; default: by shape")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16, help="of adapters, at all linear layers")
    parser.add_argument("--optimizer", choices=["adamw", "adamw_8bit"], default="adamw")
    parser.add_argument("--checkpointing", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    args.tokens = args.tokens or list(TOKENS[args.shape])
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def main() -> None:
    args = arguments()
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="seekr-7b-") as name:
        write_names(SHAPES[args.shape], Path(name))
        for mode in args.modes:
            for tokens in args.tokens:
                cases.append(run(case_of(mode, tokens, args), Path(name), args))
                # What is measured is kept after every configuration: a time limit loses one.
                result = describe() | settings | {"cases": cases}
                args.out.write_text(json.dumps(result, indent=1) + "\n")
                print(line_of(cases[-1]), flush=True)
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()


def line_of(entry: dict[str, Any]) -> str:
    """Return a configuration's figures as one line."""
    start = f"{entry['mode']:5}{entry['tokens']:6} tokens: "
    if "out_of_memory" in entry:
        return start + entry["out_of_memory"]
    parts: list[str] = []
    for kind in KINDS:
        figures = entry[kind]
        mfu = "" if figures["mfu"] is None else f", MFU {figures['mfu']:.3f}"
        peak = figures["peak_bytes"]
        memory = "" if peak is None else f", {peak / 1e9:.1f} GB"
        parts.append(f"{kind} {figures['tokens_per_second']:.0f} tokens/s{mfu}{memory}")
    return start + "; ".join(parts) + f"; replay / plain {entry['overhead']['ratio']:.3f}"


if __name__ == "__main__":
    main()
