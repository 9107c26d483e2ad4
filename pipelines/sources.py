"""Where the rows of a task are: a source string becomes a list of files, each with a layout.

A source is what a user writes behind `train:`: a file, a folder, a glob, or a URI that pyarrow.fs
understands. It names data and never says how the data is laid out; this module decides that from
the extension and, where the extension leaves it open (`.json`), from the first bytes. The result is
a plain value that can be sent to another process and opened there. No row is read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from seekr.errors import DataError

CHUNK_BYTES = 1 << 20
_URI = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Layout(StrEnum):
    """How one file holds its rows."""

    JSONL = "jsonl"  # one JSON object per line
    JSON = "json"  # one list of JSON objects
    INSTRUCTIONS = "natural-instructions"  # one object: a header and "Instances"
    PARQUET = "parquet"
    ARROW = "hf-dataset"  # a shard of a folder written by datasets' save_to_disk


_LAYOUT_OF_SUFFIX = {
    ".jsonl": Layout.JSONL,
    ".ndjson": Layout.JSONL,
    ".json": None,  # decided by the content
    ".parquet": Layout.PARQUET,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a source.

    Attributes:
        name: what people are shown: an absolute path, or a URI without credentials and options.
        root: the source as it was given; opens the file system. It may hold credentials, so it is
            never shown.
        path: the file's path inside that file system.
        layout: how the rows lie in it.
        size: bytes.
        mtime_ns: last change in nanoseconds, None where the file system does not tell.
    """

    name: str
    root: str = field(repr=False)
    path: str
    layout: Layout
    size: int
    mtime_ns: int | None


def list_files(source: str | Path) -> tuple[SourceFile, ...]:
    """Every file of a source: a file, a folder (searched through), a glob or a URI of one of these.

    Names that begin with "." or "_" are skipped inside folders and globs. Files come in the order
    of their paths, the shards of a Hugging Face dataset in the dataset's own order.

    Raises:
        DataError: nothing is there, it cannot be read, or a file has a layout that is not known.
    """
    root = str(source)
    filesystem, path = open_filesystem(root)
    try:
        info = filesystem.get_file_info(path)
        is_there = info.type != pafs.FileType.NotFound
        infos = [info] if is_there else match_glob(filesystem, path)
        if not infos:
            raise DataError(
                f"{shown_path(root, path)} does not exist. A source is a file, a folder, a glob or a "
                "URI; correct the path, or mount the storage that holds it"
            )
        files = [file for found in infos for file in _expand(filesystem, root, found)]
    except OSError as error:
        raise DataError(f"{shown_path(root, path)} cannot be read: {error}") from error
    if not files:
        raise DataError(f"{shown_path(root, path)} holds no data files. {_allowed()}")
    return tuple(files)


def display_name(source: str | Path) -> str:
    """A source as people may see it: an absolute path, or a URI without credentials and options."""
    root = str(source)
    return shown_path(root, root) if _URI.match(root) else _absolute(root)


def detect_layout(source: str | Path) -> Layout:
    """The layout of one file, or of a Hugging Face dataset folder.

    Raises:
        DataError: as `list_files`; or the source is a folder whose files differ in layout.
    """
    layouts = sorted({file.layout for file in list_files(source)})
    if len(layouts) > 1:
        raise DataError(
            f"{display_name(source)} mixes the layouts {', '.join(layouts)}; "
            "ask for one file's layout, or use list_files"
        )
    return layouts[0]


def open_file(file: SourceFile) -> pa.NativeFile:
    """The file opened for random access; close it after use."""
    filesystem, _ = open_filesystem(file.root)
    return filesystem.open_input_file(file.path)


def open_stream(file: SourceFile) -> pa.NativeFile:
    """The file opened for reading once, ahead of its reader; close it after use."""
    filesystem, _ = open_filesystem(file.root)
    return filesystem.open_input_stream(file.path, compression=None, buffer_size=CHUNK_BYTES)


def read_chunks(file: SourceFile, feed: Callable[[bytes], object]) -> Iterator[bytes]:
    """The file's bytes from first to last, in pieces, each of which `feed` is given too."""
    with open_stream(file) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            feed(chunk)
            yield chunk


def split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines ended by LF, without it. Other Unicode line ends are text. The last may be empty."""
    pending: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        pending.append(first)
        if rest:
            yield b"".join(pending)
            yield from rest[:-1]
            pending = [rest[-1]]
    yield b"".join(pending)


def open_filesystem(root: str) -> tuple[Any, str]:
    """The file system of a source and the source's path in it, glob characters included."""
    if not _URI.match(root):
        return pafs.LocalFileSystem(), _absolute(root)
    address, mark, options = root.partition("?")
    literal, glob = split_glob(address)
    uri, shown = f"{literal}{mark}{options}", display_name(root)
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).replace(uri, shown)
        raise DataError(
            f"{shown} cannot be opened: {reason}. Allowed are local paths and the URIs of "
            "pyarrow.fs (file, s3, gs, abfs, hdfs)"
        ) from None  # the cause's text may hold credentials
    return filesystem, f"{path}/{glob}" if glob else path


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def split_glob(path: str) -> tuple[str, str]:
    """`a/b*/c` -> (`a`, `b*/c`): the folder to list, and the pattern inside it ("" for no glob)."""
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return "/".join(parts[:first]), "/".join(parts[first:])


def match_glob(filesystem: Any, path: str) -> list[Any]:
    """What a glob matches, in the order of the paths. `**` stands for any number of folders."""
    folder, pattern = split_glob(path)
    if not pattern:
        return []
    deep = "/" in pattern or "**" in pattern
    selector = pafs.FileSelector(folder or "/", recursive=deep, allow_not_found=True)
    skip = len(folder) + 1
    matches = [
        info
        for info in filesystem.get_file_info(selector)
        if not is_hidden(info.path[skip:])
        and _matches(info.path[skip:].split("/"), pattern.split("/"))
    ]
    return sorted(matches, key=lambda info: info.path)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _expand(filesystem: Any, root: str, info: Any) -> Iterator[SourceFile]:
    """One entry -> its files: itself, a dataset's shards, or everything inside a folder."""
    if info.type != pafs.FileType.Directory:
        yield _source_file(root, info, _layout_of_file(filesystem, root, info))
        return
    inside = filesystem.get_file_info(pafs.FileSelector(info.path))
    entries = {entry.base_name: entry for entry in sorted(inside, key=lambda entry: entry.path)}
    if "dataset_dict.json" in entries:
        splits = _read_json(filesystem, root, entries["dataset_dict.json"].path)["splits"]
        raise DataError(
            f"{shown_path(root, info.path)} holds the splits {', '.join(splits)}. A source is one of "
            f"them: write {shown_path(root, info.path)}/{splits[0]}"
        )
    if {"state.json", "dataset_info.json"} <= entries.keys():
        state = _read_json(filesystem, root, entries["state.json"].path)
        for shard in state["_data_files"]:
            found = entries.get(shard["filename"])
            if found is None:
                raise DataError(
                    f"{shown_path(root, info.path)}: the shard {shard['filename']} named by state.json "
                    "is missing; write the dataset again with save_to_disk"
                )
            yield _source_file(root, found, Layout.ARROW)
        return
    for name, entry in entries.items():
        if not is_hidden(name):
            yield from _expand(filesystem, root, entry)


def _source_file(root: str, info: Any, layout: Layout) -> SourceFile:
    return SourceFile(
        name=shown_path(root, info.path),
        root=root,
        path=info.path,
        layout=layout,
        size=info.size,
        mtime_ns=info.mtime_ns,
    )


def _layout_of_file(filesystem: Any, root: str, info: Any) -> Layout:
    suffix = Path(info.path).suffix.lower()
    if suffix not in _LAYOUT_OF_SUFFIX:
        raise DataError(
            f"{shown_path(root, info.path)} has the extension {suffix or 'none'!r}. {_allowed()}. In a "
            "folder, name the data with a glob: folder/*.jsonl"
        )
    return _LAYOUT_OF_SUFFIX[suffix] or _layout_of_json(filesystem, info.path)


def _layout_of_json(filesystem: Any, path: str) -> Layout:
    """A list, a Natural-Instructions object, or JSON Lines under another name."""
    with filesystem.open_input_stream(path, compression=None) as stream:
        chunks = iter(lambda: stream.read(CHUNK_BYTES), b"")
        lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in split_lines(chunks))
        first = next((line for line in lines if line), b"")
    if not first.startswith(b"{"):
        return Layout.JSON
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return Layout.INSTRUCTIONS
    return Layout.INSTRUCTIONS if "Instances" in value else Layout.JSONL


def _read_json(filesystem: Any, root: str, path: str) -> Any:
    with filesystem.open_input_stream(path, compression=None) as stream:
        text = stream.read()
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{shown_path(root, path)} is not JSON: {error}. Write the dataset again with save_to_disk"
        ) from error


def shown_path(root: str, path: str) -> str:
    """A path as people may see it: with its scheme, without credentials and options."""
    match = _URI.match(root)
    if not match or match.group().lower() == "file://":
        return path
    if _URI.match(path):
        path = _URI.sub("", path).partition("?")[0].rpartition("@")[2]
    return match.group() + path


def _allowed() -> str:
    known = ", ".join(_LAYOUT_OF_SUFFIX)
    return f"Allowed are {known} and folders written by datasets' save_to_disk"
