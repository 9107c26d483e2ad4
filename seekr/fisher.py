"""The diagonal of the empirical Fisher information: how much an answer's likelihood asks of a weight.

Per row the gradient of the log-likelihood of its whole gold answer is squared, number by number; the
mean over rows is the diagonal. Rows go one at a time, as the square of a sum is not the sum of squares.
Several tasks' parabolas F_k (theta - theta_k)^2 are merged into one with the same gradient: the
precisions add up, and the anchor is the mean of the thetas under them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from seekr.attention import evaluation_mode
from seekr.collation import collate
from seekr.forward import batch_logits
from seekr.losses import answer_nll
from seekr.prompts import TokenizedRow


def fisher_diagonal(model: nn.Module, rows: Iterable[TokenizedRow]) -> dict[str, Tensor]:
    """Return the mean over rows of the squared gradient of log p(answer | prompt).

    Args:
        model: In float32 or better; its gradients are gone afterwards.
        rows: At least one; summed in the order given.

    Returns:
        By parameter name, of the parameters' shapes, in their type and on their device.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    count = 0
    with evaluation_mode(model):
        for row in rows:
            batch = collate([row], pad_id=0).to(next(iter(named.values())).device)
            nll_B, _ = answer_nll(batch_logits(model, batch), batch.labels_BT)
            gradients = torch.autograd.grad(nll_B.sum(), list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    sums[name].addcmul_(gradient, gradient)
            count += 1
    return {name: total / count for name, total in sums.items()}


def merge_parabolas(
    precision: Tensor, anchor: Tensor, fisher: Tensor, theta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return precision and anchor of the sum of two parabolas, up to a constant.

    Args:
        precision, anchor: Of the earlier tasks. fisher, theta: of the newest.
    """
    both = precision + fisher
    share = torch.where(both > 0, fisher / both, 1.0)
    return both, anchor + share * (theta - anchor)
