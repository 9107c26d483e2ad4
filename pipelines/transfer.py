"""Bytes on the move: hashed while they are copied, and one verified copy per host.

A model of many gigabytes that lives in an object store is needed by every worker of a node. It is
downloaded once per node into a folder whose name is made of the digests of its files, so a copy can
never be stale; it appears there by a rename, so it can never be partial.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from pipelines.fingerprint import CHUNK_BYTES, fingerprint
from seekr.errors import StoreError

CACHE_VARIABLE: Final = "SEEKR_CACHE_DIR"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file of an artifact: path relative to the artifact's folder, bytes, sha256 (64 hex)."""

    path: str
    size: int
    sha256: str


def copy_hashed(source: Any, sink: Any | None) -> tuple[str, int]:
    """Copies a binary stream to another (or to nowhere).

    Returns:
        The sha256 (64 hex characters) and the number of the bytes that were read.
    """
    hasher, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        hasher.update(chunk)
        size += len(chunk)
        if sink is not None:
            sink.write(chunk)
    return hasher.hexdigest(), size


def flush(path: str | os.PathLike[str]) -> None:
    """Forces a local file, or the entries of a local folder, out to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """Where copies lie on this host: `SEEKR_CACHE_DIR`, else `seekr` in the user's cache folder.

    Nothing is evicted. It can be deleted whenever no run is active.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seekr"


def drop_copy(wanted: Sequence[OutputFile]) -> None:
    """Removes this host's copy of `wanted`, if there is one."""
    copy = _copy_of(wanted)
    if copy.parent.is_dir():
        shutil.rmtree(copy, ignore_errors=True)


def _copy_of(wanted: Sequence[OutputFile]) -> Path:
    return cache_folder() / fingerprint(sorted([file.path, file.sha256] for file in wanted))


def fetch_once(wanted: Sequence[OutputFile], fetch: Callable[[OutputFile, Path], None]) -> Path:
    """A local folder that holds `wanted`, downloaded by the first process of this host that asks.

    Args:
        wanted: the files, with the digests that name the copy.
        fetch: writes one of them to the path it is given, and raises if its digest is wrong.

    Raises:
        StoreError: the cache folder cannot be used; whatever `fetch` raises.
    """
    copy = _copy_of(wanted)
    root = copy.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_one(root / f"{copy.name}.lock"):
            if not _complete(copy, wanted):
                _download(copy, wanted, fetch)
    except OSError as error:
        raise StoreError(
            f"cache folder {root}: {error}. Free some space or point {CACHE_VARIABLE} to a folder "
            "that can be written."
        ) from error
    return copy


def _download(
    copy: Path, wanted: Sequence[OutputFile], fetch: Callable[[OutputFile, Path], None]
) -> None:
    temporary = copy.with_name(f".tmp-{copy.name}-{uuid4().hex}")
    try:
        for file in wanted:
            target = temporary / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            fetch(file, target)
        shutil.rmtree(copy, ignore_errors=True)  # a damaged copy; there is none as a rule
        temporary.rename(copy)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _complete(copy: Path, wanted: Sequence[OutputFile]) -> bool:
    # Digests were checked on the way in; sizes catch what a full disk or a hand did afterwards.
    try:
        return all((copy / file.path).stat().st_size == file.size for file in wanted)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Holds a lock that the kernel drops when this process dies."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
