"""Writes a finished stream to a folder, file by file as the stages would, for tests of what reads
it.

The numbers follow simple laws (a score falls by `FORGET` with every later task), so that tests can
state what must come out. Everything is deterministic: two calls with the same arguments give the
same fingerprints.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifact import Artifact, StageRecord, StageRef
from pipelines.fingerprint import fingerprint
from pipelines.labels import retaught
from pipelines.results import StageResult, State, StreamView
from pipelines.store import Store
from pipelines.transfer import OutputFile

START = datetime(2026, 11, 20, 9, 0, tzinfo=UTC)
FIRST = 0.80
FORGET = 0.05
BASE_SCORE = 0.10


@dataclass(slots=True)
class Committer:
    """Commits stages to a store with a running clock."""

    store: Store
    now: datetime = START
    state: State = "ran"
    stages: list[StageResult] = field(default_factory=list)

    def commit(
        self,
        stage: str,
        task: str,
        *,
        inputs: Mapping[str, StageResult] | None = None,
        files: Mapping[str, bytes] | None = None,
        config: Mapping[str, Any] | None = None,
        sources: Mapping[str, str] | None = None,
        seconds: float = 1.0,
        memory: int | None = None,
        rows: int | None = None,
    ) -> StageResult:
        used = dict(inputs or {})
        payload: dict[str, Any] = {
            "stage": stage,
            "version": 1,
            "task": task,
            "config": dict(config or {}),
            "inputs": {name: result.fingerprint for name, result in used.items()},
            "sources": dict(sources or {}),
        }
        key = fingerprint(payload)
        outputs = []
        for path, content in (files or {}).items():
            self.store.write_bytes(f"{stage}/{task}/{key}/{path}", content)
            outputs.append(OutputFile(path=path, size=len(content), sha256=digest(content)))
        started, self.now = self.now, self.now + timedelta(seconds=seconds)
        refs = {
            n: StageRef(stage=r.stage, task=r.task, fingerprint=r.fingerprint)
            for n, r in used.items()
        }
        record = StageRecord(
            stage=stage, version=1, task=task, fingerprint=key, payload=payload, inputs=refs,
            outputs=tuple(outputs), rows=rows, stats={}, started_at=started.isoformat(),
            finished_at=self.now.isoformat(), seconds=seconds, peak_memory_bytes=memory, attempts=1,
            seeds={"stream": 7}, host="node-3", user="ada", argv=("seekr", "run"),
            git_commit="0f3c2a9", versions={"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0"},
        )  # fmt: skip
        record.save(self.store)
        artifact = Artifact(store=self.store, record=record)
        self.stages.append(StageResult(artifact=artifact, state=self.state))
        return self.stages[-1]


def commit_stream(
    root: Path,
    tasks: Sequence[str] = ("sort", "reverse", "copy"),
    *,
    name: str = "demo",
    method: str = "seekr",
    steps: int = 20,
    shape: tuple[int, int] = (4, 8),
    forget: float = FORGET,
    reused: int = 0,
) -> StreamView:
    """A stream that ended well; the stages of the first `reused` tasks were found, not run."""
    out = Committer(Store.open(root))
    replays: dict[str, StageResult] = {}
    data: dict[str, StageResult] = {}
    model: StageResult | None = None
    for k, task in enumerate(tasks):
        out.state = "reused" if k < reused else "ran"
        rows = out.commit(
            "ingest",
            task,
            sources={f"data/{task}.jsonl": digest(task.encode())},
            files={"train.parquet": bytes(4000)},
            seconds=4.0,
            rows=1000,
        )
        data[f"data.{task}"] = rows
        before = {"model": model} if model else {}
        model = out.commit(
            "train",
            task,
            inputs={f"data.{task}": rows, **before, **replays},
            config={"method": method, "optimizer": {"lr": 1e-3}, "steps": steps},
            files=train_files(steps, k, method),
            seconds=60.0 + 9 * k,
            memory=3 << 30,
        )
        if method == "seekr":
            _remember(out, tasks[: k + 1], rows, model, replays, heads_json(k, shape))
        out.commit(
            "evaluate",
            task,
            inputs={f"model.{task}": model, **data},
            files={
                "scores.json": scores_json(tasks, k, forget),
                "predictions.parquet": predictions(tasks[: k + 1], k, forget),
            },
            seconds=20.0 + 6 * k,
            memory=1 << 30,
        )
    config = {
        "name": name,
        "model": {"path": "models/tiny-7b", "dtype": "bfloat16"},
        "method": {"name": method, "head_budget": 128},
        "replay": {"ratio": 0.01},
        "data": {"max_answer_length": 16},
        "tasks": [{"name": task, "train": f"data/{task}.jsonl"} for task in tasks],
        "tracking": {"uri": "http://ada:hunter2@mlflow.example:5000"},
    }
    return StreamView(
        name=name,
        method=method,
        model="tiny-7b",
        tasks=tuple(tasks),
        config=config,
        stages=tuple(out.stages),
    )


def _remember(
    out: Committer,
    known: Sequence[str],
    rows: StageResult,
    model: StageResult,
    replays: dict[str, StageResult],
    heads: bytes,
) -> None:
    """What SEEKR keeps of the newest task; the first task's targets are made again after each."""
    task, k = known[-1], len(known) - 1
    drawn = out.commit(
        "sample",
        task,
        inputs={"data": rows},
        files={"replay.parquet": b"r" * replay_bytes(k)},
        rows=10,
    )
    scores = out.commit(
        "score",
        task,
        inputs={"after": model, "replay": drawn},
        files={"scores.parquet": b"s" * 900},
        seconds=12.0,
        memory=2 << 30,
    )
    chosen = out.commit("select", task, inputs={"scores": scores}, files={"heads.json": heads})
    replays[f"replay.{task}"] = drawn
    for name in known[:1] if k == 0 else (known[0], task):
        replays[f"targets.{name}"] = out.commit(
            "teach",
            task if name == task else retaught(name, task),
            inputs={"teacher": model, "replay": replays[f"replay.{name}"], "heads": chosen},
            files={"targets.parquet": b"t" * target_bytes(k)},
            seconds=8.0,
            rows=10,
        )


def replay_bytes(k: int) -> int:
    return 20_000 + 900 * k


def target_bytes(k: int) -> int:
    """Of targets that were written after the k-th task, counted from 0."""
    return 90_000 + 5000 * k


def score_of(i: int, j: int, forget: float = FORGET) -> float:
    """R[i][j] from 0; i = -1 is the base model."""
    if i < 0:
        return BASE_SCORE
    return max(0.0, FIRST - 0.02 * j - forget * (i - j)) if j <= i else BASE_SCORE + 0.05


def scores_json(tasks: Sequence[str], k: int, forget: float = FORGET) -> bytes:
    pairs = [(k, j) for j in range(k + 1)] + ([(k - 1, k), (-1, k)] if k else [])
    cells = [
        {
            "model_after": "base" if i < 0 else tasks[i], "task": tasks[j], "metric": "rouge_l",
            "score": score_of(i, j, forget), "rows": 100, "seconds": 2.0,
        }
        for i, j in pairs
    ]  # fmt: skip
    return json.dumps({"cells": cells, "decoding": {"max_new_tokens": 50}}).encode()


def train_files(steps: int, k: int, method: str) -> dict[str, bytes]:
    rows = []
    for n in range(1, steps + 1):
        task = 0.4 + 2.2 * math.exp(-4 * n / steps) + 0.06 * math.sin(n * 1.7 + k)
        row = {
            "step": n,
            "epoch": 0,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens": 900,
            "seconds": 0.5,
            "tokens_per_second": 1800.0,
            "memory_bytes": 1 << 30,
            "at": 1_795_000_000.0 + n,
            "mfu": 0.4,
        }
        parts = {"task": task}
        if method == "seekr" and k:
            parts |= {
                "replay": 0.5 * task + 0.02 * math.cos(n),
                "logits": 0.3 * task,
                "attention": 0.1 / (1 + n),
            }
        rows.append(row | parts | {"loss": sum(parts.values())})
    return {
        "history.json": json.dumps({"steps": rows}).encode(),
        "model/config.json": b"{}",
        "model/model.safetensors": bytes(50_000 + k),
    }


def heads_json(k: int, shape: tuple[int, int]) -> bytes:
    layers, heads = shape
    importance = [
        [
            math.exp(-((layer - 0.55 * layers) ** 2) / (0.08 * layers * layers))
            * (0.5 + 0.5 * math.sin(3.1 * head + 1.3 * layer + 0.4 * k)) ** 2
            for head in range(heads)
        ]
        for layer in range(layers)
    ]
    ranked = sorted(
        ((v, la, h) for la, r in enumerate(importance) for h, v in enumerate(r)), reverse=True
    )
    chosen = sorted([la, h] for _, la, h in ranked[: max(1, layers * heads // 8)])
    content = {
        "num_layers": layers, "num_heads": heads, "heads": chosen, "importance": importance,
        "sensitivity": importance, "forgettability": importance, "layers": sorted({la for la, _ in
        chosen}), "settings": {"heads": len(chosen)},
    }  # fmt: skip
    return json.dumps(content).encode()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def predictions(tasks: Sequence[str], k: int, forget: float) -> bytes:
    """100 test rows per task whose scores have the mean that scores.json tells."""
    names, ids, scores = [], [], []
    for j, task in enumerate(tasks):
        right = round(100 * score_of(k, j, forget))
        names += [task] * 100
        ids += [f"{task}-{row}" for row in range(100)]
        scores += [float(row < right) for row in range(100)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"task": names, "row_id": ids, "score": scores}), sink)
    return sink.getvalue()
