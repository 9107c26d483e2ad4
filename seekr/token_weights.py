"""What tokens count in a loss, as a property of their row.

Only relations matter (TAALM's normalised loss): a row's weights are scaled so that the mean over its
answer's tokens is 1. So a row counts as much as it has tokens, whatever its weights, and equal weights
give the plain loss. That differs from a mean over documents, in which a short one counts as much as a
long one: it is how all losses here are summed.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def relative_weights(values: NDArray[np.float32], prompt_length: int) -> NDArray[np.float32]:
    """Return a row's weights with mean 1 over its answer, 0 in its prompt.

    Args:
        values: [tokens], 0 or more. Where the answer has none above 0 it counts for nothing.
    """
    found = np.zeros(len(values), dtype=np.float64)
    answer = values[prompt_length:].astype(np.float64)
    total = answer.sum()
    if total > 0:
        found[prompt_length:] = answer * (len(answer) / total)
    return found.astype(np.float32)


def relative_weights_of(values_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the same for a batch of rows: mean 1 over each row's labels [B,T] bool, 0 elsewhere."""
    values_BT = values_BT * labels_BT
    total_B1 = values_BT.sum(dim=1, keepdim=True)
    count_B1 = labels_BT.sum(dim=1, keepdim=True)
    return values_BT * (count_B1 / total_B1.where(total_B1 > 0, 1.0))
