"""Checkpoints of a training in progress: every worker's ranges as safetensors, no pickle anywhere.

A worker writes the ranges it holds of master weights and optimizer state, and a JSON index of where
they belong. Every file's name says how many there are, so a missing one is missed. On the way in each
worker reads what overlaps its own ranges, from whichever files hold it, so number of workers, strategy
and ZeRO stage may change in between. torch.distributed.checkpoint and DeepSpeed's own format are not
used: their metadata or all of their content is pickle, and DeepSpeed's is bound to the number of
workers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seekr.errors import StoreError
from seekr.training.ranges import Block, check_equal, copy_in, flat

MASTER = "master"
_NUMBERED = re.compile(r"shard-(\d{5})-of-(\d{5})\.(?:json|safetensors)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Which of the checkpoint's writers a worker is; `number` is None if it has nothing to write."""

    number: int | None
    count: int

    def name(self) -> str:
        """Return the name of its files, but for the suffix."""
        return f"shard-{self.number:05d}-of-{self.count:05d}"


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

    def save(self, folder: Path, writer: Writer) -> None:
        """Write them, if there are any."""
        if writer.number is None:
            return
        save_file(self.tensors, folder / f"{writer.name()}.safetensors")
        (folder / f"{writer.name()}.json").write_text(json.dumps(self.index))


def writer_of(blocks: Sequence[Block]) -> Writer:
    """Return this worker's place among the writers. Called on all workers."""
    writes = any(block.writer and block.length for block in blocks)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Writer(number=0 if writes else None, count=int(writes))
    all_write: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_write, writes)
    number = sum(all_write[: dist.get_rank()]) if writes else None
    return Writer(number=number, count=sum(all_write))


def missing_files(names: Iterable[str]) -> list[str]:
    """Return which of a checkpoint's files are not among the names of those that are there."""
    found = set(names)
    counts = {int(match[2]) for name in found if (match := _NUMBERED.fullmatch(name))}
    expected = {
        f"{Writer(number=number, count=count).name()}{suffix}"
        for count in counts or {1}
        for number in range(count)
        for suffix in (".json", ".safetensors")
    }
    return sorted(expected - found)


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
        StoreError: a file is missing, or an index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pieces: dict[str, list[Piece]] = {}
        missing = missing_files(path.name for path in folder.iterdir())
        if missing:
            raise self._damaged(
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
            )
        for path in sorted(folder.glob("shard-*.json")):
            for key, piece in self._read_index(path):
                self._pieces.setdefault(key, []).append(piece)

    def _read_index(self, path: Path) -> list[tuple[str, Piece]]:
        file = path.with_suffix(".safetensors").name
        try:
            entries = json.loads(path.read_text())
            return [(key, Piece(file=file, key=key, **entry)) for key, entry in entries.items()]
        except (ValueError, TypeError, AttributeError) as error:
            raise self._damaged(f"{path.name} cannot be read: {error}") from error

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
