"""A source's files become one stream of rows, good and bad, whatever their layout.

There is one reader per layout, and all of them end in `rows.make_row`. JSON Lines, Parquet and
Arrow are streamed: memory is bounded by a line or a row group. The two layouts that are one JSON
document are held in memory while they are read. What makes a file unusable as a whole, such as a
document that does not parse, is a `DataError`; what makes one row unusable is a `BadRow`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.rows import (
    HEADER_DEFINITION,
    BadRow,
    Columns,
    FoundColumns,
    SourceRow,
    bad_row,
    find_columns,
    make_row,
    type_name,
)
from pipelines.sources import (
    Layout,
    SourceFile,
    list_files,
    open_file,
    open_stream,
    read_chunks,
    split_lines,
)
from seekr.errors import DataError

__all__ = ["BadRow", "Columns", "SourceRow", "read_rows", "read_source"]

_BATCH_ROWS = 256
_BOM = b"\xef\xbb\xbf"

Feed = Callable[[bytes], object]
Record = tuple[int, object]  # line or row number, and what stands there: any value, or a BadRow
Rows = Iterator[SourceRow | BadRow]


def read_source(source: str | Path, columns: Columns) -> Rows:
    """All rows of a source, file after file; raises `DataError` as its two halves do."""
    for file in list_files(source):
        yield from read_rows(file, columns)


def read_rows(file: SourceFile, columns: Columns, feed: Feed = lambda _: None) -> Rows:
    """The rows of one file, in its order, duplicates included.

    Args:
        file: from `list_files`.
        columns: column names; those left None are looked up in the file.
        feed: receives the file's bytes once, in order, before the last row (a hash's update).

    Raises:
        DataError: the file cannot be read or parsed as a whole, or lacks a column. JSON has no
            schema, so there a column is missing when none of the first 256 rows has it.
    """
    try:
        yield from _READERS[file.layout](file, columns, feed)
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error}") from error


def _read_jsonl(file: SourceFile, columns: Columns, feed: Feed) -> Rows:
    return _rows_of_records(file, columns, _json_lines(file, feed))


def _read_json(file: SourceFile, columns: Columns, feed: Feed) -> Rows:
    document = _document(file, feed)
    if not isinstance(document, list):
        raise DataError(_wrong_document(file, f"holds {type_name(document)}"))
    return _rows_of_records(file, columns, enumerate(document, 1))


def _read_instructions(file: SourceFile, columns: Columns, feed: Feed) -> Rows:
    document = _document(file, feed)
    instances = document.get("Instances", "")
    if not isinstance(instances, list):
        raise DataError(_wrong_document(file, 'is an object without a list under "Instances"'))
    header = {key: document[key] for key in (HEADER_DEFINITION,) if key in document}
    records = ({**row, **header} if isinstance(row, dict) else row for row in instances)
    return _rows_of_records(file, columns, enumerate(records, 1))


def _read_parquet(file: SourceFile, columns: Columns, feed: Feed) -> Rows:
    from pyarrow import parquet  # a third of this module's import time, and not always needed

    for _ in read_chunks(file, feed):
        pass
    try:
        with open_file(file) as handle:
            table = parquet.ParquetFile(handle)
            found = find_columns(file.name, columns, table.schema_arrow.names)
            batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=found.names)
            yield from _rows_of_batches(file, found, batches)
    except pa.ArrowException as error:
        raise DataError(f"{file.name} cannot be read as Parquet: {error}") from error


def _read_arrow(file: SourceFile, columns: Columns, feed: Feed) -> Rows:
    for _ in read_chunks(file, feed):
        pass
    try:
        with open_stream(file) as handle, pa.ipc.open_stream(handle) as stream:
            found = find_columns(file.name, columns, stream.schema.names)
            yield from _rows_of_batches(file, found, stream)
    except pa.ArrowException as error:
        raise DataError(f"{file.name} cannot be read as an Arrow stream: {error}") from error


_READERS: dict[Layout, Callable[[SourceFile, Columns, Feed], Rows]] = {
    Layout.JSONL: _read_jsonl,
    Layout.JSON: _read_json,
    Layout.INSTRUCTIONS: _read_instructions,
    Layout.PARQUET: _read_parquet,
    Layout.ARROW: _read_arrow,
}


def _json_lines(file: SourceFile, feed: Feed) -> Iterator[Record]:
    for line, raw in enumerate(split_lines(read_chunks(file, feed)), 1):
        content = (raw.removeprefix(_BOM) if line == 1 else raw).strip()
        if content:
            yield line, _json_value(file, line, content)


def _json_value(file: SourceFile, line: int, raw: bytes) -> object:
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        reason = f"malformed JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number too long, a nesting too deep
        reason = f"malformed JSON: {error}"
    return bad_row(file.name, line, reason, raw.decode(errors="replace"))


def _document(file: SourceFile, feed: Feed) -> Any:
    """The whole file as one JSON value; a file of blanks is an empty list."""
    raw = b"".join(read_chunks(file, feed)).removeprefix(_BOM)
    if not raw.strip():
        return []
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file.name} is not UTF-8 (line {line}); convert it to UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise DataError(
            f"{file.name} is malformed JSON: {error.msg} at {place}. Repair the document; a file "
            "with one object per line is better called .jsonl"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name} is malformed JSON: {error}. Repair it") from error


def _wrong_document(file: SourceFile, found: str) -> str:
    return (
        f"{file.name} {found}; allowed in .json are a list of objects, one object per line, and a "
        'Natural-Instructions object {"Definition": ..., "Instances": [...]}'
    )


def _rows_of_records(file: SourceFile, columns: Columns, records: Iterable[Record]) -> Rows:
    """Rows from values without a schema: the columns are those of the first objects seen."""
    found: FoundColumns | None = None
    records = iter(records)
    while batch := list(islice(records, _BATCH_ROWS)):
        objects = [value for _, value in batch if isinstance(value, dict)]
        if found is None and objects:
            keys = dict.fromkeys(key for value in objects for key in value)
            found = find_columns(file.name, columns, list(keys))
        for line, value in batch:
            is_bad = isinstance(value, BadRow)
            yield value if is_bad else make_row(file.name, line, value, found)


def _rows_of_batches(
    file: SourceFile, found: FoundColumns, batches: Iterable[pa.RecordBatch]
) -> Rows:
    line = 0
    for batch in batches:
        columns = batch.select(found.names)
        for start in range(0, columns.num_rows, _BATCH_ROWS):
            for value in _python_rows(columns.slice(start, _BATCH_ROWS)):
                line += 1
                if isinstance(value, UnicodeDecodeError):
                    reason, text = f"not UTF-8 at byte {value.start + 1}", value.object
                    yield bad_row(file.name, line, reason, text.decode(errors="replace"))
                else:
                    yield make_row(file.name, line, value, found)


def _python_rows(batch: pa.RecordBatch) -> list[Any]:
    """Rows as dictionaries; in place of a row whose text is not UTF-8, the error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [row for i in range(batch.num_rows) for row in _python_rows(batch.slice(i, 1))]
