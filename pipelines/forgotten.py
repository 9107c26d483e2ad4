"""The rows that a store must not hold: requests to forget, and how later stages ask for them.

A request is a JSON file below `forgotten/`, under a second name while it is carried out. While there is
such a file no stage begins to compute, so nothing reads a row on its way out. Afterwards the request
stays: ingest leaves its rows out, whatever the sources hold.

A row is named by a mark, the hash of its row id. Whoever has the row, or its id, can tell whether it was
forgotten; the list alone gives neither, and an id that a backup or a log still has is not found in it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import pyarrow as pa

from pipelines.store import TEMPORARY_PREFIX, Store
from seekr.errors import StoreError

FOLDER: Final = "forgotten"
_PENDING: Final = ".pending.json"
_DONE: Final = ".json"
# What a row id looks like wherever it is written.
_ID: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
REMOVED: Final = "(a forgotten row)"


def mark_of(row_id: str) -> str:
    """Return what stands for a row: 32 hex digits of its id's sha256, under a name of its own."""
    return hashlib.sha256(f"seekr forgotten row\0{row_id}".encode()).hexdigest()[:32]


def quarantined_id(text: str) -> str:
    """Return an id for a row that could not be used, from what quarantine keeps of its text."""
    return hashlib.sha256(f"seekr quarantined row\0{text}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of `seekr forget`.

    Attributes:
        id: a name of its own, which begins with the time.
        at: ISO 8601, UTC.
        user, host: who asked.
        reason: what was given for one.
        rows: marks of the rows that were asked for.
        derived: marks of rows that were made of them (borrowed, generated).
        learnt: marks that a model was trained on, by the key of its train stage.
        erased: how many rows files of an artifact lose, by its key.
        begin_again: keys of unfinished stages whose checkpoints go.
    """

    id: str
    at: str
    user: str
    host: str
    reason: str | None
    rows: tuple[str, ...]
    derived: tuple[str, ...] = ()
    learnt: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: dict[str, tuple[str, ...]]()
    )
    erased: Mapping[str, int] = field(default_factory=lambda: dict[str, int]())
    begin_again: tuple[str, ...] = ()

    @property
    def marks(self) -> frozenset[str]:
        """All rows that go."""
        return frozenset((*self.rows, *self.derived))

    def begin(self, store: Store) -> None:
        """Write the request: from now on it is carried out, if need be by another call."""
        store.write_json(f"{FOLDER}/{self.id}{_PENDING}", asdict(self))

    def end(self, store: Store) -> None:
        """Say that it is carried out."""
        store.write_json(f"{FOLDER}/{self.id}{_DONE}", asdict(self))
        store.remove(f"{FOLDER}/{self.id}{_PENDING}")

    def withdraw(self, store: Store) -> None:
        """Take back a request of which nothing was carried out."""
        store.remove(f"{FOLDER}/{self.id}{_PENDING}")

    @classmethod
    def load(cls, store: Store, path: str) -> Request:
        """Read a request.

        Raises:
            StoreError: the file is no request.
        """
        try:
            value: dict[str, Any] = dict(store.read_json(path))
            value |= {name: tuple(value[name]) for name in ("rows", "derived", "begin_again")}
            value["learnt"] = {key: tuple(marks) for key, marks in value["learnt"].items()}
            return cls(**value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"{store.uri_for(path)}: is no request to forget rows ({error!r}); bring the file "
                "back from a backup, since rows would return without it"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgottenRows:
    """All rows that were ever to be forgotten. Small enough to send to every task.

    Attributes:
        dates: by mark, the day of the newest request.
    """

    dates: Mapping[str, str]

    @classmethod
    def load(cls, store: Store) -> ForgottenRows:
        """Read the store's requests, those that are still carried out included."""
        found: dict[str, str] = {}
        for path in _requests(store):
            request = Request.load(store, path)
            for mark in request.marks:
                found[mark] = max(found.get(mark, ""), request.at[:10])
        return cls(dates=found)

    def holds(self, row_id: str) -> bool:
        """Whether a row is to be left out."""
        return bool(self.dates) and mark_of(row_id) in self.dates

    def day_of(self, row_id: str) -> str | None:
        """The day of the newest request that names a row, None if none does."""
        return self.dates.get(mark_of(row_id))

    def filtered(self, rows: pa.Table) -> pa.Table:
        """Return a table with a column `row_id` without its forgotten rows."""
        if not self.dates:
            return rows
        stays = [not self.holds(row_id) for row_id in rows["row_id"].to_pylist()]
        return rows.filter(pa.array(stays, pa.bool_()))


NOTHING: Final = ForgottenRows(dates={})


def pending(store: Store) -> list[Request]:
    """Return the requests that are not carried out to their end, the oldest first."""
    found = [path for path in _requests(store) if path.endswith(_PENDING)]
    return [Request.load(store, path) for path in found]


def require_settled(store: Store) -> None:
    """Refuse to compute while rows are on their way out.

    Raises:
        StoreError: they are, or the command that took them out was stopped.
    """
    found = pending(store)
    if found:
        first = found[0]
        raise StoreError(
            f"{store.uri_for(FOLDER)}: rows are being forgotten since {first.at} (request {first.id} "
            f"of {first.user} on host {first.host}), and nothing is computed meanwhile. If that "
            "command was stopped, complete it: seekr forget STREAM. Then run again"
        )


def ids_in(text: str) -> list[str]:
    """Return what in a text looks like a row id, each once."""
    return list(dict.fromkeys(_ID.findall(text)))


def mentioned(text: str, marks: frozenset[str]) -> list[str]:
    """Return the ids of forgotten rows that a text has in it."""
    return [found for found in ids_in(text) if mark_of(found) in marks]


def without_ids(text: str, marks: frozenset[str]) -> str:
    """Return a text in which ids of forgotten rows are replaced by words."""
    for found in mentioned(text, marks):
        text = text.replace(found, REMOVED)
    return text


def _requests(store: Store) -> list[str]:
    """Return the paths of the requests; a pending one stands for a finished one of the same id."""
    # A request that was killed while it was written has changed nothing: it is none.
    begun = f"{FOLDER}/{TEMPORARY_PREFIX}"
    listed = [file.path for file in store.list(FOLDER) if file.path.count("/") == 1]
    paths = [path for path in listed if not path.startswith(begun)]
    names = {path for path in paths if path.endswith(_PENDING)}
    done = {path for path in paths if path.endswith(_DONE)} - names
    hidden = {path.removesuffix(_PENDING) + _DONE for path in names}
    return sorted(names | (done - hidden))
