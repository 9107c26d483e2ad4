"""Ingest: source files become tokenised rows in Parquet, and a quarantine of the rows that could not.

One Ray task per file reads, encodes and hands on good and bad rows alike, and one pass writes all of
them, in a folder per kind. Only sources that repeat themselves are shuffled, to drop the repetitions.
Of rows that the store has forgotten nothing is written but how many there were.
What is written does not depend on how files were cut, but for its order, which carries no meaning.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from pyarrow.dataset import field as column
from ray.data import Dataset, SaveMode

from pipelines.config import StreamConfig
from pipelines.forgotten import ForgottenRows
from pipelines.inspection import inspect
from pipelines.monitor import Reporter
from pipelines.readers import read_rows as read_source_rows
from pipelines.row_ids import is_forgotten
from pipelines.rows import EXCERPT_CHARS, BadRow, Columns, SourceRow
from pipelines.rowsets import BAD, FOCUS, ROWS, TEST, TRAIN, VALIDATION, smallest
from pipelines.sources import SourceFile, list_files
from pipelines.stage import StageOutcome
from pipelines.transfer import cache_folder
from pipelines.workspace import Workspace
from seekr.errors import DataError
from seekr.fact_probes import answer_tokens
from seekr.models import load_tokenizer
from seekr.prompts import Example, Template, encode, encode_document, start_ids

QUARANTINE = "quarantine.json"
# A limit on rows draws them with this seed, apart from the replay draw.
_LIMIT_SEED = 0
_VALIDATION_SEED = 1
_REASON = ("file", "line", "reason", "text")
# Ends the kind of rows that are left out, while they are counted.
_FORGOTTEN = "-forgotten"


def ingest(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes rows/kind={train,test,validation}/ and quarantine.json."""
    named = next(item for item in config.sources if item.name == task)
    settings = dict(workspace.config)
    sources = {TRAIN: named.train} | ({TEST: named.test} if named.test is not None else {})
    items = [{"kind": kind, "file": f} for kind, s in sources.items() for f in list_files(s)]
    forgotten = ForgottenRows.load(workspace.store)
    encoder = _Encoder(str(config.model.path), config.model.trust_remote_code, settings, forgotten)
    rows = ray.data.from_items(items).flat_map(encoder)
    if any(_repeats(source, _columns(settings, kind)) for kind, source in sources.items()):
        rows = _distinct(rows)
    limits = {kind: settings[f"{kind}_rows"] for kind in sources if settings[f"{kind}_rows"]}
    if limits:
        rows = _limited(rows.materialize(), limits)
    if settings["validation_rows"]:
        rows = _held_out(rows.materialize(), settings["validation_rows"])
    rows.write_parquet(
        workspace.full_path(ROWS),
        filesystem=workspace.store.filesystem,
        mode=SaveMode.OVERWRITE,
        partition_cols=["kind"],
    )
    left_out = {f"{kind}_rows_forgotten": _left_out(workspace, kind) for kind in (*sources, BAD)}
    quarantine = _quarantined(workspace)
    workspace.write_json(QUARANTINE, quarantine)
    stats = {f"{kind}_rows": _count(workspace, kind) for kind in sources}
    for kind, source in sources.items():
        if stats[f"{kind}_rows"] == 0:
            reason = quarantine[0]["reason"] if quarantine else "none was read"
            if left_out[f"{kind}_rows_forgotten"]:
                reason = f"{left_out[f'{kind}_rows_forgotten']} of them are forgotten"
            raise DataError(
                f"task {task}: no {kind} row of {source} can be encoded, the first reason is: "
                f"{reason}; at least one is needed: correct the rows"
            )
    num_rows = sum(stats.values())
    report.post(force=True, rows_done=num_rows)
    if settings["validation_rows"]:
        stats["validation_rows"] = _count(workspace, VALIDATION)
    stats["quarantined"] = len(quarantine)
    stats |= {name: count for name, count in left_out.items() if count}
    if TEST in sources:
        stats["test_rows_in_train"] = len(_ids(workspace, TRAIN) & _ids(workspace, TEST))
    return StageOutcome(rows=num_rows + stats.get("validation_rows", 0), stats=stats)


class _Encoder:
    """Reads one file and yields encoded rows, or the reason why one cannot be."""

    def __init__(
        self,
        model: str,
        trust_remote_code: bool,
        settings: dict[str, Any],
        forgotten: ForgottenRows,
    ) -> None:
        self._model, self._trust_remote_code, self._settings = model, trust_remote_code, settings
        self._forgotten = forgotten

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        file: SourceFile = item["file"]
        for row in read_source_rows(file, _columns(self._settings, item["kind"])):
            record = _bad(row) if isinstance(row, BadRow) else self._encoded(row, item["kind"])
            record = {"kind": item["kind"]} | record
            yield _nothing_of(record) if is_forgotten(row, self._forgotten) else record

    def _encoded(self, row: SourceRow, kind: str) -> dict[str, Any]:
        settings = self._settings
        tokenizer = _tokenizer(self._model, self._trust_remote_code)
        if kind == TRAIN and settings["columns"].get("text") is not None:
            return self._document(row, tokenizer)
        example = Example(input=row.input, references=row.references, definition=row.definition)
        try:
            encoded = encode(
                example,
                Template.parse(settings["template"]),
                tokenizer,
                max_length=settings["max_length"],
                max_answer_length=settings["max_answer_length"],
                truncate=settings["truncate"],
            )
        except DataError as error:
            text = row.input[:EXCERPT_CHARS]
            return _bad(BadRow(file=row.file, line=row.line, reason=str(error), text=text))
        return encoded.to_record() | {name: None for name in _REASON}

    def _document(self, row: SourceRow, tokenizer: Any) -> dict[str, Any]:
        (text,), length = row.references, self._settings["max_length"]
        document = encode_document(text, tokenizer, max_length=length, focus=row.focus)
        record = document.to_record() | {name: None for name in _REASON}
        if self._settings["columns"]["focus"] is not None:
            first, last = len(start_ids(tokenizer)), len(document.input_ids) - 1
            marked = np.any([answer_tokens(tokenizer, text, part) for part in row.focus], axis=0)
            places = np.flatnonzero(marked) + first
            record[FOCUS] = places[places < last].tolist()
        return record


def _bad(row: BadRow) -> dict[str, Any]:
    empty = {"row_id": "", "input": "", "references": [""], "input_ids": [0], "prompt_length": 0}
    return empty | asdict(row) | {"kind": BAD}


def _nothing_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the kind of a row that is left out and nothing else of it."""
    empty = {"row_id": "", "input": "", "references": [""], "input_ids": [0], "prompt_length": 0}
    nothing: dict[str, Any] = {name: None for name in record} | empty
    return nothing | {"kind": record["kind"] + _FORGOTTEN}


@functools.lru_cache(maxsize=2)
def _tokenizer(model: str, trust_remote_code: bool) -> Any:
    return load_tokenizer(model, trust_remote_code=trust_remote_code)


def _columns(settings: dict[str, Any], kind: str) -> Columns:
    """Return the columns of the training or the test rows."""
    columns = Columns(**settings["columns"])
    return columns if kind == TRAIN else columns.of_questions


def _repeats(source: str, columns: Columns) -> bool:
    """Tell from the source's report, which the run's start has cached, whether rows occur twice."""
    return inspect(source, columns, cache_dir=cache_folder() / "sources").num_duplicates > 0


def _distinct(rows: Dataset) -> Dataset:
    """Keep one row per kind and id; equal ones meet in one block after the sort."""

    def first_of_each(table: pa.Table) -> pa.Table:
        pairs = zip(table["kind"].to_pylist(), table["row_id"].to_pylist(), strict=True)
        before = itertools.chain([None], pairs)
        pairs = zip(table["kind"].to_pylist(), table["row_id"].to_pylist(), strict=True)
        fresh = [pair != last or pair[1] == "" for pair, last in zip(pairs, before, strict=False)]
        return table.filter(pa.array(fresh, pa.bool_()))

    return rows.sort(["kind", "row_id"]).map_batches(
        first_of_each, batch_size=None, batch_format="pyarrow"
    )


def _limited(rows: Dataset, limits: dict[str, int]) -> Dataset:
    """Keep the rows with the smallest hash of each kind that has a limit."""
    kept = {kind: smallest(rows, kind, size, _LIMIT_SEED) for kind, size in limits.items()}

    def wanted(table: pa.Table) -> pa.Table:
        for kind, ids in kept.items():
            table = table.filter((column("kind") != kind) | column("row_id").isin(ids))
        return table

    return rows.map_batches(wanted, batch_format="pyarrow", batch_size=None)


def _held_out(rows: Dataset, size: int) -> Dataset:
    """Make the training rows with the smallest hash a kind of their own."""
    kept = smallest(rows, TRAIN, size, _VALIDATION_SEED)

    ids = set(kept.to_pylist())

    def moved(table: pa.Table) -> pa.Table:
        pairs = zip(table["kind"].to_pylist(), table["row_id"].to_pylist(), strict=True)
        kinds = [VALIDATION if kind == TRAIN and row in ids else kind for kind, row in pairs]
        place = table.schema.get_field_index("kind")
        return table.set_column(place, "kind", pa.array(kinds, pa.string()))

    return rows.map_batches(moved, batch_format="pyarrow", batch_size=None)


def _quarantined(workspace: Workspace) -> list[dict[str, Any]]:
    """Move the bad rows from Parquet to one readable file."""
    folder = f"{ROWS}/kind={BAD}"
    if not workspace.store.list(workspace.path(folder)):
        return []
    table = pq.read_table(
        workspace.full_path(folder),
        filesystem=workspace.store.filesystem,
        columns=list(_REASON),
        partitioning=None,  # pyright: ignore[reportArgumentType]
    )
    workspace.store.remove(workspace.path(folder))
    return table.sort_by([("file", "ascending"), ("line", "ascending")]).to_pylist()


def _left_out(workspace: Workspace, kind: str) -> int:
    """Count the rows of a kind that were forgotten, and remove what they were counted by."""
    count = _count(workspace, kind + _FORGOTTEN)
    workspace.store.remove(workspace.path(f"{ROWS}/kind={kind}{_FORGOTTEN}"))
    return count


def _ids(workspace: Workspace, kind: str) -> set[str]:
    table = pq.read_table(
        workspace.full_path(f"{ROWS}/kind={kind}"),
        filesystem=workspace.store.filesystem,
        columns=["row_id"],
        partitioning=None,  # pyright: ignore[reportArgumentType]
    )
    return set(table["row_id"].to_pylist())


def _count(workspace: Workspace, kind: str) -> int:
    """Count rows by the footers of the written files."""
    filesystem = workspace.store.filesystem
    return sum(
        pq.read_metadata(workspace.store.full_path(file.path), filesystem=filesystem).num_rows
        for file in workspace.store.list(workspace.path(f"{ROWS}/kind={kind}"))
    )
