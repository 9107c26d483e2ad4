"""Taking rows out of what a stage has written: the one way in which a finished artifact changes.

First the record says what its files will be and what they were (`Erasure`, not done), then the files are
replaced one by one, each whole, then the record says that it is done. So at any moment a file is one of
two that the record vouches for, readers meet no half of anything, and a call that was killed is completed
by doing it again: what is already gone is not found. Fingerprint and payload stay, so nothing is computed
anew; whoever read the rows has read them, which lineage tells.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.artifact import Erasure, StageRecord
from pipelines.forgotten import Request, without_ids
from pipelines.inventory import (
    QUARANTINE,
    Inventory,
    Marks,
    json_names,
    marks_in,
    parquet_names,
    rows_with,
    scrubbed,
)
from pipelines.rewrite import parquet_without
from pipelines.rowsets import BAD, TEST, TRAIN
from pipelines.store import Store
from pipelines.transfer import OutputFile, copy_hashed, drop_copy
from pipelines.workspace import CHECKPOINTS, FAILURE, KEPT_BETWEEN_ATTEMPTS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rewritten:
    """A file as it shall be, on this machine."""

    output: OutputFile
    path: Path
    gone: tuple[str, ...]


def erase(inventory: Inventory, key: str, request: Request) -> None:
    """Take a request's rows out of a finished artifact and say so in its record.

    The caller holds the artifact's lease. Doing it twice changes nothing.
    """
    store, record = inventory.store, StageRecord.load(inventory.store, key)
    with _rewritten(store, record, request.marks) as files:
        before = next((e for e in record.forgotten if e.request == request.id), None)
        if before is not None and before.done and not files:
            return
        begun = _begun(record, request, files, before)
        if begun != record:
            begun.save(store)
        store.verified.discard(key)
        for file in files:
            store.upload(file.path, key, file.output.path)
    _drop_copies(begun)
    ended = tuple(replace(e, done=e.done or e.request == request.id) for e in begun.forgotten)
    if ended != begun.forgotten:
        replace(begun, forgotten=ended).save(store)


def clear_unfinished(inventory: Inventory, key: str, request: Request) -> None:
    """Remove what attempts have left, and checkpoints of a stage that has read forgotten rows.

    The caller holds the lease. The next attempt would remove the former; the latter would go on with
    other rows than it began with, and with what it has learnt of the forgotten ones.
    """
    store = inventory.store
    begins = key in request.begin_again
    stays = KEPT_BETWEEN_ATTEMPTS - ({CHECKPOINTS, FAILURE} if begins else set())
    for name in sorted({name.partition("/")[0] for name in inventory.files[key]} - stays):
        store.remove(f"{key}/{name}")
    if FAILURE in inventory.files[key] and not begins:
        text = store.read_bytes(f"{key}/{FAILURE}").decode()
        if (clean := without_ids(text, request.marks)) != text:
            store.write_bytes(f"{key}/{FAILURE}", clean.encode())


@contextmanager
def _rewritten(store: Store, record: StageRecord, marks: Marks) -> Iterator[list[_Rewritten]]:
    """Provide the files of an artifact that have forgotten rows, without them, in a folder that goes."""
    folder = Path(tempfile.mkdtemp(prefix="seekr-forget-"))
    try:
        found: list[_Rewritten] = []
        for name in parquet_names(record):
            path = f"{record.key}/{name}"
            if gone := marks_in(store, path, marks):
                target = folder / f"{len(found)}.parquet"
                _write_without(store, path, marks, target)
                found.append(_file(name, target, gone))
        for name in json_names(record):
            text = store.read_bytes(f"{record.key}/{name}").decode()
            if (result := scrubbed(text, name, marks)) is not None:
                target = folder / f"{len(found)}.json"
                target.write_text(result[0], encoding="utf-8")
                found.append(_file(name, target, [""] * result[1]))
        yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _file(name: str, path: Path, gone: Sequence[str]) -> _Rewritten:
    with path.open("rb") as stream:
        sha256, size = copy_hashed(stream, None)
    output = OutputFile(path=name, size=size, sha256=sha256)
    return _Rewritten(output=output, path=path, gone=tuple(gone))


def _write_without(store: Store, path: str, marks: Marks, target: Path) -> None:
    """Write a Parquet file of a stage anew without some rows."""
    with store.filesystem.open_input_file(store.full_path(path)) as source:
        parquet_without(source, lambda table, _: rows_with(marks, table), target)


def _begun(
    record: StageRecord, request: Request, files: Sequence[_Rewritten], before: Erasure | None
) -> StageRecord:
    """Return the record that vouches for the files as they are and as they shall be."""
    new = {file.output.path: file.output for file in files}
    replaced = tuple(output for output in record.outputs if output.path in new)
    outputs = tuple(new.get(output.path, output) for output in record.outputs)
    if before is not None and not before.done:
        # A call was stopped here: numbers are as they shall be, and so is what is not found again.
        known = {old.path for old in before.replaced}
        more = tuple(output for output in replaced if output.path not in known)
        again = replace(before, replaced=(*before.replaced, *more))
        changed = tuple(again if e == before else e for e in record.forgotten)
        return replace(record, outputs=outputs, forgotten=changed)
    rows = sum(len(file.gone) for file in files if file.output.path.endswith(".parquet"))
    erasure = Erasure(
        request=request.id,
        at=request.at,
        rows=rows,
        learnt=request.learnt.get(record.key, ()),
        replaced=replaced,
        done=not files,
    )
    return replace(
        record,
        outputs=outputs,
        rows=record.rows if record.rows is None else max(0, record.rows - rows),
        stats=_ingest_stats(record.stats, files) if record.stage == "ingest" else record.stats,
        forgotten=(*record.forgotten, erasure),
    )


def _ingest_stats(stats: Mapping[str, Any], files: Sequence[_Rewritten]) -> dict[str, Any]:
    """Return the counts that later stages and reports read; other stages' numbers are what was."""
    gone: dict[str, list[str]] = {}
    for file in files:
        name = file.output.path
        kind = BAD if name == QUARANTINE else name.split("/")[1].removeprefix("kind=")
        gone.setdefault(kind, []).extend(file.gone)
    found = dict(stats)
    for kind, marks in gone.items():
        counted = "quarantined" if kind == BAD else f"{kind}_rows"
        found[counted] -= len(marks)
        left_out = f"{kind}_rows_forgotten"
        found[left_out] = found.get(left_out, 0) + len(marks)
    if "test_rows_in_train" in found:
        found["test_rows_in_train"] -= len({*gone.get(TRAIN, ())} & {*gone.get(TEST, ())})
    return found


def _drop_copies(record: StageRecord) -> None:
    """Remove this host's copies of files as they were, whatever part of the artifact was asked for."""
    erasures = [erasure for erasure in record.forgotten if not erasure.done]
    old = {file.path: file for erasure in erasures for file in erasure.replaced}
    outputs = [old.get(output.path, output) for output in record.outputs]
    prefixes = {""}
    for output in outputs:
        parts = output.path.split("/")
        prefixes |= {"/".join(parts[:end]) for end in range(1, len(parts) + 1)}
    for prefix in prefixes:
        inside = f"{prefix}/" if prefix else ""
        wanted = [o for o in outputs if o.path == prefix or o.path.startswith(inside)]
        if any(output.path in old for output in wanted):
            drop_copy(wanted)
