"""Tensors as runs of numbers, of which every worker holds a range.

DDP holds whole tensors, FSDP2 a block of rows, ZeRO-1 and 2 a range that ignores where tensors begin,
ZeRO-3 an even cut of each. All of them are a range of the flattened tensor. So one way of reading
weights from a model's files, one format of checkpoints and one check of master weights serve all, and
a training may go on under another strategy or with another number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from seekr.errors import StoreError

# Numbers that are compared or converted at a time.
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """A worker's range of one trained tensor, and where it lies in what the optimizer updates.

    Attributes:
        name: The plain model's name of the tensor. shape: of the whole.
        start: Place of the first number held in the flattened whole. length: how many follow.
        master: The optimizer's parameter, which may hold other tensors too.
        offset: Of the block in the flattened local part of `master`.
        writer: Whether this worker writes it; one of several that hold the same numbers does.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    master: Tensor
    offset: int = 0
    writer: bool = True

    def part(self, tensor: Tensor) -> Tensor:
        """Return the block's view [length] of the master, or of a state laid out like it."""
        return flat(tensor)[self.offset : self.offset + self.length]


class Source(Protocol):
    """Where tensors are read from, range by range."""

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return `length` numbers of the flattened tensor [length], in the type they are kept in.

        Raises:
            StoreError: there is no such tensor, or not all of the range.
        """
        ...


def local(tensor: Tensor) -> Tensor:
    """Return this worker's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat(tensor: Tensor) -> Tensor:
    """Return this worker's part as a view [numbers], without autograd."""
    return local(tensor.detach()).view(-1)


def range_of(tensor: Tensor) -> tuple[int, int]:
    """Return (start, length) of this worker's part in the flattened whole.

    Raises:
        ValueError: the part is not one range: it is sharded along another axis than the first.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor.numel()
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if tuple(shape[1:]) != tuple(tensor.shape[1:]):
        raise ValueError(f"a shard {tuple(shape)} of {tuple(tensor.shape)} is no range of numbers")
    row = tensor[0].numel() if tensor.dim() > 1 else 1
    length = local(tensor.detach()).numel()
    return (int(offset[0]) * row if tensor.dim() and length else 0), length


def pieces(start: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a range into (start, length) of bounded size, so that no copy of it is large."""
    for done in range(0, length, _CHUNK):
        yield start + done, min(_CHUNK, length - done)


def copy_in(source: Source, name: str, start: int, target: Tensor) -> None:
    """Fill a flat tensor [numbers] with the range of `name` that begins at `start`."""
    for first, length in pieces(start, target.numel()):
        place = first - start
        target[place : place + length].copy_(source.read(name, first, length))


def check_equal(source: Source, name: str, start: int, found: Tensor, what: str) -> None:
    """Check that a flat tensor [numbers] holds exactly the range of `name` that begins at `start`.

    Raises:
        StoreError: it does not. Training on would silently use other weights than were loaded.
    """
    for first, length in pieces(start, found.numel()):
        part = found[first - start : first - start + length]
        expected = source.read(name, first, length).to(part.device, part.dtype)
        if not torch.equal(part, expected):
            number = int((part != expected).nonzero()[0, 0]) + first
            raise StoreError(
                f"{what} of {name} differ from the loaded weights, first at number {number}; they "
                "must be equal bit for bit. This is a fault of this program or of a library: do "
                "not train on, report it with the versions of torch and deepspeed"
            )


@dataclass(frozen=True, slots=True, eq=False)
class MemorySource:
    """Tensors that lie whole in memory."""

    tensors: Mapping[str, Tensor]

    def read(self, name: str, start: int, length: int) -> Tensor:
        if name not in self.tensors:
            raise StoreError(f"tensor {name} is not among the {len(self.tensors)} loaded")
        return self.tensors[name].detach().reshape(-1)[start : start + length]
