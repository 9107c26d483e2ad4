"""Gram matrices against the products that they stand for, for masks of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seekr import gram
from seekr.gram import gram_plan, product_squares
from seekr.spans import key_spans

KINDS = ("causal", "left", "right", "window", "left-window", "packed", "blind")


def mask_of(kind: str, tokens: int, part: int) -> tuple[Tensor, Tensor]:
    """Return (which keys a query may look at [T,T], real tokens [T])."""
    index = torch.arange(tokens)
    real, allowed = torch.ones(tokens, dtype=torch.bool), index <= index[:, None]
    if kind.startswith("left"):
        real = index >= min(part, tokens - 1)
    if kind == "right":
        real = index < max(1, tokens - part)
    if kind.endswith("window"):
        allowed &= index > index[:, None] - part
    if kind == "packed":
        segment = (index + 2) ** 2 // (5 * part)
        allowed &= segment == segment[:, None]
    if kind == "blind":  # real queries that may look at nothing
        allowed &= index[:, None] % (part + 1) != 0
    return allowed & real, real


def draw(
    heads: int, groups: int, tokens: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.double
) -> tuple[Tensor, Tensor]:
    """Return random (per query head [H,T,D], per key/value head [G,T,D])."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, tokens, dim), (groups, tokens, dim))
    first, second = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return first, second


def squares_by_products(
    grad_HTD: Tensor, value_GTD: Tensor, allowed: Tensor, real: Tensor
) -> tuple[Tensor, Tensor]:
    value_HTD = value_GTD.double().repeat_interleave(len(grad_HTD) // len(value_GTD), dim=0)
    squares = (grad_HTD.double() @ value_HTD.mT).square()
    both = real[:, None] & real
    return (squares * (allowed & both)).sum(dim=(1, 2)), (squares * both).sum(dim=(1, 2))


def squares_by_gram(
    grad_HTD: Tensor, value_GTD: Tensor, allowed: Tensor, real: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    spans = key_spans(allowed[None, None], 1, len(real), real.device)
    plan = gram_plan(spans.first_BT[0], spans.last_BT[0], real, size)
    return product_squares(grad_HTD.transpose(0, 1), value_GTD, real, plan)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 45),
    part=st.integers(1, 20),
    size=st.integers(1, 17),
    groups=st.integers(1, 3),
    ratio=st.integers(1, 3),
    chunk=st.sampled_from([1, 500, 1 << 20]),
)
def test_gram_matrices_give_the_squares_of_all_products_for_any_mask_and_block(
    kind: str, tokens: int, part: int, size: int, groups: int, ratio: int, chunk: int
) -> None:
    allowed, real = mask_of(kind, tokens, part)
    grad, value = draw(groups * ratio, groups, tokens, 3, seed=tokens)
    expected = squares_by_products(grad, value, allowed, real)
    grad[:, ~real], value[:, ~real] = torch.nan, torch.inf  # padding may hold anything
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "CHUNK_ELEMENTS", chunk)
        found = squares_by_gram(grad, value, allowed, real, size)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_lose_no_more_than_float32_products_do(
    dtype: torch.dtype, kind: str
) -> None:
    allowed, real = mask_of(kind, 300, 40)
    grad, value = draw(4, 2, 300, 16, dtype=dtype)
    found = squares_by_gram(grad, value, allowed, real, 64)
    expected = squares_by_products(grad, value, allowed, real)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("power", [-30, 30])
def test_gradients_whose_squares_leave_float32_are_summed_all_the_same(power: int) -> None:
    allowed, real = mask_of("causal", 100, 1)
    grad, value = draw(2, 1, 100, 8, dtype=torch.float32)
    tiny_grad = grad * 10.0**power
    found = squares_by_gram(tiny_grad, value, allowed, real, 16)
    expected = squares_by_products(tiny_grad, value, allowed, real)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    nothing = squares_by_gram(grad * 0, value, allowed, real, 16)
    assert all((part == 0).all() for part in nothing)
