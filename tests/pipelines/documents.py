"""A small stream about documents on the disk: planted facts, a word per token, a random model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.planted_facts.data import planted_facts
from benchmarks.planted_facts.model import write_model
from tests.pipelines.streams import write_rows, write_yaml

FIRST, SECOND = "one", "two"
ROWS = 6
META = {
    "pairs": "data/meta.jsonl",
    "max_length": 48,
    "epochs": 2,
    "batch_size": 4,
    "episode_size": 4,
    "held_out": 2,
    "inner_learning_rate": 0.01,
    "learning_rate": 0.01,
    "checkpoint_every": 1,
}
ATTENTION = {"by": "train_attention", "meta": META}


def document_values(**changes: Any) -> dict[str, Any]:
    """Return the YAML: two tasks of a few documents, facts to learn and facts not to forget."""
    values: dict[str, Any] = {
        "name": "documents",
        "model": {"path": "model"},
        "method": {"name": "seqft"},
        "data": {"max_length": 48, "columns": {"text": "evidence", "focus": "object"}},
        "tasks": [{"name": name, "train": f"data/{name}.jsonl"} for name in (FIRST, SECOND)],
        "probes": [
            {"name": "new", "data": "data/new.jsonl", "role": "to_learn"},
            {"name": "old", "data": "data/known.jsonl", "role": "not_to_forget"},
        ],
        "replay": {"ratio": 0.5},
        "train": {"epochs": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.003},
        "tracking": {"uri": "off"},
        "ray": {"num_cpus": 2},
        "storage": "store",
    }
    for probe in values["probes"]:
        probe |= {"sentence": "task_descriptive", "answer": "object"}
    return values | changes


def make_documents(folder: Path, **changes: Any) -> Path:
    """Write model, rows and YAML into a folder; returns the YAML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = planted_facts(known=8, lessons=1, to_learn=2 * ROWS, meta=10)
    write_model(folder / "model", hidden=32, layers=2)
    parts: Mapping[str, Any] = {
        FIRST: sets.to_learn[:ROWS],
        SECOND: sets.to_learn[ROWS:],
        "new": sets.to_learn,
        "known": sets.known,
        "lessons": sets.lessons,
        "meta": sets.meta,
    }
    for name, rows in parts.items():
        named = [row | {"relation": row["relation_label"]} for row in rows]  # TemporalWiki's name
        write_rows(folder / "data" / f"{name}.jsonl", named)
    values = document_values(**changes)
    values["storage"] = str(folder / values["storage"])
    return write_yaml(folder / "stream.yaml", values)
