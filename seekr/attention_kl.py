"""KL(teacher rows || student rows) of attention maps, and its reduction to one number per row.

The only entry point through which attention is distilled, so a faster implementation has one place
to go and one reference to equal.

Shape suffixes: B batch, S selected heads, Q query rows, T tokens (keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from seekr.probes import exact_dtype

Reduction = Literal["mean", "sum"]


def attention_kl(
    teacher_rows_BSQT: Tensor,
    student_log_rows_BSQT: Tensor,
    valid: Tensor,
    *,
    epsilon: float = 0.0,
) -> Tensor:
    """KL(teacher || student) per attention row, the summand of equation (12).

    Args:
        teacher_rows_BSQT: Probabilities, 0 at masked keys. No gradient flows into them.
        student_log_rows_BSQT: Log-probabilities, -inf at masked keys (`RowProbe.log_rows`).
        valid: [B,Q] or [B,S,Q], False where there is no teacher row; such rows are 0.
        epsilon: 0 for the paper's KL. The official code uses log(student + 1e-8), which leaves the
            teacher's own logarithm alone and bounds the loss where the student is near 0.

    Returns:
        [B,S,Q] in float32, or float64 for float64 input. 0 * log 0 is 0. Infinite where the student
        cannot see a key that the teacher looked at (with epsilon 0).
    """
    dtype = exact_dtype(student_log_rows_BSQT.dtype)
    teacher = teacher_rows_BSQT.detach().to(dtype)
    student = student_log_rows_BSQT.to(dtype)
    if epsilon > 0:
        student = (student.exp() + epsilon).log()
    counted = (teacher > 0) & _valid_BSQ(valid)[..., None]
    teacher = teacher.masked_fill(~counted, 1.0)
    student = student.masked_fill(~counted, 0.0)
    return (teacher * (teacher.log() - student)).masked_fill(~counted, 0.0).sum(dim=-1)


def reduce_attention_kl(
    kl_by_layer: Mapping[int, Tensor],
    valid_by_layer: Mapping[int, Tensor],
    reduction: Reduction = "mean",
) -> Tensor:
    """Reduce per-row KL to one number per row of the batch.

    Args:
        kl_by_layer: [B,S,Q] per layer.
        valid_by_layer: [B,Q] or [B,S,Q] per layer: which of them are a batch row's own. Rows of a
            batch may have different heads (selections frozen per task).
        reduction: "sum" over heads and query rows, equation (12); "mean" as the official code: over
            heads and query rows of a layer, then over layers. lambda2 = 1e2..1e3 goes with "mean".
            Each batch row averages over its own heads, query rows and layers only.

    Returns:
        [B]; 0 for a batch row without any valid entry.
    """
    if not kl_by_layer:
        raise ValueError("no attention layer to reduce; distil at least one head")
    totals: list[Tensor] = []
    counts: list[Tensor] = []
    for layer, kl_BSQ in kl_by_layer.items():
        valid_BSQ = _valid_BSQ(valid_by_layer[layer]).to(kl_BSQ.device).expand_as(kl_BSQ)
        totals.append(kl_BSQ.masked_fill(~valid_BSQ, 0.0).sum(dim=(1, 2)))
        counts.append(valid_BSQ.sum(dim=(1, 2)))
    total_LB, count_LB = torch.stack(totals), torch.stack(counts)
    if reduction == "sum":
        return total_LB.sum(dim=0)
    if reduction == "mean":
        layers_B = (count_LB > 0).sum(dim=0).clamp(min=1)
        return (total_LB / count_LB.clamp(min=1)).sum(dim=0) / layers_B
    raise ValueError(f"attention KL reduction {reduction!r} is unknown; use 'mean' or 'sum'")


def _valid_BSQ(valid: Tensor) -> Tensor:
    """Give [B,Q] a head axis; [B,S,Q] stays."""
    return valid[:, None, :] if valid.dim() == 2 else valid
