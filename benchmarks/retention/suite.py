"""From configurations, orders and seeds to streams, and from finished streams to raw rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.retention import tasks
from pipelines.results import StreamView
from pipelines.stream import Stream, open_stream
from pipelines.tables import summary

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
BASE = Path(__file__).with_name("stream.yaml")
TRAIN_ROWS, TEST_ROWS = 1000, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One configuration on one order with one seed, which draws strings, replay sets and row order."""

    configuration: str
    order: str
    seed: int
    stream: Stream


def write_streams(
    out: Path, configurations: Mapping[str, Any], orders: Sequence[str], seeds: Sequence[int]
) -> list[Run]:
    """Write data and a YAML per run below `out`, and open the streams.

    Runs of one seed and order stand together, so that what they share is soon there.
    """
    for seed in seeds:
        tasks.write(
            out / "data" / f"seed-{seed}", train_rows=TRAIN_ROWS, test_rows=TEST_ROWS, seed=seed
        )
    found: list[Run] = []
    for seed in seeds:
        for order in orders:
            for name, changes in configurations.items():
                values = _values(out, name, changes, order, seed)
                path = out / "streams" / f"{values['name']}.yaml"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
                stream = open_stream(path, writable=True)
                found.append(Run(configuration=name, order=order, seed=seed, stream=stream))
    return found


def _values(
    out: Path, name: str, changes: Mapping[str, Any], order: str, seed: int
) -> dict[str, Any]:
    values = _merged(yaml.safe_load(BASE.read_text(encoding="utf-8")), changes)
    data = (out / "data" / f"seed-{seed}").absolute()
    return values | {
        "name": f"{name}-order-{order}-seed-{seed}",
        "seed": seed,
        "model": {"path": str(MODEL)},
        "storage": str((out / "store").absolute()),
        "tasks": [
            {
                "name": task,
                "train": str(data / task / "train.jsonl"),
                "test": str(data / task / "test.jsonl"),
                "template": tasks.TEMPLATE.format(task=task),
            }
            for task in tasks.ORDERS[order]
        ],
    }


def _merged(base: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping with changes laid over it; a method replaces the other as a whole."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if inner and key != "method" else value
    return merged


def raw_row(run: Run, view: StreamView) -> dict[str, Any]:
    """Return what a run has to say, as JSON values."""
    stages = [result.record for result in view.stages]
    return {
        "configuration": run.configuration,
        "order": run.order,
        "seed": run.seed,
        **summary(view),
        "seconds": round(view.seconds(), 1),
        "train_seconds": round(
            sum(record.stats["step_seconds"] for record in stages if record.stage == "train"), 1
        ),
        "peak_memory_bytes": max(record.peak_memory_bytes or 0 for record in stages),
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
