"""Copies of what has arrived, and rows on their way out of them.

A copy holds rows as they were delivered, in their own layout, so a row is known in it only by reading it as
ingest does: by the columns that were read when it was judged, and by those of every ingest of it. A copy
never changes. One without the rows is written beside it, the register is told where that lies, and what no
entry of the register names is removed: the copy with the rows, and whatever killed ticks have left. So a
stop anywhere leaves the register with a whole copy, and doing it again ends with the same.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final

from pipelines.arrivals import Arrival, LeftOut, Register
from pipelines.artifact import StageRecord
from pipelines.fingerprint import fingerprint
from pipelines.forgotten import Request, mark_of
from pipelines.inspection import inspect
from pipelines.inventory import Inventory, Marks
from pipelines.lease import Lease
from pipelines.provenance import redact
from pipelines.readers import read_rows, read_source
from pipelines.rewrite import without_lines
from pipelines.row_ids import ids_of
from pipelines.rows import BadRow, Columns, SourceRow
from pipelines.sources import (
    Layout,
    SourceFile,
    display_name,
    list_files,
    open_filesystem,
    open_stream,
)
from seekr.errors import DataError, StoreError

# Files beside the shards of a saved data set, without which it cannot be opened.
_BESIDE_SHARDS: Final = ("state.json", "dataset_info.json")
Row = SourceRow | BadRow
# Train or test, the file's name, and the row's line in it.
Place = tuple[str, str, int]
IsGone = Callable[[Row], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The copy of an arrival in a store.

    Attributes:
        stream: whose register has it.
        is_task: whether the stream still learns it: it was not withdrawn.
        readings: the columns by which its training rows were ever read, the first when it was judged.
    """

    stream: str
    register: Register
    arrival: Arrival
    is_task: bool
    readings: tuple[Columns, ...]

    @property
    def folder(self) -> str:
        """Where it lies, relative to the store's root."""
        assert self.arrival.folder is not None
        return self.arrival.folder

    def source(self, part: str) -> str:
        """Return what opens its training or test rows; may hold credentials."""
        return self.register.store.address(f"{self.folder}/{self.arrival.parts[part]}")

    def delivered_as(self, file: str) -> str:
        """Return where a file of the copy, by the name its rows have, was in the inbox."""
        place = self.arrival.place
        if PurePosixPath(place).name != self.arrival.name:  # a single file
            return place
        return f"{place}/{file.partition(f'/{self.folder}/')[2]}"

    def columns(self, part: str) -> tuple[Columns, ...]:
        """Return how a part is read."""
        if part == "train":
            return self.readings
        return tuple(dict.fromkeys(columns.of_questions for columns in self.readings))

    def rows(self, part: str) -> Iterator[Row]:
        """Yield the rows of a part under every reading.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            for columns in self.columns(part):
                yield from read_source(self.source(part), columns)
        except DataError as error:
            raise StoreError(
                f"{self.register.store.uri_for(self.folder)}: the copy of what arrived as "
                f"{self.arrival.name} cannot be read: {error}. Bring it back from a backup or from the inbox"
            ) from error

    def places_of(self, marks: Marks) -> dict[Place, set[str]]:
        """Return where rows with some marks are, and which marks each of them has."""
        found: dict[Place, set[str]] = {}
        for part in self.arrival.parts:
            for row in self.rows(part):
                if held := marks.intersection(_marks(row)):
                    found.setdefault((part, row.file, row.line), set()).update(held)
        return found

    def emptied(self, marks: Marks) -> str | None:
        """Return the part, if any, that would have no usable row without these."""
        for part in self.arrival.parts:
            good = (row for row in self.rows(part) if isinstance(row, SourceRow))
            if all(not marks.isdisjoint(_marks(row)) for row in good):
                return part
        return None


def streams_with_arrivals(inventory: Inventory) -> tuple[str, ...]:
    """Return the streams of which something has arrived in the store."""
    paths = (path.split("/") for path in inventory.others)
    return tuple(dict.fromkeys(p[1] for p in paths if p[0] == "streams" and p[2:3] == ["arrivals"]))


def copies_in(inventory: Inventory, streams: Sequence[str] | None = None) -> list[Copy]:
    """Return all copies in a store, those of tasks that were withdrawn included; not those that are lost.

    Args:
        streams: only of these.

    Raises:
        StoreError: a register cannot be read.
    """
    read = _readings(inventory)
    found: list[Copy] = []
    for name in streams_with_arrivals(inventory) if streams is None else streams:
        register = Register(inventory.store, name)
        tasks = {arrival.number for arrival in register.accepted}
        for arrival in register.copies:
            if not inventory.store.exists(str(arrival.folder)):
                continue
            first = Columns(**(arrival.columns or arrival.options.get("columns") or {}))
            others = read.get(str(arrival.train_digest), ())
            readings = tuple(dict.fromkeys((first, *others)))
            found.append(
                Copy(
                    stream=name,
                    register=register,
                    arrival=arrival,
                    is_task=arrival.number in tasks,
                    readings=readings,
                )
            )
    return found


def _readings(inventory: Inventory) -> dict[str, list[Columns]]:
    """Return by which columns training rows were ingested, by their digest."""
    found: dict[str, list[Columns]] = {}
    for record in inventory.records.values():
        if record.stage == "ingest":
            found.setdefault(record.payload["sources"]["train"], []).append(_columns(record))
    return found


def _columns(record: StageRecord) -> Columns:
    return Columns(**record.payload["config"]["columns"])


def shorten_copies(inventory: Inventory, stream: str, request: Request, lease: Lease) -> None:
    """Take a request's rows out of a stream's copies, and remove copies that nobody names.

    Doing it twice changes nothing.

    Args:
        lease: of the stream's only tick.

    Raises:
        LeaseLost: a tick has taken over.
    """
    for copy in copies_in(inventory, [stream]):
        if places := copy.places_of(request.marks):
            lease.check()
            _shorten(copy, request, len(places), lease)
    register = Register(inventory.store, stream)
    named = {arrival.folder for arrival in register.copies}
    data = f"{register.folder}/data"
    for name in register.store.children(data):
        if f"{data}/{name}" not in named:
            lease.check()
            register.store.remove(f"{data}/{name}")


def _shorten(copy: Copy, request: Request, count: int, lease: Lease) -> None:
    def gone(row: Row) -> bool:
        return not request.marks.isdisjoint(_marks(row))

    arrival, register = copy.arrival, copy.register
    parts = {
        part: Part(source=copy.source(part), name=name, readings=copy.columns(part))
        for part, name in arrival.parts.items()
    }
    with written_without(parts, gone) as short:
        lacking = dict(arrival.left_out)
        for part, more in short.lacking.items():
            before = lacking.get(part)
            lacking[part] = more if before is None else before.and_then(more)
        folder = short.place(register)
    rows = f"{count} row{'' if count == 1 else 's'}"
    reason = f"{rows} of the copy forgotten on {request.at[:10]}, request {request.id}"
    register.shorten(replace(arrival, folder=folder, left_out=lacking), reason, lease)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The training or test rows of what shall become a copy.

    Attributes:
        source: opens them; may hold credentials.
        name: of the file or folder in the copy.
        readings: columns by which they are read; the first counts them.
    """

    source: str = field(repr=False)
    name: str
    readings: tuple[Columns, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortCopy:
    """A copy without some rows, on this machine.

    Attributes:
        read, digests: of its parts, with all rows and without these.
        lacking: what parts lack, if anything.
    """

    folder: Path
    read: Mapping[str, str]
    digests: Mapping[str, str]
    lacking: Mapping[str, LeftOut]

    def place(self, register: Register) -> str:
        """Put it into the store, under a name that its content decides; returns the folder."""
        folder = f"{register.folder}/data/{fingerprint(dict(self.digests))}"
        register.store.upload(self.folder, folder)
        return folder


@contextmanager
def written_without(parts: Mapping[str, Part], gone: IsGone) -> Iterator[ShortCopy]:
    """Provide a copy of some parts without some rows, until the block ends.

    Raises:
        DataError: a part cannot be read.
    """
    folder = Path(tempfile.mkdtemp(prefix="seekr-forget-"))
    try:
        read: dict[str, str] = {}
        digests: dict[str, str] = {}
        lacking: dict[str, LeftOut] = {}
        for name, part in parts.items():
            try:
                _write_part(part, gone, folder)
            except OSError as error:
                place = display_name(part.source)
                raise DataError(f"{place} cannot be copied: {redact(str(error))}") from error
            before = inspect(part.source, part.readings[0])
            after = inspect(folder / part.name, part.readings[0])
            read[name], digests[name] = before.digest, after.digest
            if after.digest != before.digest:
                lacking[name] = LeftOut.between(before, after)
        yield ShortCopy(folder=folder, read=read, digests=digests, lacking=lacking)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_part(part: Part, gone: IsGone, folder: Path) -> None:
    """Write what is read of a part, and nothing else that lies beside it."""
    root = open_filesystem(part.source)[1]
    for file in list_files(part.source):
        target = folder / part.name / file.path[len(root) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = {
            row.line for columns in part.readings for row in read_rows(file, columns) if gone(row)
        }
        if lines:
            without_lines(file, lines, target)
        else:
            _copy_file(file, target)
        for name in _BESIDE_SHARDS if file.layout is Layout.ARROW else ():
            place = str(PurePosixPath(file.path).with_name(name))
            _copy_file(replace(file, path=place), target.with_name(name))


def _copy_file(file: SourceFile, target: Path) -> None:
    with open_stream(file) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _marks(row: Row) -> list[str]:
    return [mark_of(row_id) for row_id in ids_of(row)]
