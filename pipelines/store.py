"""The artifact store: files under one root URI, the same verbs on a disk, S3 and Google Cloud
Storage.

Everything goes through `pyarrow.fs`, so Ray and pyarrow writers can share `filesystem` and
`full_path`. A store never holds half a file under its final name: a local write goes to a temporary
name and is renamed, an object appears when its upload ends. Paths are relative to the root, with
forward slashes.

Credentials come from the environment or from the URI
(`s3://key:secret@bucket/prefix?endpoint_override=host:port&scheme=http&region=...`). They are never
part of a message, a `repr` or a record.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from pipelines.location import Location, check_writable, locate
from pipelines.transfer import OutputFile, copy_hashed, fetch_once
from pipelines.transfer import flush as flush_to_disk
from seekr.errors import StoreError

TEMPORARY_PREFIX: Final = ".tmp-"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as the store lists it: path relative to the root, bytes, and the store's own time
    stamp."""

    path: str
    size: int
    mtime: float


class Store:
    """Files under one root. Cheap to pickle: a copy opens the same URI again in its process.

    Attributes:
        location: where it is; `location.shown` is safe to print.
        verified: artifacts whose digests this process has already checked.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.verified: set[str] = set()

    @classmethod
    def open(cls, uri: str | os.PathLike[str], *, writable: bool = True) -> Store:
        """Opens the store at `uri`: a local path, `file://`, `s3://` or `gs://`.

        Args:
            uri: the root; it need not exist yet (a bucket must).
            writable: prove now that files can be written and removed.

        Raises:
            StoreError: an unknown scheme, an unusable URI, or a place that cannot be written.
        """
        location = locate(uri)
        if writable:
            check_writable(location)
        return cls(location)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.location.uri,)

    def __repr__(self) -> str:
        return f"Store({self.location.shown!r})"

    @property
    def is_local(self) -> bool:
        """Whether the files lie on this machine's file system and can be used where they are."""
        return self.location.is_local

    @property
    def filesystem(self) -> fs.FileSystem:
        """For pyarrow and Ray readers and writers, together with `full_path`."""
        return self.location.filesystem

    def full_path(self, path: str) -> str:
        """Path on `filesystem` (bucket included) of a path relative to the root."""
        return f"{self.location.root.rstrip('/')}/{_checked(path)}"

    def uri_for(self, path: str) -> str:
        """The place for people and records: a path on a disk, else a URI without credentials."""
        return f"{self.location.shown.rstrip('/')}/{_checked(path)}"

    def address(self, path: str) -> str:
        """What opens a stored file or folder as a source of rows; may hold credentials, never show
        it."""
        if self.is_local:
            return self.full_path(path)
        root, mark, options = self.location.uri.partition("?")
        return f"{root.rstrip('/')}/{quote(_checked(path))}{mark}{options}"

    def stat(self, path: str) -> StoredFile | None:
        """The file at `path`, or None where there is no file."""
        with self._io("looking at", path):
            info = self.filesystem.get_file_info(self.full_path(path))
        return self._stored(info) if info.type == fs.FileType.File else None

    def exists(self, path: str) -> bool:
        """Whether a file or a folder is at `path`."""
        with self._io("looking at", path):
            return self.filesystem.get_file_info(self.full_path(path)).type != fs.FileType.NotFound

    def list(self, path: str) -> list[StoredFile]:
        """All files below the folder `path`, sorted by path; empty where there is no such
        folder."""
        infos = self._select(path, recursive=True)
        files = [self._stored(info) for info in infos if info.type == fs.FileType.File]
        return sorted(files, key=lambda file: file.path)

    def list_all(self) -> list[StoredFile]:
        """All files of the store, sorted by path."""
        selector = fs.FileSelector(self.location.root, recursive=True, allow_not_found=True)
        with self._io("listing", ""):
            infos = self.filesystem.get_file_info(selector)
        files = [self._stored(info) for info in infos if info.type == fs.FileType.File]
        return sorted(files, key=lambda file: file.path)

    def children(self, path: str) -> list[str]:
        """Names of the folders directly below the folder `path`, sorted."""
        infos = self._select(path, recursive=False)
        return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)

    def read_bytes(self, path: str) -> bytes:
        """The content of one file.

        Raises:
            StoreError: it is missing or cannot be read.
        """
        with self._source(path) as stream:
            return stream.read()

    def read_json(self, path: str) -> Any:
        """The content of one JSON file.

        Raises:
            StoreError: it is missing, cannot be read, or is not JSON.
        """
        data = self.read_bytes(path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise StoreError(
                f"{self.uri_for(path)}: {len(data)} bytes that are not JSON: {error}."
            ) from None

    def write_bytes(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Writes one file so that a reader sees all of it or none; a crash leaves the old one.

        Args:
            path: where to.
            data: the content.
            durable: on a disk, survive a power cut, too; what dies with its process need not.

        Raises:
            StoreError: it cannot be written.
        """
        with self._sink(path, durable) as stream:
            stream.write(data)

    def write_json(self, path: str, value: Any) -> None:
        """Writes one JSON file, as `write_bytes` does. NaN and infinity are refused
        (ValueError)."""
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        self.write_bytes(path, text.encode() + b"\n")

    def remove(self, path: str) -> None:
        """Removes a file, or a folder with all it holds. Nothing at `path` is fine."""
        full = self.full_path(path)
        with self._io("removing", path), contextlib.suppress(FileNotFoundError):
            if self.filesystem.get_file_info(full).type == fs.FileType.Directory:
                self.filesystem.delete_dir(full)
            elif self.filesystem.get_file_info(full).type != fs.FileType.NotFound:
                self.filesystem.delete_file(full)

    def digest(self, path: str, *, flush: bool = False) -> str:
        """Sha256 (64 hex characters) of a stored file.

        Args:
            path: the file.
            flush: on a disk, also force the bytes out, so that a record never names bytes that a
                power cut can take back.
        """
        if flush and self.is_local:
            with self._io("flushing", path):
                flush_to_disk(self.full_path(path))
        with self._source(path) as stream:
            return copy_hashed(stream, None)[0]

    def upload(
        self, source: str | os.PathLike[str], folder: str, name: str = ""
    ) -> list[OutputFile]:
        """Copies a local file or folder into the store; digests are taken while copying.

        Args:
            source: a file, or a folder whose files are all copied.
            folder: where to, relative to the root.
            name: path below `folder`. Default: the file's own name; for a folder, `folder` itself.

        Returns:
            What was written, with paths relative to `folder`, sorted.
        """
        root = Path(source)
        if not root.exists():
            raise StoreError(
                f"{root}: nothing to upload to {self.uri_for(folder)}; no such file or folder."
            )
        if root.is_file():
            return [self._upload_file(root, folder, name or root.name)]
        files = sorted((f.relative_to(root).as_posix(), f) for f in root.rglob("*") if f.is_file())
        return [self._upload_file(f, folder, f"{name}/{sub}" if name else sub) for sub, f in files]

    def local(self, folder: str, outputs: Sequence[OutputFile]) -> Path:
        """A folder of this machine that holds `outputs`: the stored folder itself, or a verified
        copy.

        A copy lies in the host's cache under a name made of its digests, is complete once it is
        there, and is downloaded once however many processes ask.

        Args:
            folder: the artifact's folder, relative to the root.
            outputs: what is needed of it, as its record says.

        Raises:
            StoreError: a file is missing or its size or digest is not the recorded one.
        """
        if self.is_local:
            return Path(self.full_path(folder))

        def fetch(output: OutputFile, target: Path) -> None:
            path = f"{folder}/{output.path}"
            with self._source(path) as stream, open(target, "wb") as sink:
                found, size = copy_hashed(stream, sink)
            if (found, size) != (output.sha256, output.size):
                raise StoreError(
                    f"{self.uri_for(path)}: found {size} bytes with sha256 {found}, its record "
                    f"says {output.size} bytes with {output.sha256}. Remove {self.uri_for(folder)} "
                    "and run again: it will be computed anew."
                )

        return fetch_once(outputs, fetch)

    def receive(self, stream: Any, folder: str, name: str) -> OutputFile:
        """Copies what an open file still holds to `name` below `folder`, as `upload` does."""
        with self._sink(f"{folder}/{name}") as sink:
            sha256, size = copy_hashed(stream, sink)
        return OutputFile(path=name, size=size, sha256=sha256)

    def _upload_file(self, source: Path, folder: str, name: str) -> OutputFile:
        with open(source, "rb") as stream:
            return self.receive(stream, folder, name)

    @contextlib.contextmanager
    def _source(self, path: str) -> Iterator[Any]:
        full = self.full_path(path)
        with self._io("reading", path), self.filesystem.open_input_stream(full) as stream:
            yield stream

    @contextlib.contextmanager
    def _sink(self, path: str, durable: bool = True) -> Iterator[Any]:
        """A stream whose bytes become the file at `path` when the block ends without an error."""
        full = self.full_path(path)
        with self._io("writing", path):
            if not self.is_local:
                with self.filesystem.open_output_stream(full) as stream:
                    yield stream
                return
            folder, name = os.path.split(full)
            os.makedirs(folder, exist_ok=True)
            temporary = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid4().hex}-{name}")
            try:
                with open(temporary, "wb") as stream:
                    yield stream
                if durable:
                    flush_to_disk(temporary)
                os.replace(temporary, full)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            if durable:
                flush_to_disk(folder)

    def _select(self, path: str, *, recursive: bool) -> Sequence[fs.FileInfo]:
        selector = fs.FileSelector(self.full_path(path), recursive=recursive, allow_not_found=True)
        with self._io("listing", path):
            return self.filesystem.get_file_info(selector)

    def _stored(self, info: fs.FileInfo) -> StoredFile:
        path = info.path[len(self.location.root.rstrip("/")) + 1 :]
        return StoredFile(path=path, size=info.size, mtime=info.mtime_ns / 1e9)

    @contextlib.contextmanager
    def _io(self, doing: str, path: str) -> Iterator[None]:
        """Turns what the file system says into an error that names the place and no credential."""
        try:
            yield
        except FileNotFoundError:
            raise StoreError(
                f"{self.uri_for(path)}: failed while {doing}: there is no such file."
            ) from None
        except (OSError, pa.ArrowException) as error:
            place = self.uri_for(path) if path else self.location.shown
            raise StoreError(
                f"{place}: failed while {doing}: {self.location.redact(str(error))}."
            ) from None


def _reopen(uri: str) -> Store:
    return Store.open(uri, writable=False)


def _checked(path: str) -> str:
    """A relative path with no way out of the root; anything else is a mistake of the caller."""
    if path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"store path {path!r}: expected a relative path without '.', '..' or '//'")
    return path
