"""Checkpoints of a training in progress: every worker's ranges as safetensors, no pickle anywhere.

A worker writes the ranges it holds of master weights and optimizer state, and a JSON index of where
they belong. On the way in each worker reads what overlaps its own ranges, from whichever files hold
it, so number of workers, strategy and ZeRO stage may change in between. torch.distributed.checkpoint
and DeepSpeed's own format are not used: their metadata or all of their content is pickle, and
DeepSpeed's is bound to the number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seekr.errors import StoreError
from seekr.training.ranges import Block, check_equal, copy_in, flat

MASTER = "master"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stored range: the file and key that hold it, where it starts, and how long it is."""

    file: str
    key: str
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A worker's ranges in host memory, apart from the training that goes on."""

    tensors: dict[str, Tensor]
    index: dict[str, dict[str, int]]

    def save(self, folder: Path, rank: int) -> bool:
        """Write them; returns whether there were any."""
        if not self.tensors:
            return False
        save_file(self.tensors, folder / f"shard-{rank:05d}.safetensors")
        (folder / f"shard-{rank:05d}.json").write_text(json.dumps(self.index))
        return True


def take_snapshot(blocks: Sequence[Block], optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copy master weights and optimizer state of this worker's blocks into host memory."""
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, int]] = {}
    for block in blocks:
        if not block.writer or block.length == 0:
            continue
        for kind, values, start in _kinds(block, optimizer):
            key = f"{kind}/{block.name}"
            tensors[key] = values.to("cpu", copy=True).contiguous()
            index[key] = {"start": start, "length": values.numel()}
    return Snapshot(tensors=tensors, index=index)


def load_checkpoint(
    folder: Path, blocks: Sequence[Block], optimizer: torch.optim.Optimizer
) -> None:
    """Fill master weights and optimizer state in place, exactly as they were saved.

    The optimizer's state must exist already, if only as zeros.

    Raises:
        StoreError: the checkpoint lacks a tensor or a part of one, or what was filled is not what
            the files hold.
    """
    shards = Shards(folder)
    with torch.no_grad():
        for block in blocks:
            if block.length == 0:
                continue
            for kind, values, start in _kinds(block, optimizer):
                copy_in(shards, f"{kind}/{block.name}", start, values)


def check_masters(folder: Path, blocks: Sequence[Block]) -> None:
    """Check the optimizer's masters against the checkpoint, bit for bit. See `check_equal`."""
    shards = Shards(folder)
    for block in blocks:
        name = f"{MASTER}/{block.name}"
        check_equal(shards, name, block.start, block.part(block.master), "master weights")


def _kinds(block: Block, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor, int]]:
    """Return (kind, values [n], start in the whole) of a block's master and each of its states."""
    found = [(MASTER, block.part(block.master), block.start)]
    for kind, state in sorted(optimizer.state.get(block.master, {}).items()):
        if not isinstance(state, Tensor):
            continue
        if state.numel() == block.master.numel():
            found.append((kind, block.part(state), block.start))
        else:
            found.append((kind, flat(state), 0))  # a step count
    return found


class Shards:
    """The files of a checkpoint as a source of ranges.

    Raises:
        StoreError: an index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pieces: dict[str, list[Piece]] = {}
        for path in sorted(folder.glob("shard-*.json")):
            try:
                entries = json.loads(path.read_text())
            except ValueError as error:
                raise self._damaged(f"{path.name} is not JSON") from error
            for key, entry in entries.items():
                piece = Piece(file=path.with_suffix(".safetensors").name, key=key, **entry)
                self._pieces.setdefault(key, []).append(piece)

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return numbers of a tensor, joined from all pieces that overlap the range."""
        found: Tensor | None = None
        covered = 0
        for piece in self._pieces.get(name, []):
            first = max(start, piece.start)
            last = min(start + length, piece.start + piece.length)
            if last <= first:
                continue
            try:
                with safe_open(self._folder / piece.file, framework="pt") as file:
                    values = file.get_slice(piece.key)[first - piece.start : last - piece.start]
            except Exception as error:
                raise self._damaged(f"{piece.file} cannot be read: {error}") from error
            if last - first == length:
                return values
            found = values.new_empty(length) if found is None else found
            found[first - start : last - start] = values
            covered += last - first
        if found is None or covered < length:
            raise self._damaged(f"it has {covered} of the {length} numbers of {name} from {start}")
        return found

    def _damaged(self, what: str) -> StoreError:
        return StoreError(
            f"checkpoint {self._folder.name}: {what}; it is damaged or belongs to another model: "
            "remove the stage's checkpoints folder and run again"
        )
