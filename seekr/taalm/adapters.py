"""Low-rank adapters in a model that is in memory, for the learner and for Train-Attention alike.

Names, layout and start are those of `seekr.training.build`. Adapters are float32 whatever the frozen
weights are. Their dropout is not applied: here every model runs in evaluation mode.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from seekr.training.build import adapter_start, file_name, inject_adapters, is_adapter, materialise
from seekr.training.settings import Lora


def add_adapters(model: PreTrainedModel, lora: Lora, draw: str) -> None:
    """Put adapters into a loaded model in place and freeze everything else.

    Args:
        model: A causal language model, or the body of one.
        draw: What A is drawn from, beside its name; B is zero, so the model computes what it did.

    Raises:
        ConfigError: the adapters name layers that the model lacks.
    """
    device = next(model.parameters()).device
    inject_adapters(model, lora)
    materialise(model, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(adapter_start(draw, name, parameter.shape))


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the adapters of a model by parameter name."""
    return {name: p.detach() for name, p in model.named_parameters() if is_adapter(name)}


def plain_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's state without its adapters, under the names that its files have."""
    state = model.state_dict()
    return {file_name(name): value for name, value in state.items() if not is_adapter(name)}
