"""Numbers that are computed exactly enough: the dtype to compute in, and a softmax with masks."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype computed in: float64 stays, everything narrower becomes float32."""
    return torch.promote_types(dtype, torch.float32)


def masked_log_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Log-softmax over the allowed entries of the last axis, -inf elsewhere.

    Rows without any allowed entry are -inf throughout. No gradient is ever NaN: what reaches a
    masked entry from above is dropped.
    """
    blank = ~allowed.any(dim=-1, keepdim=True)
    log_rows = scores.masked_fill(~(allowed | blank), -torch.inf).log_softmax(dim=-1)
    return log_rows.masked_fill(~allowed, -torch.inf)
