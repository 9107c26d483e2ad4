"""What lies in an inbox: files and folders on their way to becoming tasks, and whether they are whole.

A **file** (`news.jsonl`) is a task's training rows. A **folder** (`news/`) holds `train.*` or `train/`,
perhaps `test.*` or `test/`, perhaps `task.yaml` with options, and `_SUCCESS`, written last: several files
never appear at once, anywhere, so someone has to say when they are all there. A file in an object store
appears when its upload ends, so it is whole when it is seen. A file on a disk grows under its final name
unless its writer renames it, so it is whole once it has not changed for a while. Names that begin with
"." or "_", or end in .tmp or .part, are not looked at.

Nothing is read here but names, sizes and times: deliveries that are known already cost a listing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs as pafs

from pipelines.provenance import redact
from pipelines.sources import (
    display_name,
    is_hidden,
    match_glob,
    open_filesystem,
    shown_path,
    split_glob,
)
from seekr.errors import DataError

MARKER: Final = "_SUCCESS"
OPTIONS: Final = "task.yaml"
# File systems on which a file is there as a whole or not at all.
_WHOLE: Final = frozenset({"s3", "gcs", "abfs"})
_UNFINISHED: Final = (".tmp", ".part")


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxFile:
    """One file: its path on the inbox's file system, and what tells that it has changed."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One file or folder of an inbox.

    Attributes:
        name: of the task it becomes: the file's name without its ending, or the folder's.
        place: where it is, for people and records.
        root: the inbox as the YAML has it; opens the file system and may hold credentials.
        path: on that file system.
        files: all of it, in the order of their paths.
        modified: seconds since 1970 when it became whole: of a folder, when `_SUCCESS` was written.
        waits_for: what is missing before it may be taken; empty if nothing is.
    """

    name: str
    place: str
    root: str = field(repr=False)
    path: str
    files: tuple[InboxFile, ...]
    modified: float
    waits_for: str = ""

    @property
    def stamp(self) -> str:
        """20 hex characters that change when any of its files does."""
        seen = [[file.path, file.size, file.mtime_ns] for file in self.files]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:20]

    @property
    def modified_at(self) -> str:
        """`modified` as ISO 8601, UTC."""
        return datetime.fromtimestamp(self.modified, UTC).isoformat(timespec="milliseconds")

    def part(self, name: str) -> tuple[InboxFile, ...]:
        """Return the files of `train` or `test`; of a single file it is `train`.

        Raises:
            DataError: there are both `train.jsonl` and `train/`, or two endings.
        """
        if len(self.files) == 1 and self.files[0].path == self.path:
            return self.files if name == "train" else ()
        found: dict[str, list[InboxFile]] = {}
        for file in self.files:
            first = self.inside(file).partition("/")[0]
            if PurePosixPath(first).stem == name:
                found.setdefault(first, []).append(file)
        if len(found) > 1:
            raise DataError(
                f"{self.place} has several sources of {name} rows: {', '.join(sorted(found))}; keep one"
            )
        return tuple(next(iter(found.values()), ()))

    def source(self, part: Sequence[InboxFile]) -> str:
        """Return what opens a part as a source of rows: its file, or the folder that holds its files."""
        inner = self.inside(part[0]).partition("/")
        path = f"{self.path}/{inner[0]}" if part[0].path != self.path else self.path
        root, mark, options = self.root.partition("?")
        scheme, found, rest = root.partition("://")
        if not found:
            return path
        user = (
            f"{rest.partition('/')[0].rpartition('@')[0]}@" if "@" in rest.partition("/")[0] else ""
        )
        return f"{scheme}://{user}{quote(path)}{mark}{options}"

    def inside(self, file: InboxFile) -> str:
        """Return a file's path below the folder, or a single file's own name."""
        return file.path[len(self.path) + 1 :] or PurePosixPath(file.path).name

    def open(self, file: InboxFile) -> pa.NativeFile:
        """Open one of its files to be read once."""
        filesystem, _ = open_filesystem(self.root)
        return filesystem.open_input_stream(file.path, compression=None)


def look(inbox: str, settle: float, clock: Callable[[], float] = time.time) -> list[Delivery]:
    """Return what is in an inbox in the order of arrival: by modification time, then by name.

    Args:
        inbox: a folder, a glob, or a URI of one of these.
        settle: seconds that a file on a disk has to have been left alone.
        clock: seconds since 1970.

    Raises:
        DataError: it cannot be read, or is a single file; or, on a disk, is not there.
    """
    filesystem, path = open_filesystem(inbox)
    try:
        found = [_delivery(filesystem, inbox, info) for info in _entries(filesystem, inbox, path)]
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"tasks_from {display_name(inbox)} cannot be read: {redact(str(error))}. Check the place, the "
            "credentials, and for an object store region and endpoint_override"
        ) from None  # the cause's text may hold credentials
    now = clock()
    seen = [_settled(d, filesystem, settle, now) for d in found if d.files]
    return sorted(seen, key=lambda delivery: (delivery.modified, delivery.name, delivery.path))


def _entries(filesystem: Any, inbox: str, path: str) -> list[Any]:
    """Return what a glob matches, or what lies directly in a folder."""
    info = filesystem.get_file_info(path.rstrip("/") or "/")
    if info.type == pafs.FileType.File:
        raise DataError(
            f"tasks_from {display_name(inbox)} is a file; name the folder that such files arrive in, or "
            "a glob such as inbox/*"
        )
    if info.type == pafs.FileType.Directory:
        found = filesystem.get_file_info(pafs.FileSelector(info.path))
    else:
        _require(filesystem, inbox, split_glob(path)[0])
        found = match_glob(filesystem, path)
    names = ((entry, PurePosixPath(entry.path).name) for entry in found)
    return [e for e, name in names if not is_hidden(name) and not name.endswith(_UNFINISHED)]


def _require(filesystem: Any, inbox: str, folder: str) -> None:
    """Tell an inbox that is empty from a disk that is not mounted; of a bucket, see that it is there."""
    if filesystem.type_name in _WHOLE:
        folder = folder.partition("/")[0]
    if filesystem.get_file_info(folder or "/").type != pafs.FileType.Directory:
        raise DataError(
            f"tasks_from {display_name(inbox)}: {shown_path(inbox, folder)} does not exist; make it, or "
            "mount the storage that holds it"
        )


def _delivery(filesystem: Any, inbox: str, info: Any) -> Delivery:
    inside = [info]
    waits_for, name = "", PurePosixPath(info.path).stem
    if info.type == pafs.FileType.Directory:
        selector = pafs.FileSelector(info.path, recursive=True, allow_not_found=True)
        inside = filesystem.get_file_info(selector)
        name = PurePosixPath(info.path).name
    files = tuple(
        InboxFile(path=file.path, size=file.size, mtime_ns=file.mtime_ns)
        for file in sorted(inside, key=lambda file: file.path)
        if file.type == pafs.FileType.File
    )
    deciding = files
    if info.type == pafs.FileType.Directory:
        deciding = tuple(file for file in files if file.path == f"{info.path}/{MARKER}")
        waits_for = "" if deciding else f"{MARKER}, which its writer puts there last"
    return Delivery(
        name=name,
        place=shown_path(inbox, info.path),
        root=inbox,
        path=info.path,
        files=files,
        modified=max((file.mtime_ns for file in deciding or files), default=0) / 1e9,
        waits_for=waits_for,
    )


def _settled(delivery: Delivery, filesystem: Any, settle: float, now: float) -> Delivery:
    """Let a single file on a disk wait until nobody has written to it for a while."""
    single = len(delivery.files) == 1 and delivery.files[0].path == delivery.path
    age = now - delivery.modified
    if not single or filesystem.type_name in _WHOLE or age >= settle:
        return delivery
    rest = f"{settle - age:.0f} s without a change (inbox.settle_seconds is {settle:g})"
    return replace(delivery, waits_for=rest)
