"""Ingest: source files become tokenised rows in Parquet, and a quarantine of the rows that could not.

Ray tasks read a file each, encode its rows and hand on good and bad alike; a sort by row id then drops
repeated content, so the result does not depend on how the files were cut.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import Dataset

from pipelines.config import StreamConfig
from pipelines.monitor import Reporter
from pipelines.readers import read_rows as read_source_rows
from pipelines.rows import BadRow, Columns, SourceRow
from pipelines.rowsets import ROW_SCHEMA, TEST, TRAIN, write_rows
from pipelines.sources import SourceFile, list_files
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.errors import DataError
from seekr.models import load_tokenizer
from seekr.prompts import Example, Template, encode
from seekr.sampling import priority

QUARANTINE = "quarantine.json"
# A limit on rows draws them with this seed, apart from the replay draw.
_LIMIT_SEED = 0


def ingest(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes train/, test/ and quarantine.json."""
    named = next(item for item in config.tasks if item.name == task)
    settings = workspace.config
    stats: dict[str, int] = {}
    quarantine: list[dict[str, Any]] = []
    for part, source in ((TRAIN, named.train), (TEST, named.test)):
        encoder = _Encoder(
            model=str(config.model.path),
            trust_remote_code=config.model.trust_remote_code,
            settings=dict(settings),
        )
        files = [{"file": file} for file in list_files(source)]
        read = ray.data.from_items(files).flat_map(encoder).materialize()
        bad = read.filter(expr="bad_reason != ''").take_all()
        quarantine += [
            {"part": part, **{key[4:]: row[key] for key in row if key.startswith("bad_")}}
            for row in bad
        ]
        rows = _distinct(read.filter(expr="bad_reason == ''"))
        rows = _limited(rows, settings[f"{part}_rows"])
        rows = rows.materialize()
        stats[f"{part}_rows"] = rows.count()
        if stats[f"{part}_rows"] == 0:
            raise DataError(
                f"task {task}: no {part} row of {source} can be encoded; the first reason is "
                f"{quarantine[0]['reason'] if quarantine else 'unknown'!r}: correct the rows"
            )
        write_rows(rows, workspace, part)
        report.post(force=True, rows_done=sum(stats.values()))
    stats["quarantined"] = len(quarantine)
    workspace.write_json(QUARANTINE, quarantine)
    return StageOutcome(rows=stats["train_rows"] + stats["test_rows"], stats=stats)


class _Encoder:
    """Reads one file and yields encoded rows, or the reason why one cannot be."""

    def __init__(self, *, model: str, trust_remote_code: bool, settings: dict[str, Any]) -> None:
        self._model, self._trust_remote_code, self._settings = model, trust_remote_code, settings

    def __call__(self, item: dict[str, SourceFile]) -> Iterator[dict[str, Any]]:
        columns = Columns(**self._settings["columns"])
        for row in read_source_rows(item["file"], columns):
            yield self._bad(row) if isinstance(row, BadRow) else self._encoded(row)

    def _encoded(self, row: SourceRow) -> dict[str, Any]:
        settings = self._settings
        example = Example(input=row.input, references=row.references, definition=row.definition)
        try:
            encoded = encode(
                example,
                Template.parse(settings["template"]),
                _tokenizer(self._model, self._trust_remote_code),
                max_length=settings["max_length"],
                max_answer_length=settings["max_answer_length"],
                truncate=settings["truncate"],
            )
        except DataError as error:
            return self._bad(
                BadRow(file=row.file, line=row.line, reason=str(error), text=row.input[:200])
            )
        return encoded.to_record() | {f"bad_{name}": "" for name in ("file", "reason", "text")} | {
            "bad_line": 0
        }

    def _bad(self, row: BadRow) -> dict[str, Any]:
        empty = {"row_id": "", "input": "", "references": [""], "input_ids": [0]}
        reason = {f"bad_{name}": value for name, value in asdict(row).items()}
        return empty | {"prompt_length": 0} | reason


@functools.lru_cache(maxsize=2)
def _tokenizer(model: str, trust_remote_code: bool) -> Any:
    return load_tokenizer(model, trust_remote_code=trust_remote_code)


def _distinct(rows: Dataset) -> Dataset:
    """Sort by row id and keep one row per id; equal ids meet in one block after the sort."""

    def first_of_each(table: pa.Table) -> pa.Table:
        ids = table["row_id"].combine_chunks()
        if len(ids) > 1:
            fresh = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1))
            table = table.filter(pa.concat_arrays([pa.array([True]), fresh.combine_chunks()]
                                 if isinstance(fresh, pa.ChunkedArray)
                                 else [pa.array([True]), fresh]))
        return table.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)

    return rows.sort("row_id").map_batches(first_of_each, batch_size=None, batch_format="pyarrow")


def _limited(rows: Dataset, limit: int | None) -> Dataset:
    """Keep the `limit` rows with the smallest hash."""
    if limit is None:
        return rows
    ids = [row["row_id"] for row in rows.select_columns(["row_id"]).take_all()]
    kept = pa.array(sorted(ids, key=lambda row_id: priority(_LIMIT_SEED, row_id))[:limit])
    return rows.map_batches(
        lambda table: table.filter(pc.is_in(table["row_id"], value_set=kept)),
        batch_format="pyarrow",
        batch_size=None,
    )
