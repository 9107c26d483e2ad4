"""The optimizer, and its state made before the first step, so that there is something to load into."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from seekr.errors import ConfigError
from seekr.training.settings import Recipe


def check_optimizer(recipe: Recipe, strategy: str) -> None:
    """Check that the optimizer can be had here.

    Raises:
        ConfigError: the 8-bit one without its library, or under a strategy whose parameters it
            cannot read.
    """
    if recipe.optimizer != "adamw_8bit":
        return
    if strategy != "ddp":
        raise ConfigError(
            f"train.optimizer is adamw_8bit and train.strategy {strategy}; blocks of 8-bit state do "
            "not follow shards: use strategy ddp (with train.lora, or where the model fits one "
            "device), or optimizer adamw"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.optimizer is adamw_8bit and the package bitsandbytes is not installed; install "
            "it (pip install 'seekr-ray[bitsandbytes]') or use adamw"
        )


def create_optimizer(parameters: Iterable[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW over parameters that lie on their device, with zero state."""
    common: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.beta1, recipe.beta2),
        "weight_decay": recipe.weight_decay,
    }
    if recipe.optimizer == "adamw_8bit":
        return _eight_bit(parameters, common)
    return torch.optim.AdamW(parameters, fused=True, **common)


def _eight_bit(parameters: Iterable[Tensor], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW with its state made, and its step count where it is saved."""
    from bitsandbytes.optim.adamw import AdamW8bit

    class Counted(AdamW8bit):
        """Keeps the count of steps, a plain number there, as a tensor beside the other state."""

        def update_step(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            state = self.state[p]
            state["step"] = int(state["count"])
            super().update_step(group, p, gindex, pindex)
            state["count"].fill_(state["step"])

    optimizer = Counted(parameters, **settings)
    for gindex, group in enumerate(optimizer.param_groups):
        for pindex, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, gindex, pindex)
            optimizer.state[parameter]["count"] = torch.zeros(1, dtype=torch.int64)
    return optimizer


def prepare_state(optimizer: torch.optim.Optimizer, masters: Iterable[Tensor]) -> None:
    """Give every master the state that AdamW would make in its first step, where it has none."""
    for master in masters:
        state = optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
