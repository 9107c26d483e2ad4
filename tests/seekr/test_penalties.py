"""EWC's and O-LoRA's losses on weights: their defining properties, and that cuts do not matter."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from seekr.collation import collate
from seekr.fisher import fisher_diagonal, merge_parabolas
from seekr.forward import batch_logits
from seekr.methods import EWC, OLoRA
from seekr.methods.ewc import ANCHOR, PRECISION
from seekr.methods.penalty import Penalty, Reader, Shard
from seekr.models import tiny_llama
from seekr.prompts import TokenizedRow
from tests.seekr.tiny import row

SHAPE = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_positions": 32}
ADAPTER = "model.layers.0.self_attn.q_proj.lora_A.seekr.weight"


ROWS = [row("a", [5, 9, 3, 7, 1], 2), row("b", [8, 8, 2, 1], 3), row("c", [4, 6, 11, 1], 1)]


def reader(tensors: Mapping[str, Tensor]) -> Reader:
    return lambda name, start, length: tensors[name].reshape(-1)[start : start + length]


def cut(
    name: str, values: Tensor, gradient: Tensor, *edges: int, counts: bool = True
) -> list[Shard]:
    """Cut a tensor into ranges that end at the given numbers."""
    places = [0, *edges, values.numel()]
    return [
        Shard(
            name=name,
            shape=tuple(values.shape),
            start=first,
            values=values.view(-1)[first:last],
            gradient=gradient.view(-1)[first:last],
            counts=counts,
        )
        for first, last in itertools.pairwise(places)
    ]


def added(penalty: Penalty, shards: list[Shard]) -> float:
    return float(sum(penalty.add(shard) for shard in shards))


def fisher_by_hand(model: torch.nn.Module, rows: list[TokenizedRow]) -> dict[str, Tensor]:
    """The mean over rows of squared gradients, from log-probabilities picked out token by token."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one in rows:
        batch = collate([one], pad_id=0)
        log_p = batch_logits(model, batch)[0].log_softmax(dim=-1)
        answer = range(one.prompt_length, len(one.input_ids))
        likelihood = sum(log_p[t - 1, int(one.input_ids[t])] for t in answer)
        model.zero_grad()
        likelihood.backward()  # pyright: ignore
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad**2 / len(rows)  # pyright: ignore
    return sums


def test_the_fisher_diagonal_is_the_mean_of_squared_gradients_of_whole_answers() -> None:
    model = tiny_llama(**SHAPE, seed=1).double()
    found, expected = fisher_diagonal(model, ROWS), fisher_by_hand(model, ROWS)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-15)
    assert sum(float(values.sum()) for values in found.values()) > 0


def test_ewc_is_the_quadratic_form_of_every_earlier_tasks_fisher() -> None:
    """Value (up to a constant of the weights) and gradient, for three tasks, against autograd."""
    draw = torch.Generator().manual_seed(0)
    fishers = [torch.rand(4, 3, generator=draw, dtype=torch.float64) for _ in range(3)]
    fishers[0][0] = fishers[1][0] = fishers[2][0] = 0.0  # weights that nothing depends on
    thetas = [torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(3)]
    precision, anchor = fishers[0], thetas[0]
    for fisher, theta in zip(fishers[1:], thetas[1:], strict=True):
        precision, anchor = merge_parabolas(precision, anchor, fisher, theta)

    def by_hand(weights: Tensor) -> Tensor:
        parts = [f * (weights - t) ** 2 / 2 for f, t in zip(fishers, thetas, strict=True)]
        return torch.stack(parts).sum()

    read = reader({"w" + PRECISION: precision, "w" + ANCHOR: anchor})
    constants: list[float] = []
    for _ in range(2):
        weights = torch.randn(4, 3, generator=draw, dtype=torch.float64, requires_grad=True)
        expected = by_hand(weights)
        (gradient,) = torch.autograd.grad(7.0 * expected, weights)
        found = torch.ones_like(gradient)  # what the rows' losses have left
        penalty = EWC(penalty_weight=7.0).penalty({"fisher": read})
        assert penalty is not None
        value = added(penalty, cut("w", weights.detach(), found, 5, 6))
        torch.testing.assert_close(found, 1.0 + gradient, rtol=1e-12, atol=1e-12)
        constants.append(float(expected.detach()) - value)
    assert constants[0] == pytest.approx(constants[1], rel=1e-9)
    assert not anchor.isnan().any()


def test_methods_add_no_penalty_to_the_first_task() -> None:
    assert EWC().penalty({}) is None
    assert OLoRA().penalty({}) is None


def test_orthogonality_is_the_squared_product_with_all_earlier_directions() -> None:
    draw = torch.Generator().manual_seed(3)
    earlier = [torch.randn(2, 6, generator=draw, dtype=torch.float64) for _ in range(3)]
    rows = torch.randn(2, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([(rows @ other.T).square().sum() for other in earlier]).sum()
    (gradient,) = torch.autograd.grad(0.25 * expected, rows)
    past = {f"task{n}": reader({ADAPTER: other}) for n, other in enumerate(earlier)}
    for edges in ((), (6,), (0,), (12,)):
        penalty = OLoRA(orthogonality_weight=0.25).penalty(past)
        assert penalty is not None
        found = torch.zeros_like(gradient)
        value = added(penalty, cut(ADAPTER, rows.detach(), found, *edges))
        assert value == pytest.approx(float(expected.detach()), rel=1e-12)
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_orthogonality_asks_nothing_of_the_other_half_of_an_adapter() -> None:
    values, gradient = torch.ones(3, 2), torch.zeros(3, 2)
    penalty = OLoRA().penalty({"a": reader({})})
    assert penalty is not None
    assert added(penalty, cut(ADAPTER.replace("_A", "_B"), values, gradient)) == 0.0
    assert not gradient.any()


def test_subspaces_become_orthogonal() -> None:
    draw = torch.Generator().manual_seed(4)
    earlier = torch.randn(2, 8, generator=draw)
    rows = torch.randn(2, 8, generator=draw)
    penalty = OLoRA(orthogonality_weight=0.5).penalty({"a": reader({ADAPTER: earlier})})
    assert penalty is not None
    before, length = rows @ earlier.T, rows.norm()
    for _ in range(200):
        gradient = torch.zeros_like(rows)
        added(penalty, cut(ADAPTER, rows, gradient))
        rows -= 0.05 * gradient
    assert (rows @ earlier.T).abs().max() < 1e-3 * before.abs().max()
    assert rows.norm() > 0.3 * length  # turned, not shrunk to nothing
