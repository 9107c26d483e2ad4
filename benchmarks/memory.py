"""Peak memory of training on the CPU, estimated and measured (`python -m benchmarks.memory`).

A Llama of about 40 million parameters is trained for a few steps, a checkpoint is taken and kept through one
more, and the model is exported: what a worker does. Every worker is a process of its own in which each
tensor has pages of its own, so the largest resident size is the largest sum of what was alive. It is
compared with `seekr.training.memory` for the same configuration, whole, with nothing taken off. As
Python and torch are part of both, the ratio is given without them too: of what training itself takes.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.machine import OWN_PAGES, describe, peak_memory, reset_peak_memory
from seekr.batches import num_micro_batches
from seekr.methods.seekr import SEEKR
from seekr.methods.seqft import SeqFT
from seekr.models import byte_tokenizer, load_tokenizer, save_model
from seekr.prompts import TokenizedRow
from seekr.sampling import query_positions
from seekr.sparse_rows import keep_largest
from seekr.teacher import TeacherTarget
from seekr.teacher_store import encode_target
from seekr.training.activations import Distillation, Pass
from seekr.training.build import Origin
from seekr.training.checkpoint import take_snapshot, writer_of
from seekr.training.export import export_model
from seekr.training.loop import Training, Workers
from seekr.training.memory import MIB, MemoryEstimate, Work, estimate
from seekr.training.microbatches import TrainingRows
from seekr.training.model_sizes import read_sizes
from seekr.training.settings import Execution, Lora, Recipe
from seekr.training.strategy import create_strategy

RESULT = Path(__file__).parent / "results" / "memory.json"
# Of the models that are trained. The estimate was written with `wide` at hand; `deep` was looked at when
# it was done, and no line of the estimate was changed for it.
SHAPES: dict[str, dict[str, int]] = {
    "wide": {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "deep": {
        "vocab_size": 8000,
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_hidden_layers": 22,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
    },
}
DISTILLED_LAYERS, HEADS_PER_LAYER, QUERIES, KEPT, LOGITS_KEPT = 6, 4, 100, 24, 64
ENVIRONMENT = OWN_PAGES | {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration; rows, tokens and answers are those of a step's task rows."""

    name: str
    shape: str = "wide"
    workers: int = 1
    rows: int = 4
    tokens: int = 512
    answers: int = 64
    replay: int = 0
    lora: bool = False
    dtype: str = "float32"
    strategy: str = "ddp"
    zero_stage: int = 3
    micro_batch_size: int = 2
    pack_tokens: int | None = None
    activation_checkpointing: bool = False

    @property
    def recipe(self) -> Recipe:
        """Steps that all see the same rows."""
        return Recipe(
            epochs=8,
            batch_size=self.rows,
            learning_rate=1e-4,
            lora=Lora(rank=16, alpha=32.0) if self.lora else None,
            batch_ratio=self.replay / self.rows if self.replay else 1.0,
            dtype=getattr(torch, self.dtype),
        )

    @property
    def execution(self) -> Execution:
        return Execution(
            strategy=self.strategy,  # pyright: ignore[reportArgumentType]
            zero_stage=self.zero_stage,  # pyright: ignore[reportArgumentType]
            micro_batch_size=self.micro_batch_size,
            pack_tokens=self.pack_tokens,
            activation_checkpointing=self.activation_checkpointing,
        )

    @property
    def work(self) -> Work:
        """What the estimate is told."""
        rows, passes = self._passes(self.rows)
        replayed, replay_passes = self._passes(self.replay)
        packed = self.pack_tokens is not None
        task = self._pass(1, self.pack_tokens or 0) if packed else self._pass(rows, self.tokens)
        if packed:
            passes = -(-self.rows * self.tokens // (self.workers * (self.pack_tokens or 1)))
        return Work(
            task=task,
            replay=self._pass(replayed, self.tokens, replay=True) if self.replay else None,
            task_passes=passes,
            replay_passes=replay_passes,
        )

    def _passes(self, rows: int) -> tuple[int, int]:
        passes = num_micro_batches(rows, self.workers, self.micro_batch_size)
        return min(self.micro_batch_size, -(-rows // self.workers)), passes

    def _pass(self, rows: int, tokens: int, replay: bool = False) -> Pass:
        answers = self.answers * (rows * tokens // self.tokens)
        return Pass(
            rows=rows,
            tokens=tokens,
            answers=answers,
            masked=rows > 1 or tokens > self.tokens,
            distillation=_distillation() if replay else None,
        )


_LONG: dict[str, Any] = {"rows": 2, "micro_batch_size": 1, "tokens": 2048, "answers": 256}
_TWO: dict[str, Any] = {"workers": 2, "rows": 8}
CASES = (
    Case(name="ddp, 1 worker"),
    Case(name="ddp, 1 worker, one pass", rows=2),
    Case(name="ddp, 1 worker, checkpointing", activation_checkpointing=True, micro_batch_size=4),
    Case(name="ddp, 1 worker, long rows", **_LONG),
    Case(name="ddp, 1 worker, packed", rows=4, pack_tokens=1024),
    Case(name="ddp, 1 worker, LoRA", lora=True),
    Case(name="ddp, 1 worker, SEEKR", replay=4),
    Case(
        name="ddp, 1 worker, SEEKR, checkpointing", replay=2, activation_checkpointing=True, **_LONG
    ),
    Case(name="ddp, 1 worker, bfloat16", dtype="bfloat16"),
    Case(name="ddp, 2 workers", **_TWO),
    Case(name="fsdp, 2 workers", strategy="fsdp", **_TWO),
    Case(name="fsdp, 2 workers, SEEKR", strategy="fsdp", workers=2, replay=4),
    Case(name="fsdp, 2 workers, bfloat16", strategy="fsdp", dtype="bfloat16", **_TWO),
    Case(name="ZeRO-2, 2 workers", strategy="deepspeed", zero_stage=2, **_TWO),
    Case(name="ZeRO-3, 2 workers", strategy="deepspeed", zero_stage=3, **_TWO),
    Case(name="deep: ddp, 1 worker", shape="deep", tokens=700, answers=90),
    Case(
        name="deep: ddp, checkpointing, SEEKR",
        shape="deep",
        tokens=700,
        answers=90,
        rows=2,
        replay=2,
        activation_checkpointing=True,
    ),
    Case(
        name="deep: fsdp, 2 workers", shape="deep", tokens=700, answers=90, strategy="fsdp", **_TWO
    ),
    Case(name="deep: fsdp, 2 workers, LoRA", shape="deep", strategy="fsdp", lora=True, **_TWO),
)


def _distillation() -> Distillation:
    return Distillation(
        layers=DISTILLED_LAYERS,
        heads=DISTILLED_LAYERS * HEADS_PER_LAYER,
        queries=QUERIES,
        attention_kept=KEPT,
        logits_kept=LOGITS_KEPT,
    )


def write_model(folder: Path, shape: str = "wide") -> Path:
    """Write a model that cases train."""
    config: Any = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    torch.manual_seed(0)
    save_model(AutoModelForCausalLM.from_config(config), byte_tokenizer(), folder)
    return folder


def _rows(count: int, case: Case, seed: int) -> list[TokenizedRow]:
    """Return rows of random tokens, none as long as another, so every pass is padded."""
    draw, vocab = np.random.default_rng(seed), SHAPES[case.shape]["vocab_size"]
    lengths = [case.tokens - index for index in range(count)]
    return [
        TokenizedRow(
            row_id=f"{seed}-{length}",
            input="",
            references=("",),
            input_ids=draw.integers(2, vocab, size=length).astype(np.int32),
            prompt_length=length - case.answers,
        )
        for length in lengths
    ]


def _target(row: TokenizedRow, case: Case) -> bytes:
    """Return a target as large as a teacher's, of random numbers."""
    length = len(row.input_ids)
    positions = query_positions(0, row.row_id, length, QUERIES)
    shape = SHAPES[case.shape]
    first, vocab = shape["num_hidden_layers"] - DISTILLED_LAYERS, shape["vocab_size"]
    heads = {first + index: tuple(range(HEADS_PER_LAYER)) for index in range(DISTILLED_LAYERS)}
    repeated = np.tile(positions, DISTILLED_LAYERS * HEADS_PER_LAYER)
    seen = torch.from_numpy(repeated)[:, None] >= torch.arange(length)
    maps = (2 * torch.randn(seen.shape)).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    words = (2 * torch.randn(case.answers, vocab)).softmax(dim=-1)
    target = TeacherTarget(
        length=length,
        shift=True,
        logits=keep_largest(words, torch.full((case.answers,), vocab), LOGITS_KEPT),
        heads_by_layer=heads,
        query_positions=positions,
        attention=keep_largest(maps, seen.sum(dim=-1), KEPT),
    )
    return encode_target(target)


def training_rows(case: Case) -> TrainingRows:
    """Return a case's rows, with targets."""
    task, replay = _rows(case.rows, case, 1), _rows(case.replay, case, 2)
    return TrainingRows(
        task=task,
        task_ids=[f"new/{row.row_id}" for row in task],
        replay=replay,
        replay_ids=[f"old/{row.row_id}" for row in replay],
        targets=[_target(row, case) for row in replay] if replay else None,
    )


def predicted(case: Case, model: Path) -> MemoryEstimate:
    """Return the estimate for a case."""
    sizes = read_sizes(Origin(folder=model), case.recipe)
    return estimate(
        sizes, case.recipe, case.execution, case.work, workers=case.workers, device="cpu"
    )


def measured(case: Case, model: Path) -> dict[str, int]:
    """Return bytes by phase, each the most of any worker."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        rows.write_bytes(pickle.dumps((case, training_rows(case))))
        command = [sys.executable, "-m", "benchmarks.memory", "--worker", str(model), str(rows)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        workers = [
            subprocess.Popen(command, env=environment, **pipes)
            for environment in _environments(case.workers)
        ]
        said = [worker.communicate() for worker in workers]
    for worker, (_, error) in zip(workers, said, strict=True):
        if worker.returncode:
            raise RuntimeError(f"{case.name}: {error[-3000:]}")
    found = [json.loads(text.strip().splitlines()[-1]) for text, _ in said]
    return {phase: max(worker[phase] for worker in found) for phase in found[0]}


def _environments(size: int) -> list[dict[str, str]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = os.environ | ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(size)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def train(model: Path, rows: Path) -> None:
    """Be one worker, and print the peak of each phase."""
    case, data = pickle.loads(rows.read_bytes())
    workers = Workers(rank=int(os.environ["RANK"]), world_size=case.workers)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, int] = {}

    def ended(phase: str) -> None:
        found[phase] = peak_memory()
        reset_peak_memory()

    method = SEEKR(name="seekr", query_budget=QUERIES) if case.replay else SeqFT(name="seqft")
    recipe, origin, device = case.recipe, Origin(folder=model), torch.device("cpu")
    tokenizer = load_tokenizer(model)
    ended("imports")
    strategy = create_strategy(origin, recipe, case.execution, device)
    training = Training(recipe, case.execution, method, data, strategy, device, 0, workers)
    ended("build")
    for step in range(3):
        training.step(step)
    ended("steps")
    blocks = strategy.blocks()
    snapshot, writer = take_snapshot(blocks, strategy.optimizer), writer_of(blocks)
    training.step(3)
    ended("checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        snapshot.save(Path(folder), writer)
        del snapshot
        export_model(strategy, recipe, origin, tokenizer, Path(folder), workers)
    ended("export")
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def compare(case: Case, model: Path) -> dict[str, Any]:
    """Return what was estimated and measured of one case."""
    expected, phases = predicted(case, model), measured(case, model)
    peak, process = max(phases.values()), expected.parts.process
    return {
        "name": case.name,
        "case": asdict(case),
        "phase": expected.phase,
        "parts": asdict(expected.parts),
        "estimate": expected.peak,
        "measured": peak,
        "measured_by_phase": phases,
        "ratio": round(expected.peak / peak, 3),
        "ratio_without_process": round((expected.peak - process) / (peak - process), 3),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--only", help="cases whose name contains this; nothing is written")
    parser.add_argument("--worker", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return train(*args.worker)
    with tempfile.TemporaryDirectory(prefix="seekr-memory-") as folder:
        models = {name: write_model(Path(folder) / name, name) for name in SHAPES}
        cells: list[dict[str, Any]] = []
        for case in CASES:
            if args.only is None or args.only in case.name:
                cells.append(compare(case, models[case.shape]))
                print(f"{case.name}: {cells[-1]['ratio']}", flush=True)
        show(cells)
    if args.only is None:
        args.out.write_text(json.dumps(describe() | {"cells": cells}, indent=1) + "\n")


def show(cells: list[dict[str, Any]]) -> None:
    """Print figures in MiB."""
    table = Table("case", "peak at", "estimate", "measured", "ratio", "without process")
    for cell in cells:
        row = [f"{cell[name] / MIB:.0f}" for name in ("estimate", "measured")]
        row += [f"{cell[name]:.2f}" for name in ("ratio", "ratio_without_process")]
        table.add_row(cell["name"], cell["phase"], *row)
    Console().print(table)


if __name__ == "__main__":
    main()
