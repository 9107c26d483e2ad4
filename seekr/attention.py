"""Stock attention with a place to look at it.

`register()` adds one attention function, `"seekr"`, to transformers. It returns exactly what the
stock SDPA function returns; if a probe is attached to the calling module it also shows the probe
queries, keys, values, mask and output of that layer. A probe computes what it needs from those, so
no model code is copied or patched and any architecture that goes through `AttentionInterface` can
be probed. The mask function is registered with it: without one, transformers passes no mask and
padding takes part.

Attention dropout is not part of what probes see: their maps are those before dropout.

Shape suffixes: B batch, H query heads, G key/value heads, T tokens, D head dim.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from seekr.errors import ConfigError, UnsupportedModel

ATTENTION = "seekr"
_SLOT = "_seekr_probe"
_SOFTMAX_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Architectures that go through AttentionInterface but have no single softmax map per head.
_REFUSED_TYPES: Mapping[str, str] = {
    "diffllama": "differential attention: a head is the difference of two maps",
    "doge": "dynamic masks: learnt numbers are added to the scores",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What one attention layer computed in one forward pass.

    `mask_BHTT` is True where a query may look at a key, with sizes of 1 where it is shared; None
    means plain causal attention without padding. `scaling` multiplies the scores before the
    softmax.
    """

    layer: int
    query_BHTD: Tensor
    key_BGTD: Tensor
    value_BGTD: Tensor
    mask_BHTT: Tensor | None
    scaling: float
    output_BTHD: Tensor
    training: bool


class Probe(Protocol):
    """Receives an `Observation` from each layer in `layers` (None: from all) per forward pass."""

    @property
    def layers(self) -> frozenset[int] | None: ...

    def observe(self, seen: Observation) -> None: ...


def register() -> None:
    """Make `attn_implementation="seekr"` known to transformers; calling it again is harmless."""
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stock SDPA attention (output [B,T,H,D], None), shown to the module's probe if it has one."""
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} uses attention sinks, which SDPA would ignore; only plain "
            "softmax attention can be probed: choose another model"
        )
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    probe: Probe | None = getattr(module, _SLOT, None)
    if probe is not None:
        _check_observable(module, query, key, attention_mask, kwargs)
        seen = Observation(
            layer=_layer_of(module),
            query_BHTD=query,
            key_BGTD=key,
            value_BGTD=value,
            mask_BHTT=attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            output_BTHD=output,
            training=module.training,
        )
        probe.observe(seen)
    return output, None


def _check_observable(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]
) -> None:
    name = type(module).__name__
    if mask is not None and mask.dtype != torch.bool:
        raise UnsupportedModel(
            f"{name} passes an additive {mask.dtype} attention mask; a probe needs the boolean "
            "mask made from a [B,T] padding mask: pass attention_mask [B,T], or choose another "
            "model"
        )
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModel(
            f"{name} adds a position bias to its scores; only plain softmax attention can be "
            "probed: choose another model"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{name} has {query.shape[2]} queries and {key.shape[2]} keys; a probe sees whole "
            "sequences only: call the model with use_cache=False"
        )
    is_causal = kwargs.get("is_causal")
    if mask is None and not (
        getattr(module, "is_causal", True) if is_causal is None else is_causal
    ):
        raise UnsupportedModel(
            f"{name} attends in both directions; a probe needs causal attention: choose another "
            "model"
        )


def check_probeable(config: PretrainedConfig) -> None:
    """Check, before any weight is loaded, that attention maps of this model can be probed exactly.

    Raises:
        UnsupportedModel: naming the cause (soft-capping, sinks, linear or hybrid attention, two
            attention modules in a layer, attention in both directions, a model outside
            AttentionInterface) and what to do.
    """
    text = config.get_text_config()
    cause = _refusal_from_config(text) or _refusal_from_code(text) or _refusal_from_structure(text)
    if cause is not None:
        raise UnsupportedModel(
            f"model type {text.model_type!r} cannot be probed: {cause}. SEEKR needs one softmax "
            "map per head from transformers' AttentionInterface (Llama, Mistral, Qwen2 and Qwen3 "
            "have it): choose such a model, or a method without attention distillation (derpp, "
            "replay)"
        )


def _refusal_from_config(text: PretrainedConfig) -> str | None:
    if text.model_type in _REFUSED_TYPES:
        return _REFUSED_TYPES[text.model_type]
    softcap = getattr(text, "attn_logit_softcapping", None)
    if softcap is not None:
        return f"attn_logit_softcapping is {softcap} (capped scores), null is allowed"
    for field in ("layer_types", "layers_block_type"):
        others = sorted(set(getattr(text, field, None) or ()) - _SOFTMAX_LAYERS)
        if others:
            return f"{field} has {others}, only {sorted(_SOFTMAX_LAYERS)} are allowed"
    return None


def _refusal_from_code(text: PretrainedConfig) -> str | None:
    """Read the model class's own source, as transformers does to find AttentionInterface."""
    mapping = AutoModelForCausalLM._model_mapping  # pyright: ignore[reportPrivateUsage]
    if type(text) not in mapping:
        return "it has no causal language model class in transformers"
    model_class = mapping[type(text)]
    source = inspect.getsource(sys.modules[model_class.__module__])
    if "ALL_ATTENTION_FUNCTIONS.get_interface(" not in source:
        return "its attention does not go through AttentionInterface"
    if re.search(r"\bs_aux\b", source):
        return "it has attention sinks"
    return None


def _refusal_from_structure(text: PretrainedConfig) -> str | None:
    """Build the model without memory for its weights, and look at its attention modules."""
    with torch.device("meta"):
        # Building writes the attention implementation into the config.
        model = AutoModelForCausalLM.from_config(deepcopy(text), attn_implementation="eager")
    modules, cause = _attention_by_layer(model)
    if cause is None and not all(getattr(module, "is_causal", True) for module in modules.values()):
        return "it attends in both directions"
    return cause


@contextmanager
def probing(model: nn.Module, probe: Probe) -> Iterator[None]:
    """Attach `probe` to the attention modules of `model` for the duration of the block.

    Args:
        model: A transformers causal LM, bare or inside DDP, FSDP2 or PEFT.
        probe: Gets an Observation per forward pass and layer. Detached again also after an
            exception. With activation checkpointing backward has to run inside the block too, as it
            runs layers again; outside, torch raises CheckpointError.

    Raises:
        ConfigError: the model was loaded with another attention implementation, or the probe asks
            for a layer that the model does not have.
        UnsupportedModel: some layer has no attention module that can be found.
        RuntimeError: the model is already being probed.
    """
    modules = _attention_modules(model)
    wanted = modules if probe.layers is None else _pick(modules, probe.layers)
    if any(hasattr(module, _SLOT) for module in modules.values()):
        raise RuntimeError(
            "the model is already being probed; leave the first `probing` block first"
        )
    try:
        for module in wanted.values():
            setattr(module, _SLOT, probe)
        yield
    finally:
        for module in wanted.values():
            module.__dict__.pop(_SLOT, None)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside whatever wraps it (DDP, FSDP2, PEFT)."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnsupportedModel(
        f"{type(model).__name__} holds no transformers model; a PreTrainedModel is needed: load it "
        "with AutoModelForCausalLM"
    )


def _attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    inner = inner_model(model)
    implementation = inner.config.get_text_config()._attn_implementation
    if implementation != ATTENTION:
        raise ConfigError(
            f"{type(inner).__name__} uses attn_implementation={implementation!r}; a probe needs "
            f"{ATTENTION!r}: call seekr.attention.register() and load the model with it"
        )
    found, cause = _attention_by_layer(inner)
    if cause is not None:
        raise UnsupportedModel(f"{type(inner).__name__} cannot be probed: {cause}")
    return found


def _attention_by_layer(inner: PreTrainedModel) -> tuple[dict[int, nn.Module], str | None]:
    """Return each layer's attention module, and what is wrong with them or None."""
    found: dict[int, nn.Module] = {}
    for module in inner.modules():
        is_attention = "Attention" in type(module).__name__
        if is_attention and isinstance(getattr(module, "layer_idx", None), int):
            if _layer_of(module) in found:
                return found, f"it has two attention modules in layer {_layer_of(module)}, not one"
            found[_layer_of(module)] = module
    layers = inner.config.get_text_config().num_hidden_layers
    if sorted(found) != list(range(layers)):
        return found, f"it has {layers} layers and attention modules in {sorted(found)} of them"
    return found, None


def _pick(modules: dict[int, nn.Module], layers: frozenset[int]) -> dict[int, nn.Module]:
    unknown = sorted(layers - modules.keys())
    if unknown:
        raise ConfigError(
            f"probe asks for layer {unknown[0]}; the model has layers 0..{len(modules) - 1}: "
            "select heads for this model"
        )
    return {layer: modules[layer] for layer in sorted(layers)}


def _layer_of(module: nn.Module) -> int:
    return int(module.layer_idx)  # pyright: ignore[reportArgumentType]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def token_positions(attention_mask_BT: Tensor) -> Tensor:
    """Return position ids [B,T] that count real tokens from 0, so padding moves no position."""
    return (attention_mask_BT.long().cumsum(dim=-1) - 1).clamp(min=0)
