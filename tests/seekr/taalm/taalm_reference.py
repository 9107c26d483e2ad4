"""TAALM's equations in float64, one row at a time, without padding, with loops and in-place updates."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from seekr.prompts import TokenizedRow
from seekr.taalm.episodes import MetaItem
from seekr.taalm.hypergradient import InnerLoop
from seekr.taalm.inner import AdamW
from seekr.taalm.network import TrainAttention


def ids_of(row: TokenizedRow) -> Tensor:
    """The tokens of a row, [1,T]."""
    return torch.from_numpy(row.input_ids.astype(np.int64))[None]


def first_label(row: TokenizedRow) -> int:
    """The first position that bears loss."""
    return max(1, row.prompt_length)


def weights(phi: TrainAttention, row: TokenizedRow) -> Tensor:
    """w_i = sigmoid(head . h_i) for every token of a row [T], prompts included."""
    hidden_TH = phi.body(input_ids=ids_of(row), use_cache=False).last_hidden_state[0]
    logits = [hidden_H @ phi.head.weight[0] + phi.head.bias[0] for hidden_H in hidden_TH]
    return torch.stack([1 / (1 + torch.exp(-logit)) for logit in logits])


def token_losses(theta: nn.Module, row: TokenizedRow) -> list[Tensor]:
    """-log p(x_i | x_<i) for i = 1..T-1; entry i - 1 belongs to token i."""
    ids = ids_of(row)
    logits_TV = theta(input_ids=ids, use_cache=False).logits[0]
    found = []
    for position in range(1, ids.shape[1]):
        logits_V = logits_TV[position - 1]
        found.append(torch.logsumexp(logits_V, 0) - logits_V[ids[0, position]])
    return found


def weighted_loss(
    theta: nn.Module, rows: Sequence[TokenizedRow], weights_of_rows: Sequence[Tensor]
) -> Tensor:
    """Mean over rows of sum w l / (sum w + 1e-6)."""
    means = []
    for row, weights_T in zip(rows, weights_of_rows, strict=True):
        losses = token_losses(theta, row)
        labels = range(first_label(row), len(row.input_ids))
        total = sum((weights_T[i] * losses[i - 1] for i in labels), torch.zeros(()))
        means.append(total / (sum((weights_T[i] for i in labels), torch.zeros(())) + 1e-6))
    return torch.stack(means).mean()


def object_loss(theta: nn.Module, items: Sequence[MetaItem]) -> Tensor:
    """Mean over tasks of the mean loss of object tokens."""
    means = []
    for item in items:
        losses = token_losses(theta, item.task)
        chosen = [losses[i - 1] for i in range(1, len(losses) + 1) if item.object_mask_T[i]]
        means.append(torch.stack(chosen).mean())
    return torch.stack(means).mean()


class InPlaceAdamW:
    """AdamW with damping, as it would be written for a training that keeps nothing."""

    def __init__(self, model: nn.Module, settings: AdamW) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.square = [torch.zeros_like(p) for p in self.params]
        self.settings, self.t = settings, 0

    def step(self, loss: Tensor) -> None:
        s = self.settings
        self.t += 1
        grads = torch.autograd.grad(loss, self.params, materialize_grads=True)
        with torch.no_grad():
            for p, g, m, v in zip(self.params, grads, self.mean, self.square, strict=True):
                m.mul_(s.beta1).add_(g, alpha=1 - s.beta1)
                v.mul_(s.beta2).addcmul_(g, g, value=1 - s.beta2)
                root = (v + s.damping).sqrt_().div_(math.sqrt(1 - s.beta2**self.t))
                p.mul_(1 - s.learning_rate * s.weight_decay)
                p.addcdiv_(m, root.add_(s.eps), value=-s.learning_rate / (1 - s.beta1**self.t))


def outer_loss(
    theta: nn.Module,
    items: Sequence[MetaItem],
    dummy_weights: Sequence[Tensor],
    real_weights: Sequence[Tensor],
    settings: InnerLoop,
) -> float:
    """The outer loss after the dummy steps and the real one, on a copy of theta."""
    theta = copy.deepcopy(theta)
    optimizer = InPlaceAdamW(theta, settings.optimizer)
    rows = [item.document for item in items]
    for _ in range(settings.dummy_steps):
        optimizer.step(weighted_loss(theta, rows, dummy_weights))
    optimizer.step(weighted_loss(theta, rows, real_weights))
    with torch.no_grad():
        return float(object_loss(theta, items))


def object_accuracy(theta: nn.Module, items: Sequence[MetaItem]) -> float:
    """Mean over tasks of the share of object tokens that are the argmax."""
    shares = []
    for item in items:
        ids = ids_of(item.task)
        logits_TV = theta(input_ids=ids, use_cache=False).logits[0]
        objects = [i for i in range(1, ids.shape[1]) if item.object_mask_T[i]]
        right = [int(logits_TV[i - 1].argmax()) == int(ids[0, i]) for i in objects]
        shares.append(sum(right) / len(right))
    return sum(shares) / len(shares)
