"""Which tokens RHO-1 trains on: those whose loss is highest above a reference model's.

A token is worth training on where the model is still worse than a reference could be (Lin et al., NeurIPS
2024, arXiv 2404.07965). The highest share is kept of each row alone, so which tokens a row keeps does not
depend on the rows it shares a batch with.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def excess_loss_mask(
    nll_BT: Tensor, reference_BT: Tensor, labels_BT: Tensor, share: float = 0.6
) -> Tensor:
    """Return which tokens are kept.

    Of a row's n label tokens, max(1, floor(share * n + 1/2)) are kept, computed in float64; none where n is
    0. Ranked is nll - reference, computed in float32 or better; of equal ones the earlier token goes first.
    Tokens that are no labels are never ranked, whatever stands there.

    Args:
        nll_BT: Of the model that is trained, nats, at the token that is predicted.
        reference_BT: Of the reference, of the same tokens.
        labels_BT: bool, True at tokens that bear a loss.
        share: Of a row's label tokens, in (0, 1].

    Returns:
        Float32 [B,T] of ones and zeros, without gradient.

    Raises:
        ValueError: shapes differ, the share is outside (0, 1], or a label's loss is no number.
    """
    if not nll_BT.shape == reference_BT.shape == labels_BT.shape:
        shapes = [tuple(t.shape) for t in (nll_BT, reference_BT, labels_BT)]
        raise ValueError(f"losses and labels have shapes {shapes}; one shape [B,T] is needed")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; above 0 and at most 1 is allowed")
    dtype = torch.promote_types(nll_BT.dtype, torch.float32)
    excess_BT = nll_BT.detach().to(dtype) - reference_BT.detach().to(dtype)
    if not bool(excess_BT[labels_BT].isfinite().all()):
        raise ValueError("the loss of a label token is no number, so tokens have no order")
    # The place of each token in the order, which one argsort does not give.
    order_BT = excess_BT.masked_fill(~labels_BT, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )
    rank_BT = order_BT.argsort(dim=1)
    count_B = labels_BT.sum(dim=1)
    kept_B = (count_B.double() * share + 0.5).floor().long().clamp(min=1)
    return ((rank_BT < kept_B[:, None]) & labels_BT).float()
