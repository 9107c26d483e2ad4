"""Bytes per replay row against what training gets from them (`python -m benchmarks.teacher_store`).

A small model learns the standard library's source (the old task), its copy then drifts on prose (the
new task). For rows of the old task, the drifted model's gradient of SEEKR's whole replay loss is taken
with the teacher's exact targets and with stored ones, over all parameters. Rows have the shape of a 7B
model's: 1024 tokens, vocabulary 32000, 128 heads, 100 query rows.

Prediction: what a missing entry costs is its probability squared, and attention is concentrated, so
about 20 entries per row should do (of 512 possible on average), at 2 bytes of probability and about 1
of position: 0.8 MB per row.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import code_model
from benchmarks.machine import describe
from seekr.answers import WholeLogits
from seekr.attention import probing
from seekr.batch_targets import collate_targets
from seekr.collation import Batch, collate
from seekr.losses import answer_positions
from seekr.methods import Outputs
from seekr.methods.seekr import SEEKR
from seekr.packing import pack
from seekr.prompts import TokenizedRow
from seekr.sampling import query_positions
from seekr.sparse_rows import SparseRows, keep_largest
from seekr.teacher import Keep, TeacherTarget, teach_batch
from seekr.teacher_store import decode_target, encode_target

RESULT = Path(__file__).parent / "results" / "teacher_store.json"
LENGTH, QUERIES = 1024, 100
ATTENTION = (4, 8, 12, 16, 20, 24, 32, 48, 64, None)
LOGITS = (4, 8, 16, 32, 64, 128, None)
DEFAULT = Keep(logits=64, attention=24)
PARTS = ("whole", "attention", "logits")


def load_teacher(args: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the teacher, and its loss and the two token runs; both cached in a folder."""
    args.cache.mkdir(parents=True, exist_ok=True)
    tokens_file, weights = args.cache / "tokens.npz", args.cache / "teacher.pt"
    if not tokens_file.exists():
        np.savez(tokens_file, **code_model.tokenize())
    tokens = dict(np.load(tokens_file))
    teacher = code_model.fresh_model()
    if not weights.exists():
        loss = code_model.train(teacher, tokens["code"], rate=2e-3, seed=0, minutes=args.minutes)
        torch.save({"weights": teacher.state_dict(), "loss": loss}, weights)
    saved = torch.load(weights, weights_only=True)
    teacher.load_state_dict(saved["weights"])
    return teacher, tokens | {"loss": saved["loss"]}


def drifted(
    teacher: PreTrainedModel, tokens: dict[str, Any], steps: int, rate: float, *, seekr: bool
) -> PreTrainedModel:
    """Return the teacher after some steps on prose: plain fine-tuning, or SEEKR with exact targets.

    SEEKR replays one of four rows in each step. They are not the rows that are measured.
    """
    student = copy.deepcopy(teacher)
    replay = code_model.rows(tokens["code"], LENGTH, 4 if seekr else 0, seed=3)
    targets = [exact_target(teacher, row) for row in replay]
    prose = code_model.rows(tokens["prose"], LENGTH, steps, seed=4)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate)
    for step, row in enumerate(prose):
        ids = collate([row], 0).input_ids_BT
        student(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if seekr:
            batch, target = collate([replay[step % 4]], 0), targets[step % 4]
            _, parts = replay_losses(student, batch, target)
            sum(parts.values(), torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return student


def heads() -> dict[int, tuple[int, ...]]:
    """Return all 128 heads."""
    return {layer: tuple(range(code_model.HEADS)) for layer in range(code_model.LAYERS)}


def exact_target(teacher: PreTrainedModel, row: TokenizedRow) -> TeacherTarget:
    """Return a row's target with nothing left out."""
    positions = [query_positions(0, row.row_id, LENGTH, QUERIES)]
    return teach_batch(teacher, collate([row], 0), heads(), positions, logits=True)[0]


def thinned(target: TeacherTarget, keep: Keep, per_row: bool = False) -> TeacherTarget:
    """Keep less of an exact target; `per_row` keeps as many entries of each attention row."""
    assert target.attention is not None and isinstance(target.logits, Tensor)
    dense = target.attention.dense_RC(target.length)
    if per_row and keep.attention is not None:
        floor = dense.topk(keep.attention, dim=1).values[:, -1:]
        attention = keep_largest(dense.masked_fill(dense < floor, 0.0), (dense > 0).sum(1), None)
        tails = (1.0 - attention.mass_R()).clamp(min=0.0)
        attention = SparseRows(
            columns_N=attention.columns_N,
            values_N=attention.values_N,
            offsets=attention.offsets,
            tail_R=tails.masked_fill((dense > 0).sum(1) <= keep.attention, 0.0),
        )
    else:
        attention = keep_largest(dense, (dense > 0).sum(1), keep.attention)
    vocab_A = torch.full((len(target.logits),), target.logits.shape[1])
    logits = target.logits
    if keep.logits is not None:
        logits = keep_largest(logits.softmax(dim=-1), vocab_A, keep.logits)
    return TeacherTarget(
        length=target.length,
        shift=True,
        logits=logits,
        heads_by_layer=target.heads_by_layer,
        query_positions=target.query_positions,
        attention=attention,
    )


def eight_bits(target: TeacherTarget) -> tuple[TeacherTarget, int]:
    """Return a target with all attention entries in 8 bits, a scale per row; and its bytes."""
    assert target.attention is not None
    dense = target.attention.dense_RC(target.length)
    scale = dense.amax(dim=1, keepdim=True)
    codes = (dense / scale * 255).round()
    rounded = keep_largest(codes * scale / 255, torch.zeros(len(dense)), None)
    size = pack(codes[dense > 0].long().numpy()).nbytes
    return TeacherTarget(
        length=target.length,
        shift=True,
        logits=target.logits,
        heads_by_layer=target.heads_by_layer,
        query_positions=target.query_positions,
        attention=rounded,
    ), size + 4 * len(dense)


def replay_losses(
    student: PreTrainedModel, batch: Batch, target: TeacherTarget
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return SEEKR's loss terms on one replay row: bare, and with their weights."""
    method = SEEKR()
    targets = collate_targets([target], batch)
    probe = method.distillation(targets)
    with probing(student, probe):
        logits = student(input_ids=batch.input_ids_BT, use_cache=False).logits
    outputs = Outputs(
        answers=WholeLogits(logits),
        batch=batch,
        targets=targets,
        attention_kl=probe.kl_by_layer,
    )
    tokens = len(answer_positions(batch.labels_BT)[0])
    count = {"replay_tokens": tokens, "replay_rows": 1}
    terms = method.replay_terms(outputs)
    bare = {name: float(term.total.detach()) / count[term.per] for name, term in terms.items()}
    return bare, {name: t.weight * t.total / count[t.per] for name, t in terms.items()}


def gradients(student: PreTrainedModel, batch: Batch, target: TeacherTarget) -> dict[str, Tensor]:
    """Return the gradient over all parameters: of the replay loss, and of its distillations."""
    _, parts = replay_losses(student, batch, target)
    parameters, found = list(student.parameters()), {}
    for name in ("replay", "attention", "logits"):
        grads = torch.autograd.grad(parts[name], parameters, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(grads, parameters, strict=True)
        ]
        found[name] = torch.cat(flat)
    found["whole"] = found.pop("replay") + found["attention"] + found["logits"]
    return found


def cosine(left: Tensor, right: Tensor) -> float:
    return float(left.double() @ right.double() / (left.double().norm() * right.double().norm()))


def variants(exact: TeacherTarget) -> Iterator[tuple[str, Keep, TeacherTarget, int]]:
    """Yield (kind, what is kept, the target as read back, its bytes)."""
    for attention in ATTENTION:
        keep = Keep(logits=DEFAULT.logits, attention=attention)
        yield "attention_kept", keep, *_stored(thinned(exact, keep))
    for logits in LOGITS:
        keep = Keep(logits=logits, attention=DEFAULT.attention)
        yield "logits_kept", keep, *_stored(thinned(exact, keep))
    for attention in (8, 16, 24, 32):
        keep = Keep(logits=DEFAULT.logits, attention=attention)
        yield "same number in every row", keep, *_stored(thinned(exact, keep, per_row=True))
    yield "32 bits", DEFAULT, *_stored(thinned(exact, DEFAULT), 32)
    yield "8 bits, all entries", Keep(), *eight_bits(exact)


def _stored(target: TeacherTarget, bits: int = 16) -> tuple[TeacherTarget, int]:
    data = encode_target(target, bits)  # pyright: ignore[reportArgumentType]
    return decode_target(data), len(data)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every variant on every row and student."""
    teacher, tokens = load_teacher(args)
    students = {
        f"{'SEEKR' if seekr else 'plain'}, {args.steps} steps": drifted(
            teacher, tokens, args.steps, args.rate, seekr=seekr
        )
        for seekr in (True, False)
    }
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    losses: dict[str, list[dict[str, float]]] = {}
    exact_bytes = 0
    for row in code_model.rows(tokens["code"], LENGTH, args.rows, seed=2):
        exact, batch = exact_target(teacher, row), collate([row], 0)
        exact_bytes = len(encode_target(exact, 32))
        for name, student in students.items():
            losses.setdefault(name, []).append(replay_losses(student, batch, exact)[0])
            true = gradients(student, batch, exact)
            for kind, keep, target, size in variants(exact):
                cell = cells.setdefault((kind, keep.logits, keep.attention), {"bytes": []})
                cell["bytes"].append(size)
                found = gradients(student, batch, target)
                for part in PARTS:
                    key = f"{part}: {name}"
                    cell.setdefault(key, []).append(cosine(found[part], true[part]))
        print(f"row {row.row_id} done", flush=True)
    return {
        "teacher_loss": tokens["loss"],
        "losses_of_students": losses,
        "exact_bytes": exact_bytes,
        "cells": [_summary(key, cell) for key, cell in cells.items()],
    }


def _summary(key: tuple[Any, ...], cell: dict[str, Any]) -> dict[str, Any]:
    cosines = {name: values for name, values in cell.items() if name != "bytes"}
    return {
        "kind": key[0],
        "logits_kept": key[1],
        "attention_kept": key[2],
        "bytes": statistics.mean(cell["bytes"]),
        "cosine": {name: statistics.mean(values) for name, values in cosines.items()},
        "cosine_min": {name: min(values) for name, values in cosines.items()},
    }


def show(result: dict) -> None:
    names = list(result["cells"][0]["cosine"])
    table = Table("kind", "logits", "attention", "kB", *names)
    for cell in result["cells"]:
        kept = [str(cell[name] or "all") for name in ("logits_kept", "attention_kept")]
        cosines = [f"{cell['cosine'][name]:.5f}" for name in names]
        table.add_row(cell["kind"], *kept, f"{cell['bytes'] / 1e3:.0f}", *cosines)
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("teacher-store-cache"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of training the teacher")
    parser.add_argument("--steps", type=int, default=30, help="of the students on prose")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of the students")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    start = time.monotonic()
    result = measure(args)
    show(result)
    settings = {"rows": args.rows, "seconds": round(time.monotonic() - start)}
    args.out.write_text(json.dumps(describe() | settings | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
