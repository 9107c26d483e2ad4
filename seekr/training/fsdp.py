"""FSDP2: parameters, gradients and optimizer state sharded by rows, gathered layer by layer.

Master weights are the float32 shards; what a pass gathers is cast to the recipe's dtype. Gradients are
reduced in float32, in every pass: left whole until a step's last pass they would take 4 bytes per
parameter on every worker. With offload the shards, their gradients and the update live on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from seekr.errors import ConfigError
from seekr.training.build import Origin, decoder_layers, fill, materialise, set_buffer
from seekr.training.settings import Execution, Recipe
from seekr.training.strategy import Plain


class Fsdp(Plain):
    """A row-wise part of every tensor per worker."""

    def __init__(
        self, origin: Origin, recipe: Recipe, execution: Execution, device: torch.device
    ) -> None:
        check_fsdp(execution)
        self._offload = execution.offload == "all"
        super().__init__(origin, recipe, execution, device)

    def _build(self) -> None:
        mesh = init_device_mesh(self._device.type, (dist.get_world_size(),))
        dtype = None if self._recipe.dtype == torch.float32 else self._recipe.dtype
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        }
        if self._offload and self._device.type == "cuda":
            options["offload_policy"] = CPUOffloadPolicy()
        for layer in decoder_layers(self.model):
            fully_shard(layer, **options)
        fully_shard(self.model, **options)
        materialise(self.model, torch.device("cpu") if self._offload else self._device)
        if self._offload:
            for name, buffer in self.model.named_buffers():
                set_buffer(self.model, name, buffer.to(self._device))
        fill(self.model, self.source)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with super().watching():
            yield
        # Without a backward pass the last gathered parameters would stay whole.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole(self, name: str) -> Tensor:
        shard: Any = super().whole(name)
        if not isinstance(shard, DTensor):
            return shard
        on_device: Any = shard.to(self._device)  # offloaded shards are gathered there
        return on_device.full_tensor()

    def _sharded(self, parameter: Tensor) -> bool:
        return isinstance(parameter, DTensor)

    def _clip(self, max_norm: float) -> float:
        norm = nn.utils.clip_grad_norm_(self._trained().values(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()


def check_fsdp(execution: Execution) -> None:
    """Raises ConfigError: offload of the optimizer alone, which FSDP2 does not have."""
    if execution.offload == "optimizer":
        raise ConfigError(
            "train.offload is 'optimizer' and train.strategy fsdp, which keeps parameters, "
            "gradients and optimizer together; 'none' and 'all' are allowed: choose one of them, or "
            "strategy deepspeed"
        )
