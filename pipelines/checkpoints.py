"""A training's checkpoints in the stage's folder: written beside the training, found again after a kill.

Ray Train says which one is the newest that all workers have reported. Folders are named by the step and
a tag of the group of workers that wrote them, so files of two attempts never meet in one, whatever a
worker that was given up for dead still writes. One checkpoint at a time is on its way.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode

from pipelines.store import Store
from pipelines.workspace import CHECKPOINTS
from seekr.errors import StoreError
from seekr.training.checkpoint import missing_files, take_snapshot, writer_of
from seekr.training.loop import Workers
from seekr.training.ranges import Block

# Ray Train's name of a run, which is a folder: it stays the same, or nothing would be found again.
RUN = "run"
_SNAPSHOT = "checkpoint_manager_snapshot.json"
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
    """

    def __init__(
        self,
        store: Store,
        key: str,
        workers: Workers,
        blocks: Sequence[Block],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._store, self._place = store, f"{key}/{CHECKPOINTS}/{RUN}"
        self._workers, self._blocks, self._optimizer = workers, blocks, optimizer
        self._writer = writer_of(blocks)
        self._tag = uuid4().hex[:8]
        self.kept = self.handed = 0
        self._idle = threading.Event()
        self._idle.set()

    @contextmanager
    def newest(self) -> Iterator[Found | None]:
        """Provide the newest checkpoint, None if there is none; forgets what is unfinished."""
        checkpoint = ray.train.get_checkpoint() or self._complete()
        if checkpoint is None:
            self._forget_after(0)
            yield None
            return
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
        """Write a checkpoint; without `wait` while the training goes on, from a copy in memory."""
        self._idle.wait()
        snapshot = take_snapshot(self._blocks, self._optimizer)
        progress = json.dumps({"steps_done": steps_done, "history": history})
        first = self._workers.rank == 0
        writes = first or self._writer.number is not None
        folder = Path(tempfile.mkdtemp(prefix="seekr-checkpoint-")) if writes else Path()

        def upload(checkpoint: Checkpoint, name: str) -> Checkpoint:
            try:
                snapshot.save(folder, self._writer)
                if first:
                    (folder / _PROGRESS).write_text(progress)
                self._store.upload(folder, self._place, name)
                self.kept = steps_done
            finally:
                self._idle.set()
            return Checkpoint(
                self._store.full_path(f"{self._place}/{name}"), self._store.filesystem
            )

        if writes:
            self._idle.clear()
        ray.train.report(
            {"steps_done": steps_done},
            checkpoint=Checkpoint.from_directory(folder) if writes else None,
            # The first worker's name counts for all.
            checkpoint_dir_name=f"step-{steps_done:08d}-{self._tag}",
            checkpoint_upload_mode=CheckpointUploadMode.SYNC
            if wait
            else CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=True,
        )
        self.handed = steps_done

    def _complete(self) -> Checkpoint | None:
        """Return the newest one all of whose files are there, as the first worker sees it.

        Ray Train knows none where it was killed before it noted the first, or while it wrote its
        notes (`drop_damaged_notes`).
        """
        names = [""]
        if self._workers.rank == 0:
            names = [name for name, files in self._folders().items() if not _missing(files)][-1:]
            names = names or [""]
        if self._workers.world_size > 1:
            dist.broadcast_object_list(names, src=0)
        if not names[0]:
            return None
        path = self._store.full_path(f"{self._place}/{names[0]}")
        return Checkpoint(path, self._store.filesystem)

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


def drop_damaged_notes(store: Store, key: str) -> None:
    """Remove Ray Train's notes about checkpoints if a kill has left half of them.

    Ray Train overwrites its notes in place and refuses to start with half a file; the checkpoints
    themselves are found without them.
    """
    path = f"{key}/{CHECKPOINTS}/{RUN}/{_SNAPSHOT}"
    if store.stat(path) is None:
        return
    try:
        json.loads(store.read_bytes(path))
    except ValueError:
        store.remove(path)


def _missing(files: Sequence[str]) -> list[str]:
    return missing_files(files) + ([] if _PROGRESS in files else [_PROGRESS])
