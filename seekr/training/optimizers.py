"""The optimizer, and its state made before the first step, so that there is something to load into."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from seekr.errors import ConfigError
from seekr.training.settings import Recipe


def check_optimizer(recipe: Recipe, device_type: str, strategy: str) -> None:
    """Check that the optimizer can be had here.

    Raises:
        ConfigError: the 8-bit one without its library, off CUDA, or under a strategy whose
            parameters it cannot read.
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
    if device_type != "cuda":
        raise ConfigError(
            f"train.optimizer is adamw_8bit and training runs on {device_type}; bitsandbytes has "
            "this optimizer on CUDA: set train.gpus_per_worker, or use adamw"
        )


def create_optimizer(parameters: Iterable[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW over parameters that lie on their device, with zero state."""
    common: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.beta1, recipe.beta2),
        "weight_decay": recipe.weight_decay,
    }
    if recipe.optimizer == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(parameters, **common)
    return torch.optim.AdamW(parameters, fused=True, **common)


def prepare_state(optimizer: torch.optim.Optimizer, masters: Iterable[Tensor]) -> None:
    """Give every master the state that AdamW would make in its first step."""
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
