"""DeepSpeed's ZeRO: optimizer state (1), gradients (2), parameters (3) sharded over workers.

DeepSpeed gathers, reduces, clips and steps. The master weights it keeps are ours to fill and to check:
it makes them from the working copies, which are rounded where the model file is wider than the
recipe's dtype, so they are filled again from the files and the copies are made from them. Its own
checkpoints are not used, see `checkpoint`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seekr.errors import ConfigError
from seekr.methods.penalty import Shard
from seekr.training.build import (
    Origin,
    file_name,
    fill,
    materialise,
    origin_source,
    set_buffer,
)
from seekr.training.optimizers import check_optimizer, create_optimizer, prepare_state, set_rate
from seekr.training.ranges import Block, copy_in, flat
from seekr.training.settings import Execution, Recipe
from seekr.training.strategy import prepare_model


class Zero:
    """A DeepSpeed engine behind the strategy's verbs."""

    def __init__(
        self, origin: Origin, recipe: Recipe, execution: Execution, device: torch.device
    ) -> None:
        check_zero(execution)
        check_optimizer(recipe, execution.strategy)
        self._deepspeed = _import(device)
        self._stage = execution.zero_stage
        self._settings = engine_settings(recipe, execution)
        self.model = prepare_model(origin, recipe, execution)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(recipe.dtype)
        buffers = dict(self.model.named_buffers())
        self.source = origin_source(origin, self.model, recipe)
        if self._stage == 3:
            self._fill_and_cut(recipe, device)
        else:
            materialise(self.model, device)
            self.model.tie_weights()
            fill(self.model, self.source)
        self._trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._engine, self._zero, _, _ = self._deepspeed.initialize(
            model=self.model,
            optimizer=create_optimizer(self._trained.values(), recipe),
            config=self._settings,
            dist_init_required=False,
        )
        # The engine has rounded them with the parameters; rotary frequencies must not be.
        for name, buffer in buffers.items():
            set_buffer(self.model, name, buffer.to(device))
        self.module: nn.Module = self._engine
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer
        prepare_state(self.optimizer, self._masters())
        if recipe.dtype != torch.float32:
            for block in self.blocks():
                target = block.part(block.master)
                copy_in(self.source, file_name(block.name), block.start, target)

    def _fill_and_cut(self, recipe: Recipe, device: torch.device) -> None:
        """Read one module after the other in full, and keep this worker's part of it."""
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                holders.setdefault(id(parameter), []).append((module, leaf))
        for name, parameter in list(self.model.named_parameters()):
            real = nn.Parameter(torch.empty_like(parameter, device=device))
            real.requires_grad_(parameter.requires_grad)
            if dist.get_rank() == 0:  # who sends it to the others
                copy_in(self.source, file_name(name), 0, flat(real))
            for module, leaf in holders[id(parameter)]:
                module._parameters[leaf] = real
            module, leaf = holders[id(parameter)][0]
            carrier = nn.Module()
            carrier.register_parameter(leaf, real)
            self._deepspeed.zero.Init(
                module=carrier,
                config_dict_or_path=self._settings,
                dtype=recipe.dtype,
                mem_efficient_linear=False,  # it would replace functional.linear in this process
            )
        for name, buffer in self.model.named_buffers():
            set_buffer(self.model, name, buffer.to(device))

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self._engine.step()

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def shards(self) -> list[Shard]:
        raise ConfigError(
            "train.strategy is deepspeed, which keeps gradients to itself, and the method adds to "
            "them; ddp and fsdp are allowed: choose fsdp"
        )

    def step(self, rate: float, max_norm: float) -> float:
        set_rate(self.optimizer, rate)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def blocks(self) -> list[Block]:
        cut = self._blocks_of_cut_tensors if self._stage == 3 else self._blocks_of_flat_groups
        return list(cut())

    def _blocks_of_flat_groups(self) -> Iterator[Block]:
        masters = self._masters()
        for name, parameter in self._trained.items():
            place: Any = getattr(parameter, "_hp_mapping", None)
            if place is None:  # none of it is this worker's
                continue
            yield Block(
                name=name,
                shape=tuple(parameter.shape),
                start=place.lp_fragment_address.start,
                length=place.lp_fragment_address.numel,
                master=masters[place.param_group_index],
                offset=place.hp_fragment_address.start,
            )

    def _blocks_of_cut_tensors(self) -> Iterator[Block]:
        masters, rank = self._masters(), dist.get_rank()
        for name, parameter in self._trained.items():
            cut: Any = parameter
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = min(rank * size, cut.ds_numel)
            yield Block(
                name=name,
                shape=tuple(cut.ds_shape),
                start=start,
                length=min(size, cut.ds_numel - start),  # the last worker's part is padded
                master=masters[group],
                offset=offset,
            )

    def refresh(self) -> None:
        if self._stage != 3:
            self._zero.update_lp_params()
            return
        for group, master in enumerate(self._masters()):
            self._zero.fp16_partitioned_groups_flat[group].data.copy_(master.data)
            self._zero._unflatten_partitioned_parameters(group)
        if kept_whole := self._zero.persistent_parameters:
            kept_whole[0].all_gather(kept_whole)

    def whole(self, name: str) -> Tensor:
        parameter = self.model.get_parameter(name)
        if self._stage != 3:
            return parameter.detach()
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _masters(self) -> list[Tensor]:
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        if hasattr(self._zero, "fp32_groups_flat_partition"):  # its optimizer for bfloat16, stage 1
            return self._zero.fp32_groups_flat_partition
        return self._zero.single_partition_of_fp32_groups


def check_zero(execution: Execution) -> None:
    """Check that DeepSpeed is there and does what is asked.

    Raises:
        ConfigError: it is not installed, or parameters are to be offloaded that stay on the device.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "train.strategy is deepspeed and the package is not installed; install it "
            "(pip install 'seekr-ray[deepspeed]') or use strategy fsdp"
        )
    if execution.offload == "all" and execution.zero_stage != 3:
        raise ConfigError(
            f"train.offload is 'all' with train.zero_stage {execution.zero_stage}, which leaves "
            "parameters whole on the device; zero_stage 3 is needed, or offload 'optimizer'"
        )


def engine_settings(recipe: Recipe, execution: Execution) -> dict[str, Any]:
    """Return DeepSpeed's configuration. Accumulation and schedule are the training loop's."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {"stage": execution.zero_stage, "contiguous_gradients": True}
    if execution.offload != "none":
        zero["offload_optimizer"] = host
    if execution.offload == "all":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": recipe.dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1 << 30,
    }


def _import(device: torch.device) -> Any:
    """Import DeepSpeed, told of the device, without its chatter and without compiling anything."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # `import ... as` would give torch itself, under which name deepspeed.comm has it.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    if device.type == "cpu":
        # It would compile shared-memory collectives whose peers spin for ever when a worker dies.
        backend.build_shm_op = lambda: None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    return deepspeed
