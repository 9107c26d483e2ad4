"""Identity of things: canonical JSON, its hash, and the difference between two of them.

What decides a stage's result is written as plain JSON (its payload) and hashed; equal payloads mean
equal results, so the hash is the address under which the result is kept. Only values whose text is
the same in every process are understood. Anything else is refused, because `str()` of an arbitrary
object may hold a memory address or change with a library, and would silently send two equal runs to
two addresses.

Source data enters by content: `file_digest` and `folder_digest`. A cache keyed by size and
modification time keeps a 26 GB model from being read again at each tick of a scheduler.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any, Final
from uuid import uuid4

from seekr.errors import ConfigError, DataError

ID_LENGTH: Final = 20
"""Hex characters of an id: 80 bits. A store with a million stages has a chance of about 4e-13 that
any two ids meet (n^2 / 2^81), and the id still fits in a path and on a screen."""

CHUNK_BYTES: Final = 4 << 20
_SETTLED_SECONDS: Final = 2.0


class Absent(enum.Enum):
    """Marks the side of a `Change` on which the field does not exist (None is a value of its
    own)."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return "(absent)"


ABSENT: Final = Absent.ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One field that differs. `path` is dotted (`method.layer_budget`), list items are numbered
    (`heads.0`)."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path} {_shown(self.old)} -> {_shown(self.new)}"


def plain(value: Any, path: str = "value") -> Any:
    """Reduces `value` to dict, list, str, int, float, bool and None, the same in every process.

    Tuples become lists, enums their value, paths their POSIX text, dataclasses a dict of their
    fields.

    Args:
        value: what bears identity.
        path: where the value sits; used in messages only.

    Raises:
        ConfigError: a type that has no canonical text, a key that is not a string, or a number that
            is not finite. The message names the place, the type and the remedy.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value, path)
    if value is None or type(value) in (str, int, bool):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ConfigError(
                f"{path}: found {value!r}; JSON has no such number. Use None or a finite value."
            )
        return value
    if isinstance(value, PurePath):
        return value.as_posix()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{path}.{f.name}") for f in fields(value)}
    if isinstance(value, Mapping):
        return {_key(key, path): plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}.{i}") for i, item in enumerate(value)]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise ConfigError(
        f"{path}: a value of type {kind} cannot be part of a fingerprint. Allowed: dict, list, "
        "tuple, str, int, float, bool, None, paths, enums, dataclasses. Convert it first: a set "
        "with sorted(), a pydantic model with model_dump(), a tensor with tolist(), a numpy "
        "scalar with item()."
    )


def canonical_json(value: Any) -> str:
    """The one text of `value`: keys sorted, no spaces, ASCII, floats by `repr`, no NaN."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """First `ID_LENGTH` hex characters of the sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:ID_LENGTH]


def diff(old: Any, new: Any) -> list[Change]:
    """Every field in which two values differ, in the order of their paths; types count (1, 1.0,
    True differ)."""
    return list(_diff(plain(old), plain(new), ""))


def file_digest(path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> str:
    """Sha256 (64 hex characters) of one file's bytes.

    Args:
        path: the file; symbolic links are followed.
        cache: a JSON file that remembers digests by path, size and modification time. It is created
            when missing and thrown away when unreadable.

    Raises:
        DataError: the file is missing, unreadable, or changed while it was read.
    """
    book = _read_cache(cache)
    digest, fresh = _digest_with(book, Path(path))
    _write_cache(cache, fresh)
    return digest


def folder_digest(path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> str:
    """Sha256 over the relative names and the contents of all files below a folder.

    Hidden files and folders (a name that starts with a dot) are left out: they hold what tools
    leave behind, never data. Order, modification times and the folder's own name do not matter.

    Raises:
        DataError: not a folder, holds no file, or a file in it cannot be read.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Check the path.")
    book, fresh = _read_cache(cache), {}
    listing: list[list[str]] = []
    for file in sorted(_visible_files(root), key=lambda f: f.relative_to(root).as_posix()):
        digest, added = _digest_with(book, file)
        fresh |= added
        listing.append([file.relative_to(root).as_posix(), digest])
    _write_cache(cache, fresh)
    if not listing:
        raise DataError(
            f"{root}: the folder holds no files (hidden files do not count). Check the path."
        )
    return hashlib.sha256(canonical_json(listing).encode()).hexdigest()


def _key(key: Any, path: str) -> str:
    text = key.value if isinstance(key, enum.Enum) else key
    if type(text) is not str:
        raise ConfigError(
            f"{path}: key {key!r} is of type {type(key).__name__}; only strings can be keys."
        )
    return text


def _shown(value: Any) -> str:
    text = repr(value) if value is ABSENT else json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else text[:77] + "..."


def _diff(old: Any, new: Any, path: str) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _diff(
                old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else key
            )
    elif isinstance(old, list) and isinstance(new, list):
        for i in range(max(len(old), len(new))):
            left = old[i] if i < len(old) else ABSENT
            right = new[i] if i < len(new) else ABSENT
            yield from _diff(left, right, f"{path}.{i}" if path else str(i))
    elif ABSENT in (old, new) or canonical_json(old) != canonical_json(new):
        yield Change(path=path, old=old, new=new)


def _visible_files(folder: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:
        raise DataError(
            f"{folder}: a symbolic link leads back to a folder above it. Remove the link."
        )
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _visible_files(entry, seen | {real})
        else:
            yield entry


def _digest_with(book: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """Digest of `path` from the cache or from its bytes, and the cache entries that this added."""
    try:
        real = str(path.resolve(strict=True))
        before = os.stat(real)
        key = [before.st_size, before.st_mtime_ns]
        known = book.get(real)
        if isinstance(known, list) and len(known) == 3 and known[:2] == key:
            return str(known[2]), {}
        with open(real, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        after = os.stat(real)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error
    if [after.st_size, after.st_mtime_ns] != key:
        raise DataError(f"{path}: changed while it was read. Run again when nothing writes to it.")
    # A file written within the clock's resolution of now could change under the same time stamp.
    settled = time.time() - before.st_mtime > _SETTLED_SECONDS
    return digest, {real: [*key, digest]} if settled else {}


def _read_cache(cache: str | os.PathLike[str] | None) -> dict[str, Any]:
    if cache is None:
        return {}
    try:
        book = json.loads(Path(cache).read_text())
    except (OSError, ValueError):
        return {}  # a cache: what it cannot tell is computed again
    return book if isinstance(book, dict) else {}


def _write_cache(cache: str | os.PathLike[str] | None, fresh: dict[str, Any]) -> None:
    if cache is None or not fresh:
        return
    target = Path(cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    # Read again just before: two runs that write at once lose an entry at worst, never the file.
    temporary.write_text(json.dumps(_read_cache(cache) | fresh, indent=1, sort_keys=True))
    os.replace(temporary, target)
