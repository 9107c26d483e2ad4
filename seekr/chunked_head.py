"""Losses on the product of hidden states and the head's weights, never whole: chunk after chunk.

Forward forms the logits of some positions, takes the losses' values and drops the logits. Backward
forms them again, asks the losses for their gradient in the logits, and multiplies that out at once.
The head is multiplied twice instead of once, and one chunk of logits exists instead of all.

Weights may be sharded, or swapped for others in between: what is kept between forward and backward
is the parameter itself, and nothing made from it. A gradient of weights is summed over chunks in
float32 and rounded once.

Shape suffixes: A positions of all chunks, C those of one, V vocab, H hidden width, K losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seekr.softmax import exact_dtype

if TYPE_CHECKING:
    from seekr.answers import PositionLoss


def chunked_losses(
    hidden_AH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    losses: Sequence[PositionLoss],
    chunk: int,
) -> Tensor:
    """Return the values [K,A] of losses on the logits `hidden_AH @ weight_VH.T + bias_V`.

    Under autocast the products are formed in its dtype, as `F.linear` would, and losses in float32.

    Args:
        hidden_AH: Hidden states at the positions of the losses, which all have the same.
        weight_VH: The parameter itself, never a view or a cast of it.
        bias_V: Likewise.
        losses: At least one.
        chunk: Positions whose logits exist at a time.
    """
    values_KA = _ChunkedLosses.apply(hidden_AH, weight_VH, bias_V, tuple(losses), chunk)
    return cast(Tensor, values_KA)


class _ChunkedLosses(torch.autograd.Function):
    """`chunked_losses` and its gradients."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_AH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        losses: tuple[PositionLoss, ...],
        chunk: int,
    ) -> Tensor:
        # The parameters themselves: sharding swaps their values between forward and backward.
        ctx.save_for_backward(hidden_AH, weight_VH, bias_V)
        device = hidden_AH.device.type
        ctx.losses, ctx.chunk, ctx.dtype = losses, chunk, _autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            logits_of = _Logits(hidden_AH, weight_VH, bias_V, ctx.dtype)

            def values_KC(part: slice) -> Tensor:
                logits_CV = logits_of(part)
                return torch.stack([loss(logits_CV, part) for loss in losses])

            return torch.cat([values_KC(part) for part in _parts(len(hidden_AH), chunk)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_KA: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_AH, weight_VH, bias_V = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        hidden_grad_AH = torch.zeros_like(hidden_AH) if need_hidden else None
        weight_grad_VH = _exact_zeros(weight_VH) if need_weight else None
        bias_grad_V = _exact_zeros(bias_V) if need_bias else None
        with torch.autocast(hidden_AH.device.type, enabled=False):
            logits_of = _Logits(hidden_AH, weight_VH, bias_V, ctx.dtype)

            def add(part: slice) -> None:
                slope_CV = _slope(ctx.losses, logits_of(part), part, grad_KA[:, part])
                slope_CV = slope_CV.to(logits_of.weight_VH.dtype)
                if hidden_grad_AH is not None:
                    hidden_grad_AH[part] = slope_CV @ logits_of.weight_VH
                if weight_grad_VH is not None:
                    _add_product(weight_grad_VH, slope_CV.T, logits_of.hidden(part))
                if bias_grad_V is not None:
                    bias_grad_V.add_(slope_CV.sum(dim=0, dtype=bias_grad_V.dtype))

            for part in _parts(len(hidden_AH), ctx.chunk):
                add(part)
        weight_grad = None if weight_grad_VH is None else weight_grad_VH.to(weight_VH.dtype)
        bias_grad = None if bias_grad_V is None else bias_grad_V.to(bias_V.dtype)
        return hidden_grad_AH, weight_grad, bias_grad, None, None


class _Logits:
    """The head's product at some positions; lives within one forward or backward pass."""

    def __init__(
        self,
        hidden_AH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._hidden_AH, self._dtype = hidden_AH, dtype
        self.weight_VH = self._cast(weight_VH)
        self._bias_V = None if bias_V is None else self._cast(bias_V)

    def hidden(self, part: slice) -> Tensor:
        return self._cast(self._hidden_AH[part])

    def __call__(self, part: slice) -> Tensor:
        """Return logits [C,V] in float32 or better; nothing narrower outlives the call."""
        hidden_CH, weight_HV = self.hidden(part), self.weight_VH.T
        if self._bias_V is None:
            logits_CV = hidden_CH @ weight_HV
        else:
            logits_CV = torch.addmm(self._bias_V, hidden_CH, weight_HV)
        return logits_CV.to(exact_dtype(logits_CV.dtype))

    def _cast(self, tensor: Tensor) -> Tensor:
        """Cast as autocast does: float64 never, and nothing where it is off."""
        if self._dtype is None or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(self._dtype)


def _parts(length: int, chunk: int) -> list[slice]:
    """Cut 0 .. length. Without positions there is one empty part, so losses are called once."""
    starts = range(0, length, chunk) or (0,)
    return [slice(start, min(start + chunk, length)) for start in starts]


def _slope(
    losses: Sequence[PositionLoss], logits_CV: Tensor, part: slice, grad_KC: Tensor
) -> Tensor:
    """Return the gradient [C,V] in the logits, one loss after the other to hold one's at a time."""
    logits_CV = logits_CV.detach().requires_grad_()
    slopes_CV: Tensor | None = None
    for loss, grad_C in zip(losses, grad_KC, strict=True):
        with torch.enable_grad():
            values_C = loss(logits_CV, part)
        (slope_CV,) = torch.autograd.grad(values_C, logits_CV, grad_C)
        slopes_CV = slope_CV if slopes_CV is None else slopes_CV + slope_CV
    assert slopes_CV is not None
    return slopes_CV


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _exact_zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=exact_dtype(parameter.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right`, without a copy of its size where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
