"""A training's checkpoints in the stage's folder: written beside the training, found again after a kill.

A checkpoint counts when all its files are there, so the newest one is found by looking, whoever wrote
it. Folders are named by the step and a tag of the group of workers that wrote them, so files of two
attempts never meet in one, whatever a worker that was given up for dead still writes. One checkpoint at
a time is on its way. Ray Train's own notes of checkpoints are not used: they belong to one group of
workers and are overwritten in place, while these outlive their group.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from ray.train import Checkpoint

from pipelines.store import Store
from pipelines.workspace import CHECKPOINTS
from seekr.errors import StoreError
from seekr.training.checkpoint import Snapshot, missing_files, take_snapshot, writer_of
from seekr.training.loop import Workers
from seekr.training.ranges import Block

_PROGRESS = "progress.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint in a local folder. `history` has an entry per step done."""

    folder: Path
    steps_done: int
    history: list[dict[str, Any]]


class Checkpoints:
    """What one worker reads and writes of them; all workers call the same at the same time.

    Attributes:
        kept: steps done in the newest checkpoint that was read, or written by this worker; 0 if none.
        handed: the same, with one that is on its way.

    Args:
        key: the stage's folder.
        blocks, optimizer: whose state is kept.
        keep: how many of the newest stay.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        workers: Workers,
        blocks: Sequence[Block],
        optimizer: torch.optim.Optimizer,
        keep: int,
    ) -> None:
        self._store, self._place, self._keep = store, f"{key}/{CHECKPOINTS}", keep
        self._workers, self._blocks, self._optimizer = workers, blocks, optimizer
        self._writer = writer_of(blocks)
        self._tag = self._of_first(uuid4().hex[:8])
        self.kept = self.handed = 0
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None

    @contextmanager
    def newest(self) -> Iterator[Found | None]:
        """Provide the newest checkpoint, None if there is none; forgets what is unfinished."""
        name = self._of_first((self._complete() or [""])[-1])
        if not name:
            self._forget_after(0)
            yield None
            return
        checkpoint = Checkpoint(
            self._store.full_path(f"{self._place}/{name}"), self._store.filesystem
        )
        with checkpoint.as_directory() as path:
            folder = Path(path)
            try:
                progress = json.loads((folder / _PROGRESS).read_text())
            except (OSError, ValueError) as error:
                raise StoreError(
                    f"checkpoint {folder.name}: {_PROGRESS} cannot be read: {error}; remove the "
                    "stage's checkpoints folder and run again"
                ) from error
            self.kept = self.handed = progress["steps_done"]
            self._forget_after(self.kept)
            yield Found(folder=folder, **progress)

    def save(self, steps_done: int, history: Sequence[Mapping[str, Any]], *, wait: bool) -> None:
        """Write a checkpoint; without `wait` while the training goes on, from a copy in memory.

        Raises:
            What the upload of this one (`wait`) or the one before it raised.
        """
        self.settle()
        snapshot = take_snapshot(self._blocks, self._optimizer)
        first = self._workers.rank == 0
        if first or self._writer.number is not None:
            progress = json.dumps({"steps_done": steps_done, "history": history}) if first else None
            self._upload = self._uploader.submit(self._write, snapshot, steps_done, progress)
        self.handed = steps_done
        if wait:
            self.settle()
            if self._workers.world_size > 1:
                dist.barrier()

    def settle(self) -> None:
        """Wait for the checkpoint that this worker is writing, if there is one.

        Raises:
            What its upload raised.
        """
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def _write(self, snapshot: Snapshot, steps_done: int, progress: str | None) -> None:
        folder = Path(tempfile.mkdtemp(prefix="seekr-checkpoint-"))
        try:
            snapshot.save(folder, self._writer)
            if progress is not None:
                (folder / _PROGRESS).write_text(progress)
            name = f"step-{steps_done:08d}-{self._tag}"
            self._store.upload(folder, self._place, name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.kept = steps_done
        if self._workers.rank == 0:
            for name in self._complete()[: -self._keep]:
                self._store.remove(f"{self._place}/{name}")

    def _of_first(self, name: str) -> str:
        """Return what the first worker has, on all."""
        names = [name]
        if self._workers.world_size > 1:
            dist.broadcast_object_list(names, src=0)
        return names[0]

    def _complete(self) -> list[str]:
        """Return the folders all of whose files are there, by step."""
        return [name for name, files in self._folders().items() if not _missing(files)]

    def _forget_after(self, steps_done: int) -> None:
        """Remove what former groups of workers have begun and not finished."""
        if self._workers.rank != 0:
            return
        for name in self._folders():
            if int(name.split("-")[1]) > steps_done:
                self._store.remove(f"{self._place}/{name}")

    def _folders(self) -> dict[str, list[str]]:
        """Return the files of every checkpoint's folder, by name and so by step."""
        found: dict[str, list[str]] = {}
        for file in self._store.list(self._place):
            name, _, leaf = file.path[len(self._place) + 1 :].partition("/")
            if name.startswith("step-"):
                found.setdefault(name, []).append(leaf)
        return dict(sorted(found.items()))


def _missing(files: Sequence[str]) -> list[str]:
    return missing_files(files) + ([] if _PROGRESS in files else [_PROGRESS])
