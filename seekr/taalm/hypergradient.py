"""How a weight on a token moves what is known after a training step: the gradient of phi.

Of theta_0 a few steps are taken on the weighted documents as if the weights were constants (dummy
steps), then one in which they are not: theta' = U(theta_K, g), with g the gradient of the weighted
loss. The outer loss is that of theta' on the tasks' objects; wanted is its gradient in phi.

Two ways to the same numbers. `unrolled` keeps the graph of the last step and differentiates through
it: a second-order pass, and its memory. `jvp` uses that U works number by number. With
v = (dU/dg)^T dL_out/dtheta', a number per parameter,

    dL_out/dw = d/dw <v, g(w)> = d/dw [ weighted loss with <v, grad l_i> in the place of l_i ],

and <v, grad l_i> for all tokens i at once is one derivative of the losses along v: by forward
differentiation, or by central differences, which leave attention fused. No gradient is ever
differentiated.

Shape suffixes: B batch (one document and its task each), T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from seekr.attention import evaluation_mode
from seekr.collation import Batch
from seekr.errors import ConfigError
from seekr.taalm.episodes import Episode
from seekr.taalm.inner import (
    AdamState,
    AdamW,
    Tensors,
    adamw_step,
    differentiable_attention,
    gradients,
    leaves,
    nll_with,
    trained_parameters,
    weighted_step,
)
from seekr.taalm.network import TrainAttention
from seekr.taalm.weighted import counted, object_nll, weighted_nll, weights_entropy

Backend = Literal["unrolled", "jvp", "central"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerLoop:
    """How theta learns from documents inside one step of phi, and how that is differentiated.

    Attributes:
        optimizer: Of theta. The damping is part of the method.
        dummy_steps: Steps before the one that is differentiated.
        backend: `unrolled`; `jvp` with forward differentiation; `central` with central differences,
            which are exact but for rounding and the third derivative along v.
        difference: Of `central`: length of the move along v over the length of theta. For float32;
            much less suffices in float64. With frozen weights in bfloat16 the losses are too coarse
            for it, and without damping few numbers make up nearly all of v: use `jvp`.
    """

    optimizer: AdamW = field(default_factory=lambda: AdamW(damping=1e-8))
    dummy_steps: int = 1
    backend: Backend = "jvp"
    difference: float = 1e-3

    def __post_init__(self) -> None:
        if self.dummy_steps < 0 or self.difference <= 0:
            raise ConfigError(
                f"dummy_steps is {self.dummy_steps} and difference {self.difference}; 0 or more, "
                "and above 0, are allowed: change them"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeFigures:
    """What one episode showed.

    Attributes:
        outer_nll: Mean NLL of the object tokens after the step, in nats.
        entropy: Of the weights, over that of equal ones; towards 0 they collapse onto single tokens.
        mean_weight: Mean of w over labels; towards 0 the sum of weights vanishes.
    """

    outer_nll: float
    entropy: float
    mean_weight: float


def hypergradient(
    theta: nn.Module, phi: TrainAttention, episode: Episode, settings: InnerLoop
) -> tuple[Tensors, EpisodeFigures]:
    """Return the gradient of the outer loss in what is trained of phi, by parameter name.

    Both models run without dropout and are as before afterwards, weights and gradients.

    Args:
        theta: A causal language model; what has `requires_grad` takes the inner steps.
        phi: On theta's device.
        episode: On the same device. Its losses are means over documents and over tasks.

    Raises:
        ConfigError: nothing is trained of one of them, or in a type too coarse.
        UnsupportedModel: theta's attention has no form that can be differentiated as asked.
        ValueError: the batches are packed.
    """
    trained_parameters(phi)
    documents = episode.documents
    with evaluation_mode(theta), evaluation_mode(phi):
        weights_BT = phi(documents)
        params = trained_parameters(theta)
        state = AdamState.zeros(params)
        for _ in range(settings.dummy_steps):
            params, state = weighted_step(
                theta, params, state, documents, weights_BT, settings.optimizer
            )
        real = _unrolled if settings.backend == "unrolled" else _by_direction
        outer, differentiated = real(theta, leaves(params), state, weights_BT, episode, settings)
        own = {name: p for name, p in phi.named_parameters() if p.requires_grad}
        grads = gradients(differentiated, own)
    return grads, _figures(outer, weights_BT.detach(), documents)


def _unrolled(
    theta: nn.Module,
    params: Tensors,
    state: AdamState,
    weights_BT: Tensor,
    episode: Episode,
    settings: InnerLoop,
) -> tuple[Tensor, Tensor]:
    """Return the outer loss, and once more as what is differentiated in the weights."""
    documents, tasks = episode.documents, episode.tasks
    documents.check_one_row_each()
    with differentiable_attention(theta):
        nll_BT = nll_with(theta, params, documents)
        loss = weighted_nll(nll_BT, weights_BT, documents.labels_BT)
        grads = gradients(loss, params, keep_graph=True)
    after, _ = adamw_step(params, grads, state, settings.optimizer)
    outer = object_nll(nll_with(theta, after, tasks), tasks.labels_BT)
    return outer, outer


def _by_direction(
    theta: nn.Module,
    params: Tensors,
    state: AdamState,
    weights_BT: Tensor,
    episode: Episode,
    settings: InnerLoop,
) -> tuple[Tensor, Tensor]:
    """Return the outer loss, and a function of the weights that has its gradient at their values."""
    documents, tasks = episode.documents, episode.tasks
    documents.check_one_row_each()
    nll_BT = nll_with(theta, params, documents)
    loss = weighted_nll(nll_BT, weights_BT.detach(), documents.labels_BT)
    grads = leaves(gradients(loss, params))
    del nll_BT, loss
    params = {name: p.detach() for name, p in params.items()}
    after, _ = adamw_step(params, grads, state, settings.optimizer)
    moved = leaves(after)
    outer = object_nll(nll_with(theta, moved, tasks), tasks.labels_BT)
    outer_grads = gradients(outer, moved)
    found = torch.autograd.grad(
        list(after.values()), list(grads.values()), list(outer_grads.values())
    )
    direction = dict(zip(params, found, strict=True))
    del after, moved, outer_grads, grads, found
    with torch.no_grad():
        if settings.backend == "jvp":
            slopes_BT = _forward_slopes(theta, params, direction, documents)
        else:
            slopes_BT = _central_slopes(theta, params, direction, documents, settings.difference)
    return outer.detach(), weighted_nll(slopes_BT, weights_BT, documents.labels_BT)


def _forward_slopes(
    theta: nn.Module, params: Tensors, direction: Mapping[str, Tensor], documents: Batch
) -> Tensor:
    """Return the derivative of the tokens' losses [B,T] along a direction, exactly."""
    with forward_ad.dual_level(), differentiable_attention(theta):
        duals = {n: forward_ad.make_dual(p, direction[n]) for n, p in params.items()}
        slopes_BT = forward_ad.unpack_dual(nll_with(theta, duals, documents)).tangent
    assert slopes_BT is not None, "the losses depend on no trained parameter"
    return slopes_BT


def _central_slopes(
    theta: nn.Module,
    params: Tensors,
    direction: Mapping[str, Tensor],
    documents: Batch,
    difference: float,
) -> Tensor:
    """Return the same as half the difference of the losses at both ends of a short move."""
    length, size = _norm(direction), _norm(params)
    if length == 0:
        return torch.zeros_like(documents.labels_BT, dtype=next(iter(params.values())).dtype)
    h = difference * (size if size > 0 else 1.0) / length
    forth_BT, back_BT = (
        nll_with(theta, {n: p + sign * h * direction[n] for n, p in params.items()}, documents)
        for sign in (1, -1)
    )
    return (forth_BT - back_BT) / (2 * h)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors.values()]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _figures(outer: Tensor, weights_BT: Tensor, documents: Batch) -> EpisodeFigures:
    mask_BT = counted(documents.labels_BT)
    return EpisodeFigures(
        outer_nll=float(outer.detach()),
        entropy=float(weights_entropy(weights_BT, documents.labels_BT)),
        mean_weight=float(weights_BT.sum() / mask_BT.sum()),
    )
