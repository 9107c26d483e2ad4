"""What a stage's computation is given: the inputs it may read and the folder it may fill.

A computation writes where it likes below its folder: through pyarrow and Ray (`full_path`), as
JSON, or as local files (`folder`). `checkpoints/` survives a crash and `scratch/` does not; neither
becomes part of the artifact.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pipelines.artifact import RECORD, Artifact
from pipelines.fingerprint import plain
from pipelines.lease import FOLDER as LEASE_FOLDER
from pipelines.lease import Lease
from pipelines.store import Store
from pipelines.transfer import OutputFile
from seekr.errors import StoreError

CHECKPOINTS: Final = "checkpoints"
SCRATCH: Final = "scratch"
FAILURE: Final = "failure.json"
ATTEMPTS: Final = f"{LEASE_FOLDER}/attempts.json"
NOT_OUTPUT: Final = frozenset({LEASE_FOLDER, CHECKPOINTS, SCRATCH, FAILURE, RECORD})
KEPT_BETWEEN_ATTEMPTS: Final = frozenset({LEASE_FOLDER, CHECKPOINTS, FAILURE})


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutcome:
    """What a computation reports about its work; the files it wrote are found by themselves.

    Attributes:
        rows: number of rows written, where that means something.
        stats: free numbers for reports, as plain JSON values.
        seeds: every seed that was used, by name.
        outputs: files whose digests were taken while writing (`Workspace.upload` keeps its own).
    """

    rows: int | None = None
    stats: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    outputs: tuple[OutputFile, ...] = ()

    def plain_stats(self) -> dict[str, Any]:
        """Stats as plain JSON. NaN and infinity become text: a diverged loss must not cost the
        commit."""
        return {str(key): _finite(item) for key, item in self.stats.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """The folder of one stage while it is computed.

    Attributes:
        store: where it lies.
        key: the folder, relative to the store's root.
        config: the stage's identity fields, as plain JSON values.
        inputs: finished artifacts to read, by the name the stage gives them.
        attempt: 1 for the first time, more after crashes and failures.
        resumed: whether an earlier attempt did not finish; `checkpoints/` may hold something.
        lease: held for as long as the computation runs.
    """

    store: Store
    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    attempt: int
    resumed: bool
    lease: Lease = field(repr=False)
    _digested: dict[str, OutputFile] = field(default_factory=dict, repr=False)

    def path(self, name: str) -> str:
        """Path of one of the stage's files, relative to the store's root."""
        return f"{self.key}/{name}"

    def full_path(self, name: str) -> str:
        """Path of one of the stage's files on `store.filesystem`, for pyarrow and Ray writers."""
        return self.store.full_path(self.path(name))

    def write_json(self, name: str, value: Any) -> None:
        """Writes one JSON output."""
        self.store.write_json(self.path(name), value)

    def upload(self, source: str | Path, name: str = "") -> list[OutputFile]:
        """Copies a local file or folder to `name`; its digests are taken on the way and not again.

        Args:
            source: a file or a folder.
            name: where to. Default: a file's own name; for a folder, the stage's folder itself.
        """
        written = self.store.upload(source, self.key, name)
        self._digested.update({output.path: output for output in written})
        return written

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A local folder that becomes the output folder `name` when the block ends without an
        error.

        On a local store it is the output folder itself, so a large model is written once.
        """
        if self.store.is_local:
            place = Path(self.full_path(name))
            place.mkdir(parents=True, exist_ok=True)
            yield place
            return
        place = Path(tempfile.mkdtemp(prefix="seekr-"))
        try:
            yield place
            self.upload(place, name)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def outputs(self, known: tuple[OutputFile, ...] = ()) -> tuple[OutputFile, ...]:
        """Every file of the stage's folder that belongs to the artifact, with digests, by path.

        Args:
            known: files whose digests were taken while they were written; the others are read now.

        Raises:
            StoreError: a file in `known` is not there or has another size.
        """
        digested = self._digested | {output.path: output for output in known}
        found: list[OutputFile] = []
        for file in self.store.list(self.key):
            name = file.path[len(self.key) + 1 :]
            if name.partition("/")[0] in NOT_OUTPUT:
                continue
            output = digested.pop(name, None)
            if output is None:
                digest = self.store.digest(file.path, flush=True)
                output = OutputFile(path=name, size=file.size, sha256=digest)
            if output.size != file.size:
                raise StoreError(
                    f"{self.store.uri_for(file.path)}: written with {output.size} bytes, the store "
                    f"has {file.size}. Something else writes to this folder; run again without it."
                )
            found.append(output)
        if digested:
            raise StoreError(
                f"{self.store.uri_for(self.path(min(digested)))}: was written and is gone. "
                "Something else removes files from this folder; run again without it."
            )
        return tuple(found)


def _finite(value: Any) -> Any:
    """Stats as plain JSON. NaN and infinity become text: a diverged loss must not cost the
    commit."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else plain(value)
