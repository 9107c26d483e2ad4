"""A file of rows written anew without some of them, in every layout that a source may have.

The other rows keep their values and their order. Of the old file nothing stays that is no row: dictionaries
and statistics are made again, and a Natural-Instructions file keeps its definition and its instances. Lines
of a JSON Lines file that go become empty ones, so that the others keep their numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rows import HEADER_DEFINITION
from pipelines.sources import (
    Layout,
    SourceFile,
    open_file,
    open_stream,
    read_chunks,
    split_lines,
)

# Places in a table of what goes, given the table and the place of its first row in the file, from 0.
Going = Callable[[pa.Table, int], Sequence[int]]


def without_lines(file: SourceFile, lines: Collection[int], target: Path) -> None:
    """Write a source's file without some records.

    Args:
        lines: their numbers as `SourceRow.line` has them, from 1.
        target: a path on this machine.
    """
    _WRITERS[file.layout](file, frozenset(lines), target)


def parquet_without(source: Any, going: Going, target: Path) -> None:
    """Write a Parquet file without some rows.

    Args:
        source: the file, opened for random access.
        going: asked for each row group.
    """
    file = pq.ParquetFile(source)
    with pq.ParquetWriter(target, file.schema_arrow, compression=_codec(file)) as writer:
        first = 0
        for index in range(file.num_row_groups):
            table = file.read_row_group(index)
            writer.write_table(_staying(table, going(table, first)))
            first += table.num_rows


def _codec(file: pq.ParquetFile) -> str:
    metadata = file.metadata
    if not metadata.num_row_groups or not metadata.num_columns:
        return "snappy"
    found = str(metadata.row_group(0).column(0).compression).lower()
    return "none" if found == "uncompressed" else found


def _staying(table: pa.Table, going: Sequence[int]) -> pa.Table:
    stays = np.ones(table.num_rows, dtype=np.bool_)
    stays[going] = False
    kept = table.filter(pa.array(stays))
    for index, field in enumerate(kept.schema):
        if pa.types.is_dictionary(field.type):  # which would still name values that are gone
            plain = kept.column(index).cast(field.type.value_type)
            fresh = plain.combine_chunks().dictionary_encode().cast(field.type)
            kept = kept.set_column(index, field, fresh)
    return kept


def _by_number(lines: frozenset[int]) -> Going:
    def going(table: pa.Table, first: int) -> list[int]:
        return [place for place in range(table.num_rows) if first + place + 1 in lines]

    return going


def _jsonl(file: SourceFile, lines: frozenset[int], target: Path) -> None:
    with target.open("wb") as sink:
        for number, raw in enumerate(split_lines(read_chunks(file, _nobody)), 1):
            sink.write(b"" if number == 1 else b"\n")
            sink.write(b"" if number in lines else raw)


def _json(file: SourceFile, lines: frozenset[int], target: Path) -> None:
    _dump(_kept(_document(file), lines), target)


def _instructions(file: SourceFile, lines: frozenset[int], target: Path) -> None:
    document = _document(file)
    header = {key: document[key] for key in (HEADER_DEFINITION,) if key in document}
    _dump(header | {"Instances": _kept(document["Instances"], lines)}, target)


def _parquet(file: SourceFile, lines: frozenset[int], target: Path) -> None:
    with open_file(file) as source:
        parquet_without(source, _by_number(lines), target)


def _arrow(file: SourceFile, lines: frozenset[int], target: Path) -> None:
    going, first = _by_number(lines), 0
    with (
        open_stream(file) as source,
        pa.ipc.open_stream(source) as stream,
        pa.OSFile(str(target), "wb") as sink,
        pa.ipc.new_stream(sink, stream.schema) as writer,
    ):
        for batch in stream:
            table = pa.Table.from_batches([batch])
            writer.write_table(_staying(table, going(table, first)))
            first += table.num_rows


_WRITERS: dict[Layout, Callable[[SourceFile, frozenset[int], Path], None]] = {
    Layout.JSONL: _jsonl,
    Layout.JSON: _json,
    Layout.INSTRUCTIONS: _instructions,
    Layout.PARQUET: _parquet,
    Layout.ARROW: _arrow,
}


def _document(file: SourceFile) -> Any:
    raw = b"".join(read_chunks(file, _nobody)).removeprefix(b"\xef\xbb\xbf")
    return json.loads(raw) if raw.strip() else []


def _kept(records: Sequence[Any], lines: frozenset[int]) -> list[Any]:
    return [record for number, record in enumerate(records, 1) if number not in lines]


def _dump(value: Any, target: Path) -> None:
    """In ASCII: half of a surrogate pair, which JSON may have, has no UTF-8."""
    target.write_text(json.dumps(value) + "\n", encoding="ascii")


def _nobody(chunk: bytes) -> None:
    pass
