"""RHO-1's choice of tokens against a loop over rows that sorts Python numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seekr.excess_loss import excess_loss_mask


def by_hand(nll: Tensor, reference: Tensor, labels: Tensor, share: float) -> Tensor:
    """Row after row, sorted by (most excess first, then place)."""
    kept = torch.zeros(nll.shape)
    for row in range(len(nll)):
        places = [t for t in range(nll.shape[1]) if labels[row, t]]
        excess = {t: float(nll[row, t]) - float(reference[row, t]) for t in places}
        number = max(1, math.floor(share * len(places) + 0.5))
        for place in sorted(places, key=lambda t: (-excess[t], t))[:number]:
            kept[row, place] = 1.0
    return kept


def problem(rows: int = 7, tokens: int = 13, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    # Few distinct values, so that there are ties.
    nll, reference = (
        torch.randint(0, 5, (rows, tokens), generator=draw).double() / 4 for _ in range(2)
    )
    labels = torch.rand(rows, tokens, generator=draw) < 0.7
    labels[0] = False  # a row without labels
    labels[1] = torch.arange(tokens) == 3  # and one with a single one
    return nll, reference, labels


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.6, 0.999, 1.0])
def test_the_tokens_with_the_highest_excess_of_each_row_are_kept(share: float) -> None:
    nll, reference, labels = problem()
    found = excess_loss_mask(nll, reference, labels, share)
    assert found.dtype == torch.float32
    assert torch.equal(found, by_hand(nll, reference, labels, share))


def test_the_highest_are_kept_and_not_the_lowest() -> None:
    """Excess 0, 3, 1, 2: of four tokens 0.6 * 4 + 1/2 rounds to two, those with 3 and 2."""
    nll = torch.tensor([[1.0, 4.0, 2.0, 2.0]])
    reference = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    kept = excess_loss_mask(nll, reference, torch.ones(1, 4, dtype=torch.bool))
    assert kept.tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_padding_is_never_kept_and_changes_nothing() -> None:
    nll, reference, labels = problem()
    expected = excess_loss_mask(nll, reference, labels)
    wide = [torch.nn.functional.pad(t, (2, 5), value=99.0) for t in (nll, reference)]
    wide[1][:, -1] = -torch.inf  # the largest excess there is
    mask = torch.nn.functional.pad(labels, (2, 5), value=False)
    found = excess_loss_mask(wide[0], wide[1], mask)
    assert torch.equal(found[:, 2:-5], expected)
    assert not found[~mask].any()


def test_a_row_keeps_the_same_tokens_beside_any_other_rows() -> None:
    nll, reference, labels = problem()
    whole = excess_loss_mask(nll, reference, labels)
    for row in range(len(nll)):
        at = slice(row, row + 1)
        assert torch.equal(excess_loss_mask(nll[at], reference[at], labels[at]), whole[at])
    turned = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    assert torch.equal(
        excess_loss_mask(nll[turned], reference[turned], labels[turned]), whole[turned]
    )


def test_equal_tokens_are_kept_from_the_left() -> None:
    even = torch.full((2, 10), 0.7)
    kept = excess_loss_mask(even, even, torch.ones(2, 10, dtype=torch.bool), 0.35)
    assert kept.tolist() == [[1.0] * 4 + [0.0] * 6] * 2


def test_no_gradient_flows_through_the_choice() -> None:
    nll, reference, labels = problem()
    assert not excess_loss_mask(nll.requires_grad_(), reference, labels).requires_grad


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        excess_loss_mask(*problem(), share)


def test_losses_without_an_order_or_of_other_shape_are_refused() -> None:
    nll, reference, labels = problem()
    labels[2, 4] = True
    nll[2, 4] = torch.nan
    with pytest.raises(ValueError, match="no number"):
        excess_loss_mask(nll, reference, labels)
    with pytest.raises(ValueError, match="one shape"):
        excess_loss_mask(nll, reference[:, 1:], labels)
