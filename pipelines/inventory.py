"""What lies in a store: finished artifacts, unfinished ones, who works on them, and where rows are.

This walks the store and no stream's graph, because streams share artifacts, and because what a stream no
longer names is still there. Rows are found by the column `row_id`, which every Parquet file of a stage
has, and by ids in JSON files; a new kind of stage needs nothing here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifact import RECORD, StageRecord
from pipelines.claims import Owner
from pipelines.forgotten import ids_in, mark_of, mentioned, quarantined_id
from pipelines.lease import TTL_SECONDS, holder
from pipelines.stage_kinds import VERSIONS
from pipelines.store import Store
from pipelines.workspace import ATTEMPTS
from seekr.errors import StoreError

ROW_ID: Final = "row_id"
QUARANTINE: Final = "quarantine.json"
Marks = frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """One look at a store.

    Attributes:
        records: of finished artifacts, by key.
        unfinished: keys of stages that were begun and have no record.
        files: names of all files of an artifact or an unfinished stage, by its key.
        others: paths of all other files.
    """

    store: Store
    records: Mapping[str, StageRecord]
    unfinished: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...]

    @classmethod
    def of(cls, store: Store) -> Inventory:
        """Look at a store.

        Raises:
            StoreError: a record cannot be read.
        """
        files: dict[str, list[str]] = {}
        others: list[str] = []
        for file in store.list_all():
            stage, task, fingerprint, name = (*file.path.split("/", 3), "", "", "")[:4]
            if stage in VERSIONS and name:
                files.setdefault(f"{stage}/{task}/{fingerprint}", []).append(name)
            else:
                others.append(file.path)
        finished = sorted(key for key, names in files.items() if RECORD in names)
        return cls(
            store=store,
            records={key: StageRecord.load(store, key) for key in finished},
            unfinished=tuple(sorted(files.keys() - set(finished))),
            files={key: tuple(names) for key, names in files.items()},
            others=tuple(others),
        )

    def running(self, ttl: float = TTL_SECONDS) -> dict[str, Owner]:
        """Return who works on stages right now, by key."""
        held = (key for key in self.files if any("/held-" in name for name in self.files[key]))
        found = {key: holder(self.store, key, ttl=ttl) for key in sorted(held)}
        return {key: owner for key, owner in found.items() if owner is not None}

    def inputs_of(self, key: str) -> Mapping[str, str] | None:
        """Return what an unfinished stage reads, by name; None if that was not written down."""
        if ATTEMPTS not in self.files[key]:
            return None
        found = self.store.read_json(f"{key}/{ATTEMPTS}").get("inputs")
        return found if isinstance(found, dict) else None

    def litter(self, key: str) -> list[str]:
        """Return files of a finished artifact that do not belong to it, what a kill has left."""
        own = {output.path for output in self.records[key].outputs} | {RECORD}
        return [n for n in self.files[key] if n not in own and not n.startswith(".lease/")]


@functools.lru_cache(maxsize=1 << 16)
def _mark(row_id: str) -> str:
    return mark_of(row_id)


def rows_with(marks: Marks, table: pa.Table) -> list[int]:
    """Return the places of forgotten rows in a table with a column of row ids."""
    return [i for i, row_id in enumerate(table[ROW_ID].to_pylist()) if _mark(row_id) in marks]


def marks_in(store: Store, path: str, marks: Marks) -> list[str]:
    """Return the marks among `marks` of a Parquet file's rows, one per row.

    Raises:
        StoreError: the file cannot be read.
    """
    table = read_columns(store, path, [ROW_ID])
    if table is None:
        return []
    return [found for row_id in table[ROW_ID].to_pylist() if (found := _mark(row_id)) in marks]


def read_columns(store: Store, path: str, columns: Sequence[str]) -> pa.Table | None:
    """Return columns of a Parquet file, None if it has no row ids.

    Raises:
        StoreError: it cannot be read as Parquet.
    """
    try:
        with store.filesystem.open_input_file(store.full_path(path)) as source:
            file = pq.ParquetFile(source)
            if ROW_ID not in file.schema_arrow.names:
                return None
            return file.read(columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"{store.uri_for(path)}: cannot be read as Parquet: {store.location.redact(str(error))}; "
            "remove the artifact's folder, so that it is computed anew, and repeat the command"
        ) from None


def json_names(record: StageRecord) -> list[str]:
    """Return the JSON files of an artifact; those in folders belong to models."""
    names = [output.path for output in record.outputs]
    return [name for name in names if name.endswith(".json") and "/" not in name]


def parquet_names(record: StageRecord) -> list[str]:
    """Return the Parquet files of an artifact."""
    return [output.path for output in record.outputs if output.path.endswith(".parquet")]


def quarantined_marks(inventory: Inventory) -> Marks:
    """Return the marks of all rows in quarantines: of their texts, and of ids that reasons name."""
    found: set[str] = set()
    for key, record in inventory.records.items():
        for entry in (
            inventory.store.read_json(f"{key}/{QUARANTINE}") if _has_quarantine(record) else ()
        ):
            found |= {mark_of(row_id) for row_id in ids_in(entry["reason"])}
            found |= {mark_of(quarantined_id(entry["text"]))} if "text" in entry else set()
    return frozenset(found)


def _has_quarantine(record: StageRecord) -> bool:
    return QUARANTINE in json_names(record)


def scrubbed(text: str, name: str, marks: Marks) -> tuple[str, int] | None:
    """Return a JSON file without entries about forgotten rows and how many went; None if it has none."""
    if name != QUARANTINE and not mentioned(text, marks):
        return None
    value, gone = _scrub(json.loads(text), marks)
    if not gone:
        return None
    return json.dumps(value, indent=1, sort_keys=True) + "\n", gone


def _scrub(value: Any, marks: Marks) -> tuple[Any, int]:
    if isinstance(value, list):
        kept = [item for item in value if not _is_about(item, marks)]
        pairs = [_scrub(item, marks) for item in kept]
        return [item for item, _ in pairs], len(value) - len(kept) + sum(n for _, n in pairs)
    if isinstance(value, dict):
        found = {key: _scrub(item, marks) for key, item in value.items()}
        return {key: item for key, (item, _) in found.items()}, sum(n for _, n in found.values())
    return value, 0


def _is_about(item: Any, marks: Marks) -> bool:
    """Whether an entry of a list is about a forgotten row: names its id, or is one in quarantine."""
    if not isinstance(item, dict):
        return False
    texts = [text for text in item.values() if isinstance(text, str)]
    if any(mentioned(text, marks) for text in texts):
        return True
    text = item.get("text")
    return isinstance(text, str) and "reason" in item and mark_of(quarantined_id(text)) in marks
