"""How one model is trained by many workers, behind the same five verbs; and the simplest ways.

`micro_batch` and `backward` are one pass, `step` ends an optimizer step, `blocks` says what this worker
holds (what checkpoints and checks are made from), `whole` gathers one tensor for export. Gradients are
averaged over workers by all strategies, so the loop multiplies its loss by their number to get sums.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from seekr.methods.penalty import Shard
from seekr.training.build import (
    Origin,
    decoder_layers,
    empty_model,
    fill,
    materialise,
    origin_source,
)
from seekr.training.optimizers import check_optimizer, create_optimizer, prepare_state, set_rate
from seekr.training.ranges import Block, Source, flat, range_of
from seekr.training.settings import Execution, Recipe


class Strategy(Protocol):
    """The verbs of the training loop.

    Attributes:
        module: What is called. model: the transformers model inside, whose config and names count.
        optimizer: The one that holds the master weights' state.
        source: Where the weights that training starts from are read.
    """

    module: nn.Module
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    source: Source

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward pass; `last` of its optimizer step."""
        ...

    def watching(self) -> AbstractContextManager[None]:
        """Context of forward passes that train nothing, by the model as it is evaluated."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients."""
        ...

    def shards(self) -> list[Shard]:
        """Return what this worker holds of the trained tensors, with their gradients so far.

        Raises:
            ConfigError: gradients do not lie here in a form that can be added to.
        """
        ...

    def step(self, rate: float, max_norm: float) -> float:
        """Clip the whole gradient, update, forget the gradients; returns the norm before."""
        ...

    def blocks(self) -> list[Block]:
        """Return what this worker holds of the master weights."""
        ...

    def refresh(self) -> None:
        """Make working copies equal to the masters, which were just filled."""
        ...

    def whole(self, name: str) -> Tensor:
        """Return a parameter in full, on every worker. Called on all of them."""
        ...


class Plain:
    """One worker's whole model, and what strategies share."""

    def __init__(
        self, origin: Origin, recipe: Recipe, execution: Execution, device: torch.device
    ) -> None:
        check_optimizer(recipe, execution.strategy)
        self._recipe, self._device = recipe, device
        self.model = prepare_model(origin, recipe, execution)
        self.source = origin_source(origin, self.model, recipe)
        self.module: nn.Module = self.model
        self._build()
        self.optimizer = create_optimizer(self._trained().values(), recipe)
        prepare_state(self.optimizer, self._trained().values())

    def _build(self) -> None:
        materialise(self.model, self._device)
        self.model.tie_weights()  # each got memory of its own
        fill(self.model, self.source)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with self._synchronised(last), self._autocast():
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.module.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield
        finally:
            self.module.train()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def shards(self) -> list[Shard]:
        trained = self._trained()
        for parameter in trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [
            Shard(
                name=block.name,
                shape=block.shape,
                start=block.start,
                values=block.part(block.master),
                gradient=flat(_gradient(trained[block.name])),
                counts=block.writer,
            )
            for block in self.blocks()
        ]

    def step(self, rate: float, max_norm: float) -> float:
        norm = self._clip(max_norm)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def blocks(self) -> list[Block]:
        first = not dist.is_initialized() or dist.get_rank() == 0
        found: list[Block] = []
        for name, parameter in self._trained().items():
            start, length = range_of(parameter)
            found.append(
                Block(
                    name=name,
                    shape=tuple(parameter.shape),
                    start=start,
                    length=length,
                    master=parameter,
                    writer=first or self._sharded(parameter),
                )
            )
        return found

    def refresh(self) -> None:
        pass

    def whole(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach()

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _sharded(self, parameter: Tensor) -> bool:
        return False

    def _clip(self, max_norm: float) -> float:
        return float(nn.utils.clip_grad_norm_(self._trained().values(), max_norm))

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._recipe.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._recipe.dtype)


class Ddp(Plain):
    """A whole model per worker, gradients averaged."""

    def _build(self) -> None:
        super()._build()
        ids = [self._device.index] if self._device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(
            self.model, device_ids=ids, gradient_as_bucket_view=True
        )
        self.module = self._wrapped

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._wrapped.no_sync()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def prepare_model(origin: Origin, recipe: Recipe, execution: Execution) -> PreTrainedModel:
    """Build the empty model with what the execution asks of its layers."""
    model = empty_model(origin, recipe)
    if execution.activation_checkpointing:
        enable: Callable[..., None] = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if execution.compile:
        layers = decoder_layers(model)
        # A layer's code is compiled anew for each layer that is distilled: they name themselves.
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 + 4 * len(layers))
        for layer in layers:
            layer.compile(dynamic=True)
    return model


def create_strategy(
    origin: Origin, recipe: Recipe, execution: Execution, device: torch.device
) -> Strategy:
    """Build, load and shard the model of a worker; workers, if many, have a process group.

    Raises:
        ConfigError: something that is asked for cannot be given here.
    """
    if execution.strategy == "fsdp":
        from seekr.training.fsdp import Fsdp

        return Fsdp(origin, recipe, execution, device)
    if execution.strategy == "deepspeed":
        from seekr.training.zero import Zero

        return Zero(origin, recipe, execution, device)
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    return (Plain if alone else Ddp)(origin, recipe, execution, device)
