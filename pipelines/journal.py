"""An append-only list of JSON entries in a store: each is written once, and none is changed or removed.

Entry n is a file `00000n-<id>.json`. Only the holder of a lease appends, and it asks the lease just
before it writes, so two runs do not both add an entry n. A run that slept longer than its lease lives
between asking and writing might still; the store's time stamps then tell which came first. That one
counts, for every reader alike, the other's writer is told that it lost, and nothing is overwritten.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

from pipelines.lease import Lease
from pipelines.store import Store, StoredFile
from seekr.errors import LeaseLost

_READERS = 16
_NAME = re.compile(r"(\d{6})-[0-9a-f]{32}\.json")


class Journal:
    """The entries in a folder of a store.

    Args:
        store: where it lies.
        folder: relative to the store's root; may hold other files.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder = store, folder

    def read(self) -> list[dict[str, Any]]:
        """Return all entries, oldest first; empty where there are none."""
        files = self._files()
        if not files:
            return []
        with ThreadPoolExecutor(
            min(_READERS, len(files))
        ) as pool:  # a request each on a remote store
            return list(pool.map(lambda file: self.store.read_json(file.path), files))

    def __len__(self) -> int:
        return len(self._files())

    def append(self, entry: Mapping[str, Any], *, after: int, lease: Lease) -> None:
        """Add an entry behind the first `after` ones, which are all that the caller has seen.

        Args:
            lease: held by the caller, on whatever it is that may happen only once.

        Raises:
            LeaseLost: another run has appended meanwhile, or holds the lease by now.
        """
        path = f"{self.folder}/{after + 1:06d}-{uuid4().hex}.json"
        if len(self) != after:
            raise self._overtaken(after)
        lease.check()
        self.store.write_json(path, dict(entry))
        if [file.path for file in self._files()][after:] != [path]:
            raise self._overtaken(after)

    def _files(self) -> list[StoredFile]:
        """Return the files that count: of each number the oldest, up to the first gap."""
        found: dict[int, StoredFile] = {}
        for file in self.store.list(self.folder):
            folder, _, name = file.path.rpartition("/")
            match = _NAME.fullmatch(name)
            if match is None or folder != self.folder:
                continue
            number = int(match.group(1))
            first = found.setdefault(number, file)
            if (file.mtime, file.path) < (first.mtime, first.path):
                found[number] = file
        count = next(n for n in range(len(found) + 1) if n + 1 not in found)
        return [found[number] for number in range(1, count + 1)]

    def _overtaken(self, after: int) -> LeaseLost:
        return LeaseLost(
            f"{self.store.uri_for(self.folder)}: another run has added entry {after + 1} meanwhile; "
            "its entry counts and this one does not. Run again."
        )
