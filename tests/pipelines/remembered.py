"""A store with rows in every place where rows can be, written as the stages would, and a search through
all of its bytes.

Two tasks, `letters` and `notes`. Rows are numbered; row `n` of a task has a text and tokens that no other
row has, so that whatever is left of it is found.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifact import StageRecord
from pipelines.forgotten import quarantined_id
from pipelines.results import StageResult
from pipelines.rowsets import ROW_SCHEMA
from pipelines.score import SCORE_SCHEMA, STATISTICS
from pipelines.store import Store
from pipelines.teach import TARGET_SCHEMA
from seekr.prompts import row_id_of
from tests.pipelines.committed import Committer

TASKS = ("letters", "notes")
NUM_TRAIN, NUM_TEST, NUM_REPLAYED = 12, 4, 4
QUARANTINED = "a line that is no JSON and names somebody"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row, with all that could be found of it."""

    task: str
    number: int
    definition: str | None = None

    @property
    def input(self) -> str:
        word = hashlib.sha256(f"{self.task}/{self.number}".encode()).hexdigest()[:20]
        return f"the {self.task} of person {word}"

    @property
    def answer(self) -> str:
        return f"answer {self.input[-12:]}"

    @property
    def row_id(self) -> str:
        return row_id_of(self.input, (self.answer,), self.definition)

    @property
    def tokens(self) -> list[int]:
        """Template, definition, input and answer, spelt by character."""
        before = [3, 4, 5, *(map(ord, self.definition or ""))]
        return [*before, *self._spelt, 7, 1]

    @property
    def _spelt(self) -> list[int]:
        first = 1000 * self.number + 100_000 * len(self.task)
        return [first + ord(character) for character in self.input]

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - 2

    def record(self, **changed: Any) -> dict[str, Any]:
        whole = {
            "row_id": self.row_id,
            "input": self.input,
            "references": [self.answer],
            "input_ids": self.tokens,
            "prompt_length": self.prompt_length,
        }
        return whole | changed

    def secrets(self) -> list[bytes]:
        """Byte patterns none of which may be left: text, id, tokens."""
        own = self._spelt
        return [
            self.input.encode(),
            self.answer.encode(),
            self.row_id.encode(),
            bytes.fromhex(self.row_id),
            np.array(own, dtype="<i4").tobytes(),
            np.array(own, dtype="<i8").tobytes(),
        ]


def rows_of(task: str, definition: str | None = None) -> list[Row]:
    """The training rows of a task, then its test rows."""
    numbers = range(1, NUM_TRAIN + NUM_TEST + 1)
    return [Row(task=task, number=number, definition=definition) for number in numbers]


def parquet(
    records: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
    *,
    codec: str = "snappy",
    group: int = 5,
) -> bytes:
    """A Parquet file with several row groups."""
    sink = io.BytesIO()
    table = pa.Table.from_pylist(list(records), schema=schema)
    pq.write_table(table, sink, compression=codec, row_group_size=group)
    return sink.getvalue()


def targets(rows: Iterable[Row]) -> bytes:
    """What a teacher keeps of rows; not compressed, so that pages are searched as they are."""
    records = [{"row_id": row.row_id, "target": row.row_id.encode() * 3} for row in rows]
    return parquet(records, TARGET_SCHEMA, codec="none")


def scores(rows: Iterable[Row]) -> bytes:
    numbers = {name: [0.5, 0.25] for name in STATISTICS}
    records = [{"row_id": r.row_id, "length": 9, "num_queries": 2} | numbers for r in rows]
    return parquet(records, SCORE_SCHEMA)


def predictions(rows: Iterable[Row], task: str) -> bytes:
    records = [
        {
            "model_after": task,
            "task": row.task,
            "row_id": row.row_id,
            "prediction": "no",
            "references": [row.answer],
            "score": 0.0,
        }
        for row in rows
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue()


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def commit_ingest(out: Committer, rows: Sequence[Row], task: str) -> StageResult:
    """Two files of training rows, one of them not compressed, test rows and a quarantine."""
    train, test = rows[:NUM_TRAIN], rows[NUM_TRAIN:]
    schema = ROW_SCHEMA
    quarantine = [
        {"file": "a.jsonl", "line": 3, "reason": "not JSON", "text": QUARANTINED},
        {"file": "a.jsonl", "line": 9, "reason": "not JSON", "text": "{nobody"},
    ]
    found = out.commit(
        "ingest",
        task,
        config={"columns": {"input": None, "output": None, "definition": None}},
        sources={"train": f"digest of {task}"},
        files={
            "rows/kind=train/a.parquet": parquet([r.record() for r in train[:7]], schema),
            "rows/kind=train/b.parquet": parquet(
                [r.record() for r in train[7:]], schema, codec="none", group=2
            ),
            "rows/kind=test/a.parquet": parquet([r.record() for r in test], schema),
            "quarantine.json": as_json(quarantine),
        },
        rows=len(rows),
    )
    stats = {"train_rows": len(train), "test_rows": len(test), "quarantined": len(quarantine)}
    return with_stats(out, found, stats | {"test_rows_in_train": 0})


def with_stats(out: Committer, found: StageResult, stats: dict[str, Any]) -> StageResult:
    record = replace(found.record, stats=stats)
    record.save(out.store)
    result = replace(found, artifact=replace(found.artifact, record=record))
    out.stages[-1] = result
    return result


def commit_replay(out: Committer, task: str, rows: Sequence[Row], data: StageResult) -> StageResult:
    kept = [row.record() for row in rows[:NUM_REPLAYED]]
    return out.commit(
        "sample", task, inputs={"data": data}, rows=len(kept),
        files={"replay/rows.parquet": parquet(kept, ROW_SCHEMA)},
    )  # fmt: skip


def commit_store(store: Store) -> dict[str, StageResult]:
    """Fill a store; returns the finished artifacts by `stage/task`."""
    out = Committer(store)
    letters, notes = (rows_of(task) for task in TASKS)
    data = {task: commit_ingest(out, rows_of(task), task) for task in TASKS}
    first = out.commit(
        "train", "letters", inputs={"data.letters": data["letters"]},
        files={"model/config.json": b"{}", "model/model.safetensors": bytes(64)}, rows=100,
    )  # fmt: skip
    replay = {task: commit_replay(out, task, rows_of(task), data[task]) for task in TASKS}
    kept = letters[:NUM_REPLAYED]
    out.commit(
        "score", "letters", inputs={"after": first, "replay": replay["letters"]},
        files={"scores/rows.parquet": scores(kept)}, rows=len(kept),
    )  # fmt: skip
    taught = out.commit(
        "teach", "letters", inputs={"teacher": first, "replay": replay["letters"]},
        files={"targets/rows.parquet": targets(kept)}, rows=len(kept),
    )  # fmt: skip
    borrowed = [borrowed_row(row, "letters") for row in notes[:6]]
    lent = out.commit(
        "borrow", "notes", rows=len(borrowed),
        inputs={"model": first, "data": data["notes"], "replay.letters": replay["letters"]},
        files={"replay/rows.parquet": parquet(borrowed, ROW_SCHEMA)},
    )  # fmt: skip
    second = out.commit(
        "train", "notes",
        inputs={
            "data.notes": data["notes"], "model": first, "replay.letters": replay["letters"],
            "targets.letters": taught, "replay.notes--borrowed": lent,
        },
        files={"model/config.json": b"{}", "model/model.safetensors": bytes(65)}, rows=100,
    )  # fmt: skip
    # Grown from the second and trained on other rows.
    other = commit_ingest(out, rows_of("other"), "other")
    out.commit(
        "train", "other", inputs={"data.other": other, "model": second},
        files={"model/config.json": b"{}", "model/model.safetensors": bytes(66)}, rows=100,
    )  # fmt: skip
    out.commit(
        "evaluate", "letters", inputs={"model.letters": first, "data.letters": data["letters"]},
        files={
            "predictions.parquet": predictions(letters[NUM_TRAIN:], "letters"),
            "scores.json": as_json({"cells": []}),
        },
        rows=NUM_TEST,
    )  # fmt: skip
    examples = [
        {"row_id": row.row_id, "tokens": [row.input, "!"], "weights": [1.0, 0.0]}
        for row in letters[:3]
    ]
    values = pa.schema([("row_id", pa.string()), ("values", pa.list_(pa.float32()))])
    weights = [{"row_id": row.row_id, "values": [0.5]} for row in letters[:NUM_TRAIN]]
    out.commit(
        "weights", "letters", inputs={"data": data["letters"]}, rows=NUM_TRAIN,
        files={
            "weights/rows.parquet": parquet(weights, values), "examples.json": as_json(examples),
        },
    )  # fmt: skip
    return {f"{result.stage}/{result.task}": result for result in out.stages}


def borrowed_row(row: Row, task: str) -> dict[str, Any]:
    """An earlier task's question about a row's input, as the stage `borrow` makes it."""
    tokens = [3, 4, 5, *row.tokens[3:-2], 8, 1]
    return row.record(
        row_id=row_id_of(row.input, [task], "borrowed"),
        references=["what the model said"],
        input_ids=tokens,
        prompt_length=len(tokens) - 2,
    )


def leave_unfinished(store: Store, done: Mapping[str, StageResult]) -> dict[str, str]:
    """What killed runs have left of stages of which none is finished; returns their keys by name."""
    row = rows_of("letters")[0]
    keys = {
        name: f"{name.rstrip('12')}/letters/{hashlib.sha256(name.encode()).hexdigest()[:20]}"
        for name in ("train1", "train2", "sample", "ingest")
    }
    affected = {"data.letters": done["ingest/letters"].record.key}
    other = {"data.other": done["ingest/other"].record.key}
    inputs = {"train1": affected, "train2": other, "sample": affected, "ingest": {}}
    for name, key in keys.items():
        store.write_json(f"{key}/.lease/attempts.json", {"attempts": 1, "inputs": inputs[name]})
        message = f"diverged; the rows are letters/{row.row_id}"
        store.write_json(f"{key}/failure.json", {"attempt": 1, "message": message})
    for name in ("train1", "train2"):
        store.write_bytes(f"{keys[name]}/checkpoints/step-1/weights.safetensors", bytes(32))
    half = parquet([row.record()], ROW_SCHEMA)
    store.write_bytes(f"{keys['sample']}/replay/half.parquet", half)
    store.write_bytes(f"{keys['ingest']}/rows/kind=train/half.parquet", half)
    # Inside a finished one: the temporary file of a write that was killed.
    store.write_bytes(f"{done['sample/letters'].record.key}/replay/.tmp-1-rows.parquet", half)
    return keys


def leave_reports(store: Store, done: Mapping[str, StageResult]) -> None:
    """Reports of a stream that has the rows, and of one that has not."""
    page = f"<p>{rows_of('letters')[0].input}</p>".encode()
    every = [result.record.key for result in done.values()]
    none = [done["ingest/other"].record.key]
    for name, keys in (("both", every), ("other", none)):
        log = {"ran": keys, "reused": [], "finished_at": "2026-11-20T09:00:00+00:00"}
        store.write_json(f"streams/{name}/last_run.json", log)
        store.write_bytes(f"streams/{name}/report.html", page if name == "both" else b"<p>.</p>")
        store.write_json(f"mlflow/artifacts/{name}/artifacts/stream.json", {"name": name})
        path = f"mlflow/artifacts/{name}/artifacts/report.html"
        store.write_bytes(path, page if name == "both" else b"<p>.</p>")


def contents(store: Store) -> dict[str, bytes]:
    """Every file of a store but those of leases."""
    return {
        file.path: store.read_bytes(file.path)
        for file in store.list_all()
        if "/.lease/" not in file.path
    }


def forms(path: str, data: bytes) -> Iterator[bytes]:
    """A file as it is, and what is packed in it."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if path.endswith(".parquet") and data[:4] == b"PAR1":
        table = pq.read_table(io.BytesIO(data))
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        yield sink.getvalue()


def traces(store: Store, rows: Iterable[Row]) -> list[str]:
    """The files in which anything of some rows is left, leases included."""
    secrets = [secret for row in rows for secret in row.secrets()]
    found: list[str] = []
    for file in store.list_all():
        data = store.read_bytes(file.path)
        if any(secret in form for form in forms(file.path, data) for secret in secrets):
            found.append(file.path)
    return found


def table_of(store: Store, record: StageRecord, folder: str = "") -> pa.Table:
    """All rows of an artifact's Parquet files below a folder."""
    names = [o.path for o in record.outputs if o.path.endswith(".parquet")]
    chosen = [name for name in names if name.startswith(folder)]
    return pa.concat_tables(
        pq.read_table(io.BytesIO(store.read_bytes(f"{record.key}/{name}"))) for name in chosen
    )


QUARANTINED_ID = quarantined_id(QUARANTINED)
