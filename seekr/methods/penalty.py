"""Losses on the weights themselves, beside those on rows: what EWC and O-LoRA add.

A penalty's gradient is known in closed form and needs no forward pass, so it is added to what the
passes have left, range by range of every tensor that this worker holds, before clipping. No worker needs
a whole tensor, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# (name, start, length) to that many numbers of the flattened tensor, from an earlier stage's files.
Reader = Callable[[str, int, int], Tensor]
# What earlier tasks have left, by the task or kind it is about.
Past = Mapping[str, Reader]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shard:
    """A worker's range of one trained tensor.

    Attributes:
        name: The plain model's name of the tensor. shape: of the whole.
        start: Place of the first number in the flattened whole.
        values: [numbers], the master weights. gradient: [numbers], added to in place.
        counts: Whether the value is this worker's to report; one of those that hold it does.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    gradient: Tensor
    counts: bool


class Penalty(Protocol):
    """A sum over tensors of functions of the weights."""

    @property
    def weight(self) -> float:
        """Of the penalty in the loss."""
        ...

    def add(self, shard: Shard) -> Tensor:
        """Add `weight` times the gradient on a shard; returns the value there, without weight."""
        ...
