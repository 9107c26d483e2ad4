"""How one model is trained by many workers: DDP and FSDP2 behind the same few verbs.

A strategy wraps the model, runs a micro-batch (with gradients exchanged only on the last one of an
optimizer step), clips, names the parameters, and exports the whole. Gradients are averaged over
workers by both, so the loop multiplies its loss by the world size to get sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seekr.models import save_model


class Strategy(Protocol):
    """The verbs of the training loop."""

    module: nn.Module

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward pass; `last` of its optimizer step."""
        ...

    def clip(self, max_norm: float) -> float:
        """Clip the gradient of the whole model; returns its norm before."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Trainable parameters by the plain model's names; shards where they are sharded."""
        ...

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
        """Write the whole model on rank 0. Called on all ranks."""
        ...


class _Plain:
    """One worker's whole model, and what both strategies share."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.module: nn.Module = model
        self._model, self._dtype = model, dtype
        self._device = next(model.parameters()).device.type

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with self._synchronised(last), self._autocast():
            yield

    def clip(self, max_norm: float) -> float:
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        save_model(self._model.to(dtype), tokenizer, folder)  # pyright: ignore[reportArgumentType]

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)


class _Ddp(_Plain):
    """A whole model per worker, gradients averaged."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self._wrapped = DistributedDataParallel(model)
        self.module = self._wrapped

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._wrapped.no_sync()


class _Fsdp(_Plain):
    """FSDP2: parameters, gradients and optimizer state sharded, layer by layer."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self._plain_class = type(model)  # fully_shard gives the model another one
        mesh = init_device_mesh(self._device, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
        )
        for layer in _decoder_layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        self._sharded: Any = fully_shard(model, mesh=mesh, mp_policy=policy)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        self._sharded.set_requires_gradient_sync(last)
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
        whole: dict[str, Tensor] = {}
        for name, value in self._model.state_dict().items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if dist.get_rank() == 0:
                whole[name] = full.to(dtype).cpu()
        if dist.get_rank() != 0:
            return
        with torch.device("meta"):
            shell = self._plain_class(self._model.config)
        shell.load_state_dict(whole, assign=True)
        shell.tie_weights()
        save_model(shell.to(dtype), tokenizer, folder)  # pyright: ignore[reportArgumentType]


def create_strategy(name: str, model: PreTrainedModel, dtype: torch.dtype) -> Strategy:
    """Wrap a model that lies on its device in float32.

    Args:
        name: `ddp` or `fsdp`.
        dtype: Of the forward pass; master weights stay float32.
    """
    if name == "fsdp":
        return _Fsdp(model, dtype)
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    return _Plain(model, dtype) if alone else _Ddp(model, dtype)


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers: the units that are gathered one after the other."""
    decoder: Any = model.get_decoder()
    return list(decoder.layers)
