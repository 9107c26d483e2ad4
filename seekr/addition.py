"""What a method trains beside a frozen model: parameters of its own on the model's modules.

An addition is described by a value (which kind, how large, the tasks it has learnt); `attach` gives a
model the parameters and the hooks that use them. They are ordinary parameters of the model's modules, so
whatever shards, gathers or saves a model's parameters has them too; their names begin with `seekr_`.
What an addition does may depend on the rows of a batch: `seeing` tells it which tokens are prompts.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from seekr.collation import IGNORE_LABEL, Batch
from seekr.prompts import TokenizedRow

PREFIX = "seekr_"
# Numbers of one of the model's own tensors: name, first number, how many.
ReadNumbers = Callable[[str, int, int], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition(ABC):
    """Root of the kinds.

    Attributes:
        tasks: Those that have a part of their own, in the order they were learnt.
    """

    kind_name: ClassVar[str]

    tasks: tuple[str, ...] = ()

    def with_task(self, task: str) -> Self:
        """Return what there is once a task is learnt."""
        return replace(self, tasks=(*self.tasks, task))

    @abstractmethod
    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Return the parameters' shapes by their names in the model."""

    @abstractmethod
    def trained(self, name: str) -> bool:
        """Return whether the newest task trains this one of the parameters."""

    @abstractmethod
    def start(
        self, name: str, shape: Sequence[int], draw: str, read: ReadNumbers, tokens: int
    ) -> Tensor:
        """Return the values that a parameter starts from, a function of the arguments alone.

        Args:
            draw: Of the training, part of what is drawn from.
            read: The model's own tensors.
            tokens: Rows of the model's embedding.
        """

    @abstractmethod
    def connect(self, model: Any) -> Seen:
        """Add the hooks that use the parameters; returns what they share."""

    def before(self, rows: Sequence[TokenizedRow], vocab_size: int) -> list[TokenizedRow]:
        """Return rows as the model gets them."""
        return list(rows)

    @property
    def read_layers(self) -> tuple[str, ...]:
        """Linear layers whose inputs a backward pass needs."""
        return ()

    @property
    def read_rank(self) -> int:
        """Numbers per token that it keeps in each of them."""
        return 0

    @property
    def virtual_tokens(self) -> int:
        """How many tokens longer `before` makes a row."""
        return 0


class Seen:
    """What the hooks of an addition know of the batch on its way through the model.

    Attributes:
        spec: The addition.
        mask_BT: Tokens of rows' own prompts, while `seeing` is on.
        weights_BS: Of the last batch: a row's weights over the tasks' blocks, where there are such.
        pull_B: Of the last batch: how far chosen prompts' keys are from their rows, likewise.
    """

    def __init__(self, spec: Addition) -> None:
        self.spec = spec
        self.mask_BT: Tensor | None = None
        self.weights_BS: Tensor | None = None
        self.pull_B: Tensor | None = None

    def see(self, batch: Batch) -> None:
        """Take in which tokens are prompts."""
        self.mask_BT = (batch.attention_mask_BT > 0) & (batch.labels_BT == IGNORE_LABEL)

    def forget(self) -> None:
        """Let go of the batch."""
        self.mask_BT = self.weights_BS = self.pull_B = None


def attach(model: Any, spec: Addition) -> Seen:
    """Give a model the parameters, without values, frozen but for the newest task's; and the hooks."""
    for name, shape in spec.shapes(model).items():
        owner, _, leaf = name.rpartition(".")
        module: nn.Module = model.get_submodule(owner)
        weight: Any = module.weight
        values = torch.empty(shape, dtype=torch.float32, device=weight.device)
        module.register_parameter(leaf, nn.Parameter(values, requires_grad=spec.trained(name)))
    seen = spec.connect(model)
    model.get_input_embeddings()._seekr_addition = seen
    return seen


def addition_of(model: nn.Module) -> Seen | None:
    """Return what a model's addition knows, None for a model without one."""
    for module in model.modules():
        found = module.__dict__.get("_seekr_addition")
        if found is not None:
            return found
    return None


@contextmanager
def seeing(model: nn.Module, batch: Batch) -> Iterator[Seen | None]:
    """Tell a model's addition, if it has one, of the batch that goes through the model."""
    seen = addition_of(model)
    if seen is None:
        yield None
        return
    seen.see(batch)
    try:
        yield seen
    finally:
        seen.forget()


def is_added(name: str) -> bool:
    """Return whether a parameter belongs to an addition."""
    return name.rpartition(".")[2].startswith(PREFIX)


def drawing(draw: str, name: str) -> torch.Generator:
    """Return the generator that a parameter's start is drawn from."""
    return torch.Generator().manual_seed(zlib.crc32(f"{draw}/{name}".encode()))


def embedding_name(model: Any) -> str:
    """Return the name of the input embedding within a model."""
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)
