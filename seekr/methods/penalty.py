"""Losses on the weights themselves, beside those on rows: what EWC, O-LoRA and RecAdam add.

A penalty's gradient is known in closed form and needs no forward pass, so it is added to what the
passes have left, range by range of every tensor that this worker holds, before clipping. No worker needs
a whole tensor, and nothing is computed twice. A pull goes past the optimizer: it moves the weights itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# (name, start, length) to that many numbers of the flattened tensor, from files.
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


class Pull(Protocol):
    """A sum over tensors of functions of the weights, decoupled from the optimizer's update.

    Steps count from 0. What a step does depends on its number, its rate and the weights alone, so a
    training that is taken up again goes on as it would have.
    """

    def share(self, step: int) -> float:
        """Return the share of the learning rate, and of the rows' losses, that the optimizer gets."""
        ...

    def weight(self, step: int) -> float:
        """Return the weight of the value in the loss."""
        ...

    def move(self, shard: Shard, step: int, rate: float) -> Tensor:
        """Move a shard's values in place by -rate * weight * gradient, before the optimizer's update.

        Returns:
            The value there before, without weight.
        """
        ...
