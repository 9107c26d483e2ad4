"""Streams with an inbox, on a disk or on S3, and what is put into it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from pipelines.arrivals import Arrival, Register
from pipelines.config import StreamConfig
from pipelines.lease import Lease
from pipelines.load import load_config
from pipelines.receive import Taken, take_in
from pipelines.store import Store
from pipelines.stream import open_storage
from tests.pipelines.s3_server import BUCKET, s3_server
from tests.pipelines.streams import make_stream, task_rows, write_yaml

# Seconds since 1970 at which the first file of a test was changed; later ones follow.
EPOCH = 1_790_000_000


@dataclass(slots=True)
class Inbox:
    """A place that files are put into, with times that the test decides on a disk.

    Args:
        folder: its path on the file system.
        filesystem: the disk, or a server.
        uri: what the YAML calls it.
    """

    folder: str
    filesystem: fs.FileSystem
    uri: str
    _count: int = field(default=0)

    def put(self, name: str, content: bytes | str, at: int | None = None) -> None:
        """Write a file as a whole, as if it was changed `at`, later than all before it by default."""
        path = f"{self.folder}/{name}"
        data = content.encode() if isinstance(content, str) else content
        if isinstance(self.filesystem, fs.LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)
        self._count += 1
        if isinstance(self.filesystem, fs.LocalFileSystem):
            seconds = EPOCH + (self._count if at is None else at)
            os.utime(path, (seconds, seconds))

    def put_rows(self, name: str, rows: Sequence[dict[str, Any]], at: int | None = None) -> None:
        """Write JSON Lines."""
        self.put(name, "".join(json.dumps(row) + "\n" for row in rows), at)

    def put_task(self, name: str, rule: str, *, at: int | None = None, whole: bool = True) -> None:
        """Write a folder with 40 training and 10 test rows of a rule."""
        rows = task_rows(rule, 50)
        self.put_rows(f"{name}/train.jsonl", rows[:40], at)
        self.put_rows(f"{name}/test.jsonl", rows[40:], at)
        if whole:
            self.put(f"{name}/_SUCCESS", "", at)

    def remove(self, name: str) -> None:
        """Remove a file or folder."""
        path = f"{self.folder}/{name}"
        if self.filesystem.get_file_info(path).type == fs.FileType.Directory:
            self.filesystem.delete_dir(path)
        else:
            self.filesystem.delete_file(path)


@dataclass(slots=True)
class Arriving:
    """A stream with an inbox, and looks into it as a tick makes them, without running anything."""

    path: Path
    inbox: Inbox
    changes: tuple[str, ...] = ()

    @property
    def config(self) -> StreamConfig:
        """The YAML's, with its storage beside it wherever a copy of the folder lies."""
        return load_config(self.path, self.changes)

    @property
    def store(self) -> Store:
        return open_storage(self.config, writable=True)

    @property
    def register(self) -> Register:
        return Register(self.store, self.config.name)

    def look(self) -> Taken:
        """Take in what is whole."""
        store, config = self.store, self.config
        with Lease(store, f"streams/{config.name}/tick", settle=0.0) as lease:
            return take_in(config, Register(store, config.name), lease)

    def verdicts(self) -> list[tuple[str, str]]:
        return [(entry.name, entry.verdict) for entry in self.register.entries]

    def only(self) -> Arrival:
        (entry,) = self.register.entries
        return entry


def arriving(folder: Path, *, tasks: int = 1, **overrides: Any) -> Arriving:
    """Write a stream whose inbox and store are folders beside it."""
    settings = {"inbox": {"settle_seconds": 0}, "tasks_from": "inbox/*"} | overrides
    path = make_stream(folder, tasks=tasks, **settings)
    (folder / "inbox").mkdir(exist_ok=True)
    inbox = Inbox(str(folder / "inbox"), fs.LocalFileSystem(), str(folder / "inbox"))
    return Arriving(path, inbox)


@contextmanager
def arriving_in(place: str, folder: Path) -> Iterator[Arriving]:
    """Provide a stream with one task in its YAML and an empty inbox.

    Args:
        place: `disk`, or `s3` for an inbox and a store on a server.
    """
    found = arriving(folder)
    if place == "disk":
        yield found
        return
    with s3_server() as server:
        inbox = server.uri("inbox/*")
        settings = {"tasks_from": inbox, "storage": server.uri("store")}
        write_yaml(found.path, yaml.safe_load(found.path.read_text()) | settings)
        yield Arriving(found.path, Inbox(f"{BUCKET}/inbox", server.filesystem(), inbox))
