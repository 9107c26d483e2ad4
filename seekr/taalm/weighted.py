"""The language-model loss with a weight per token, and what it is made of.

A document's loss is a weighted mean over its labels, so weights are relative: their scale does not
matter, and equal ones give the plain masked loss. What is no label is left out of the mean: prompts,
padding, and a first column that nothing predicts.

Shape suffixes: B batch (one document each), T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seekr.collation import IGNORE_LABEL
from seekr.losses import AnswerNLL
from seekr.softmax import exact_dtype

# Added to a document's sum of weights; it matters where all of them are next to nothing.
WEIGHT_EPSILON = 1e-6


def counted(labels_BT: Tensor) -> Tensor:
    """Return where a label bears loss [B,T]: everywhere but at -100 and in the first column."""
    first_T = torch.arange(labels_BT.shape[1], device=labels_BT.device) == 0
    return (labels_BT != IGNORE_LABEL) & ~first_T


def token_nll(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return -log p of every label [B,T], predicted from the token before it; 0 where none is.

    In float32 (float64 for float64 logits). Can be differentiated twice, and forwards.
    """
    loss = AnswerNLL(labels_BT)
    logits_AV = logits_BTV[loss.row_A, loss.position_A].to(exact_dtype(logits_BTV.dtype))
    nll_A = loss(logits_AV, slice(0, len(logits_AV)))
    zeros_BT = nll_A.new_zeros(labels_BT.shape)
    return zeros_BT.index_put((loss.row_A, loss.position_A + 1), nll_A)


def weighted_nll(nll_BT: Tensor, weights_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean over documents of sum_i m_i w_i l_i / (sum_i m_i w_i + 1e-6).

    m is 1 where a label bears loss. Source: TAALM's token weighted loss, with the normalisation of
    its published code.
    """
    weights_BT = torch.where(counted(labels_BT), weights_BT, 0.0)
    sums_B = (weights_BT * nll_BT).sum(dim=1)
    return (sums_B / (weights_BT.sum(dim=1) + WEIGHT_EPSILON)).mean()


def object_nll(nll_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean over rows of the mean NLL of a row's labels, of which each row has some."""
    mask_BT = counted(labels_BT)
    return ((nll_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1)).mean()


def weights_entropy(weights_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean over documents of the entropy of w / sum w, over that of equal weights.

    1 is a uniform weighting, 0 all weight on one token; a document with one label counts as 1.
    """
    mask_BT = counted(labels_BT)
    weights_BT = torch.where(mask_BT, weights_BT, 0.0)
    total_B1 = weights_BT.sum(dim=1, keepdim=True)
    share_BT = weights_BT / total_B1.clamp(min=torch.finfo(total_B1.dtype).tiny)
    entropy_B = -torch.xlogy(share_BT, share_BT).sum(dim=1)
    count_B = mask_BT.sum(dim=1)
    uniform_B = count_B.clamp(min=2).to(entropy_B.dtype).log()
    return torch.where(count_B > 1, entropy_B / uniform_B, 1.0).mean()
