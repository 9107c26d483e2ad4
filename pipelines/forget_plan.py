"""What forgetting some rows would touch: looked up in the whole store, before anything is changed.

The result is a request that says all of it, so that what a killed command has begun can be completed
without the rows, of which by then some are gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

from pipelines.arrival_copies import Copy, Place, copies_in
from pipelines.claims import Owner
from pipelines.derived_rows import derived_from
from pipelines.forgotten import ForgottenRows, Request, mark_of, without_ids
from pipelines.inventory import (
    QUARANTINE,
    Inventory,
    Marks,
    json_names,
    marks_in,
    parquet_names,
    quarantined_marks,
    scrubbed,
)
from pipelines.provenance import now_iso
from pipelines.rowsets import REPLAY, TRAIN, kind_folder
from pipelines.workspace import CHECKPOINTS, FAILURE
from seekr.errors import ConfigError

# Stages that read sources; how far the rows of an unfinished one were read is not written down.
_READERS: Final = ("ingest", "probe")
# Marks of rows by the name of a file, by the key of an artifact.
Hits = Mapping[str, Mapping[str, Sequence[str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A request that is not made yet.

    Attributes:
        already: ids that an earlier request names and no file holds, with that request's day.
        descendants: keys of models that grew from one that was trained on the rows.
        copies: the tasks as which copies with the rows arrived, by the copy's folder.
    """

    request: Request
    already: Mapping[str, str]
    descendants: tuple[str, ...]
    copies: Mapping[str, str]

    @property
    def num_rows(self) -> int:
        """How many rows were asked for that the store has."""
        return len(self.request.rows)

    @property
    def stages(self) -> dict[str, str]:
        """What becomes of an artifact, a copy, a model or an unfinished stage, in words, by its key."""
        request = self.request
        words = {key: f"{_rows(count)} erased" for key, count in request.erased.items()}
        for key, marks in request.learnt.items():
            words[key] = f"trained on {_rows(len(marks))}: marked, its weights stay"
        words |= {key: "grew from a model trained on them" for key in self.descendants}
        return words | {key: "unfinished: begins again" for key in request.begin_again}


def make_plan(
    inventory: Inventory, row_ids: Sequence[str], owner: Owner, reason: str | None
) -> Plan:
    """Look up what forgetting rows touches; changes nothing.

    Raises:
        ConfigError: an id is of no row in the store, or a task that has arrived would lose all rows.
        StoreError: a file cannot be read.
    """
    wanted = {mark_of(row_id): row_id for row_id in row_ids}
    copies = _copies_with(inventory, frozenset(wanted))
    copied = {mark for _, places in copies for marks in places.values() for mark in marks}
    found = _present(inventory, frozenset(wanted)) | copied
    known = ForgottenRows.load(inventory.store)
    already = {
        row_id: known.dates[mark]
        for mark, row_id in wanted.items()
        if mark not in found and mark in known.dates
    }
    unknown = [wanted[mark] for mark in wanted if mark not in found and mark not in known.dates]
    if unknown:
        raise ConfigError(_unknown(inventory, unknown))
    derived = derived_from(inventory, found)
    marks = found | derived
    hits = _hits(inventory, marks)
    said = _quoted(inventory, marks)
    request = Request(
        id=f"{now_iso()[:19].replace(':', '')}-{uuid4().hex[:8]}",
        at=now_iso(),
        user=owner.user,
        host=owner.host,
        reason=None if reason is None else without_ids(reason, marks),
        rows=tuple(sorted(found)),
        derived=tuple(sorted(derived)),
        learnt=_learnt(inventory, hits),
        erased={key: said.get(key, 0) + _num(hits.get(key, {})) for key in sorted({*hits, *said})}
        | {copy.folder: len(places) for copy, places in copies},
        begin_again=tuple(
            key for key in inventory.unfinished if found and _begins(inventory, key, hits)
        ),
    )
    grown = _descendants(inventory, request)
    names = {copy.folder: copy.arrival.name for copy, _ in copies}
    return Plan(request=request, already=already, descendants=grown, copies=names)


def _present(inventory: Inventory, wanted: Marks) -> Marks:
    """Return the marks of rows that some file holds."""
    hits = _hits(inventory, wanted)
    held = {mark for files in hits.values() for found in files.values() for mark in found}
    return frozenset(held | (quarantined_marks(inventory) & wanted))


def _copies_with(inventory: Inventory, wanted: Marks) -> list[tuple[Copy, dict[Place, set[str]]]]:
    """Return the copies of arrivals that hold rows, and where in them which rows are.

    Raises:
        ConfigError: a task of a stream would be left without rows.
    """
    found = [(copy, copy.places_of(wanted)) for copy in copies_in(inventory)]
    found = [(copy, places) for copy, places in found if places]
    for copy, _ in found:
        empty = copy.emptied(wanted) if copy.is_task else None
        if empty is not None:
            name = copy.arrival.name
            raise ConfigError(
                f"the task {name} of stream {copy.stream} arrived with these {empty} rows alone, and a "
                "task needs one; nothing was changed. Take it out of the stream first: seekr withdraw "
                f"STREAM {name} --reason TEXT, then repeat the command"
            )
    return found


def _hits(inventory: Inventory, marks: Marks) -> dict[str, dict[str, list[str]]]:
    """Return the forgotten rows of every Parquet file that has any."""
    found: dict[str, dict[str, list[str]]] = {}
    for key, record in inventory.records.items():
        for name in parquet_names(record):
            if own := marks_in(inventory.store, f"{key}/{name}", marks):
                found.setdefault(key, {})[name] = own
    return found


def _quoted(inventory: Inventory, marks: Marks) -> dict[str, int]:
    """Return how many rows go from quarantines, by artifact, 0 where another JSON file quotes one."""
    found: dict[str, int] = {}
    for key, record in inventory.records.items():
        for name in json_names(record):
            text = inventory.store.read_bytes(f"{key}/{name}").decode()
            if (result := scrubbed(text, name, marks)) is not None:
                found[key] = found.get(key, 0) + (result[1] if name == QUARANTINE else 0)
    return found


def _learnt(inventory: Inventory, hits: Hits) -> dict[str, tuple[str, ...]]:
    """Return the forgotten rows that each model was trained on, itself or through a generator."""
    found: dict[str, tuple[str, ...]] = {}
    for key, record in inventory.records.items():
        if record.stage != "train":
            continue
        marks: set[str] = set()
        for name, ref in record.inputs.items():
            if name.startswith(("data.", "replay.")):
                marks |= _read_for_training(hits, ref.key)
                source = inventory.records.get(ref.key)
                if source is not None and source.stage == "generate":
                    marks |= _read_for_training(hits, source.inputs["data"].key)
        if marks:
            found[key] = tuple(sorted(marks))
    return found


def _descendants(inventory: Inventory, request: Request) -> tuple[str, ...]:
    """Return the models, not trained on the rows themselves, that have one that was among what they
    were made from."""
    came_from: dict[str, bool] = {}

    def has(key: str) -> bool:
        if key not in came_from:
            record = inventory.records.get(key)
            inputs = () if record is None else record.inputs.values()
            came_from[key] = any(ref.key in request.learnt or has(ref.key) for ref in inputs)
        return came_from[key]

    trained = (key for key, record in inventory.records.items() if record.stage == "train")
    return tuple(key for key in trained if key not in request.learnt and has(key))


def _read_for_training(hits: Hits, key: str) -> set[str]:
    """Return the forgotten rows of an artifact that trainings read: not those to test with."""
    folders = (f"{kind_folder(TRAIN)}/", f"{REPLAY}/")
    files = hits.get(key, {})
    return {mark for name in files if name.startswith(folders) for mark in files[name]}


def _begins(inventory: Inventory, key: str, hits: Hits) -> bool:
    """Tell whether an unfinished stage has read forgotten rows, or may have, and has kept something."""
    names = inventory.files[key]
    if FAILURE not in names and not any(name.startswith(f"{CHECKPOINTS}/") for name in names):
        return False
    if key.partition("/")[0] in _READERS:
        return True
    inputs = inventory.inputs_of(key)
    return inputs is None or any(other in hits for other in inputs.values())


def _num(files: Mapping[str, Sequence[str]]) -> int:
    return sum(len(found) for found in files.values())


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _unknown(inventory: Inventory, unknown: Sequence[str]) -> str:
    place = inventory.store.location.shown
    return (
        f"{', '.join(unknown)}: no file in {place} has a row with such an id; nothing was changed. A row "
        "id is 32 hex digits; find it by its text or its place: seekr rows STREAM --find TEXT, or "
        "--at FILE:LINE"
    )
