"""Which rows a store has, for a person who knows a row by its text, or by its place in a source file.

Rows are known to all commands by their id, a hash of their content. Looked through are the ingested rows of
every stream that shares the store, and what quarantine keeps of rows that could not be used. A place is
looked up in the sources of one stream, by reading them as ingest does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from pipelines.arrival_copies import Copy, copies_in
from pipelines.config import StreamConfig
from pipelines.forgotten import ForgottenRows, quarantined_id
from pipelines.inventory import (
    QUARANTINE,
    ROW_ID,
    Inventory,
    json_names,
    parquet_names,
    read_columns,
)
from pipelines.readers import read_source
from pipelines.row_ids import ids_of
from pipelines.rows import BadRow, Columns, SourceRow
from pipelines.rowsets import REPLAY
from pipelines.store import Store
from seekr.errors import ConfigError

_ARRIVED = "arrived"
_TEXTS = (ROW_ID, "input", "references")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRow:
    """A row, in one of the places where it is.

    Attributes:
        row_id: what `seekr forget` takes.
        task, kind: of which rows it is one: train, test, validation, quarantine; arrived for one that only
            the copy of an arrival has; or source for a place in a source file.
        text: its input and answers, or what quarantine has of it.
        replayed: whether the replay memory has it.
        forgotten: the day on which it was forgotten, if it was.
    """

    row_id: str
    task: str
    kind: str
    text: str
    replayed: bool
    forgotten: str | None


def find_text(store: Store, text: str) -> list[FoundRow]:
    """Return the rows whose input or one of whose answers has a text in it, upper and lower case alike.

    Raises:
        StoreError: a file cannot be read.
    """
    inventory = Inventory.of(store)
    replayed = _replayed(inventory)
    wanted = text.casefold()
    found: dict[tuple[str, str, str], FoundRow] = {}
    ingested: set[tuple[str, str]] = set()
    for row_id, task, kind, said in chain(_all_rows(inventory), _arrived(inventory)):
        if wanted not in said.casefold() or (kind == _ARRIVED and (row_id, task) in ingested):
            continue
        ingested.add((row_id, task))
        found[row_id, task, kind] = FoundRow(
            row_id=row_id,
            task=task,
            kind=kind,
            text=said,
            replayed=row_id in replayed,
            forgotten=None,
        )
    return [found[place] for place in sorted(found, key=lambda place: (place[1:], place[0]))]


def find_place(store: Store, config: StreamConfig, place: str) -> list[FoundRow]:
    """Return the rows at a line of a stream's source file.

    Args:
        place: `FILE:LINE`; the end of a file's path is enough. Lines count from 1, in files that are no
            JSON Lines they are rows.

    Raises:
        ConfigError: it is no place, or no source of the stream has it.
    """
    name, _, number = place.rpartition(":")
    if not name or not number.isdigit():
        raise ConfigError(f"--at {place}: FILE:LINE is needed, such as data/train.jsonl:17")
    forgotten, inventory = ForgottenRows.load(store), Inventory.of(store)
    copies = [copy for copy in copies_in(inventory) if copy.stream == config.name]
    replayed = _replayed(inventory)
    found: list[FoundRow] = []
    file, line = name.removeprefix("./"), int(number)
    for task, row in chain(_at(config, file, line), _delivered_at(copies, file, line)):
        row_id = ids_of(row)[0]
        found.append(
            FoundRow(
                row_id=row_id,
                task=task,
                kind="quarantine" if isinstance(row, BadRow) else "source",
                text=_text(row),
                replayed=row_id in replayed,
                forgotten=forgotten.day_of(row_id),
            )
        )
    if not found:
        sources = [source for _, source, _ in _sources(config)]
        sources += [copy.arrival.place for copy in copies]
        raise ConfigError(
            f"--at {place}: no source of the stream has this line; its sources are "
            f"{', '.join(dict.fromkeys(sources))}"
        )
    return found


def _all_rows(inventory: Inventory) -> Iterator[tuple[str, str, str, str]]:
    """Yield (row id, task, kind, text) of ingested and quarantined rows, and of probes."""
    for key, record in inventory.records.items():
        if record.stage not in ("ingest", "probe"):
            continue
        for name in parquet_names(record):
            kind = name.split("/")[1].removeprefix("kind=") if record.stage == "ingest" else "probe"
            columns = _TEXTS if record.stage == "ingest" else (ROW_ID, "answer")
            table = read_columns(inventory.store, f"{key}/{name}", columns)
            for row in () if table is None else table.to_pylist():
                parts = [row[column] for column in columns[1:]]
                said = [
                    text for part in parts for text in ([part] if isinstance(part, str) else part)
                ]
                yield row[ROW_ID], record.task, kind, " -> ".join(text for text in said if text)
        if QUARANTINE in json_names(record):
            for entry in inventory.store.read_json(f"{key}/{QUARANTINE}"):
                if "text" in entry:
                    yield quarantined_id(entry["text"]), record.task, "quarantine", entry["text"]


def _arrived(inventory: Inventory) -> Iterator[tuple[str, str, str, str]]:
    """Yield the same of the rows that copies of arrivals have."""
    for copy in copies_in(inventory):
        for row in (row for part in copy.arrival.parts for row in copy.rows(part)):
            yield ids_of(row)[0], copy.arrival.name, _ARRIVED, _text(row)


def _replayed(inventory: Inventory) -> set[str]:
    found: set[str] = set()
    for key, record in inventory.records.items():
        for name in parquet_names(record):
            if name.startswith(f"{REPLAY}/"):
                table = read_columns(inventory.store, f"{key}/{name}", [ROW_ID])
                found.update(() if table is None else table[ROW_ID].to_pylist())
    return found


def _sources(config: StreamConfig) -> Iterator[tuple[str, str, Columns]]:
    """Yield (task, source, columns) of everything a stream ingests."""
    for task in config.sources:
        columns = Columns(**config.options(task).columns.model_dump())
        yield task.name, str(task.train), columns
        if task.test is not None:
            yield task.name, str(task.test), columns.of_questions


def _at(config: StreamConfig, file: str, line: int) -> Iterator[tuple[str, SourceRow | BadRow]]:
    for task, source, columns in _sources(config):
        for row in read_source(source, columns):
            if row.line == line and f"/{row.file}".endswith(f"/{file.lstrip('/')}"):
                yield task, row


def _delivered_at(
    copies: Sequence[Copy], file: str, line: int
) -> Iterator[tuple[str, SourceRow | BadRow]]:
    """Yield (task, row) of what has arrived, by the file's path in the inbox."""
    for copy in copies:
        for row in (row for part in copy.arrival.parts for row in copy.rows(part)):
            if row.line == line and f"/{copy.delivered_as(row.file)}".endswith(
                f"/{file.lstrip('/')}"
            ):
                yield copy.arrival.name, row


def _text(row: SourceRow | BadRow) -> str:
    if isinstance(row, BadRow):
        return row.text
    return " -> ".join(text for text in (row.input, *row.references) if text)
