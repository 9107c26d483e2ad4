"""Training steps of a model that is left as it is: parameters and optimizer state are values.

A step takes tensors and returns new ones, so it can be differentiated, and repeated from the same
start. The model's forward pass runs with the given tensors in the place of its own
(`torch.func.functional_call`); afterwards it has its own weights, untouched.

AdamW here has a damping: its denominator is sqrt((v + damping) / (1 - beta2^t)) + eps. Without it the
first step is the sign of the gradient, whose derivative is next to zero wherever the gradient is not,
and says nothing of how a weight on a token moves the parameters. With 1e-8 and beta2 = 0.999 the first
step is lr * g / sqrt(g^2 + 1e-5): proportional to g where |g| is well below 3e-3. With 0 it is AdamW.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from seekr.attention import ATTENTION, inner_model
from seekr.collation import Batch
from seekr.errors import ConfigError, UnsupportedModel
from seekr.forward import model_inputs
from seekr.taalm.weighted import token_nll, weighted_nll

Tensors = dict[str, Tensor]
# Attention that is made of plain operations, or of SDPA, which has a form that is.
_DIFFERENTIABLE = ("eager", "sdpa", ATTENTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Settings of the optimizer; weight decay is decoupled, as in torch.

    Attributes:
        damping: Added to the mean of squared gradients; see the module's text.
    """

    learning_rate: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    damping: float = 0.0

    def __post_init__(self) -> None:
        bad = [f.name for f in fields(self) if getattr(self, f.name) < 0]
        bad += [name for name in ("beta1", "beta2") if getattr(self, name) >= 1]
        if bad:
            raise ConfigError(
                f"{bad[0]} of AdamW is {getattr(self, bad[0])}; 0 or more is allowed, and below 1 for "
                "beta1 and beta2: change it"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdamState:
    """What AdamW remembers: steps done, means of gradients and of their squares."""

    step: int
    mean: Tensors
    square: Tensors

    @classmethod
    def zeros(cls, params: Mapping[str, Tensor]) -> AdamState:
        """Return the state before the first step."""
        mean, square = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
        return cls(step=0, mean=mean, square=square)


def adamw_step(
    params: Mapping[str, Tensor], grads: Mapping[str, Tensor], state: AdamState, settings: AdamW
) -> tuple[Tensors, AdamState]:
    """Return parameters and state after one step; out of place, differentiable in all tensors.

    Source: Loshchilov and Hutter, algorithm 2, with the damping of the module's text.
    """
    step = state.step + 1
    unbias1, unbias2 = 1 - settings.beta1**step, 1 - settings.beta2**step
    new: Tensors = {}
    mean: Tensors = {}
    square: Tensors = {}
    for name, p in params.items():
        g = grads[name]
        mean[name] = state.mean[name].lerp(g, 1 - settings.beta1)
        square[name] = state.square[name] * settings.beta2 + (1 - settings.beta2) * g * g
        root = _root((square[name] + settings.damping) / unbias2)
        step_size = settings.learning_rate / unbias1
        decayed = p * (1 - settings.learning_rate * settings.weight_decay)
        new[name] = decayed - step_size * mean[name] / (root + settings.eps)
    return new, AdamState(step=step, mean=mean, square=square)


def _root(values: Tensor) -> Tensor:
    """Return the square root, with a derivative of 0 at 0 instead of an infinite one.

    There all gradients so far were 0, so the mean is too, and the denominator's derivative has no
    bearing on the step's.
    """
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)


def trained_parameters(model: nn.Module) -> Tensors:
    """Return what of a model is trained (`requires_grad`), by name, detached, sharing its memory.

    Raises:
        ConfigError: nothing is, or something is in a type too coarse for small steps.
    """
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ConfigError(
            f"nothing of {type(model).__name__} is trained; some parameters are needed: add "
            "adapters, or call requires_grad_(True)"
        )
    coarse = [n for n, p in found.items() if p.dtype not in (torch.float32, torch.float64)]
    if coarse:
        raise ConfigError(
            f"{len(coarse)} trained parameters are in {found[coarse[0]].dtype}, the first is "
            f"{coarse[0]!r}; float32 is needed, as steps would be rounded away: load the model in "
            "float32, or train adapters"
        )
    return found


def leaves(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the same values as new starting points of differentiation."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def logits_with(model: nn.Module, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Return logits [B,T,V] of the model with `params` in place of its own of these names."""
    inputs = {**model_inputs(batch), "use_cache": False}
    return functional_call(model, dict(params), args=(), kwargs=inputs).logits


def nll_with(model: nn.Module, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Return -log p of the batch's labels [B,T] under the model with these parameters."""
    return token_nll(logits_with(model, params, batch), batch.labels_BT)


def gradients(loss: Tensor, params: Mapping[str, Tensor], *, keep_graph: bool = False) -> Tensors:
    """Return d loss / d params, 0 for what the loss does not depend on.

    Args:
        keep_graph: The gradient can be differentiated again.
    """
    found = torch.autograd.grad(
        loss, list(params.values()), create_graph=keep_graph, materialize_grads=True
    )
    return dict(zip(params, found, strict=True))


def weighted_step(
    model: nn.Module,
    params: Mapping[str, Tensor],
    state: AdamState,
    documents: Batch,
    weights_BT: Tensor,
    settings: AdamW,
) -> tuple[Tensors, AdamState]:
    """Return parameters and state after one step on the weighted loss of documents.

    Nothing can be differentiated through it. Parameters are detached, on the model's device.

    Raises:
        ValueError: the documents are packed.
    """
    documents.check_one_row_each()
    params = leaves(params)
    nll_BT = nll_with(model, params, documents)
    loss = weighted_nll(nll_BT, weights_BT.detach(), documents.labels_BT)
    grads = gradients(loss, params)
    with torch.no_grad():
        return adamw_step(params, grads, state, settings)


@contextmanager
def differentiable_attention(model: nn.Module) -> Iterator[None]:
    """Let attention be computed by operations that can be differentiated twice, and forwards.

    SDPA's fused kernels cannot. Inside the block it takes its plain form, on every device; which
    kernels are allowed is as before afterwards. Eager attention is plain anyway.

    Raises:
        UnsupportedModel: the model's attention has no plain form.
    """
    name = inner_model(model).config.get_text_config()._attn_implementation
    if name not in _DIFFERENTIABLE:
        raise UnsupportedModel(
            f"{type(model).__name__} uses attn_implementation={name!r}, which cannot be "
            f"differentiated twice; {', '.join(_DIFFERENTIABLE)} can: load it with one of these"
        )
    with sdpa_kernel(SDPBackend.MATH):
        yield
