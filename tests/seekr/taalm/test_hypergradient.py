"""The gradient of phi: unrolled, by one directional derivative, and by finite differences of loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from seekr.attention import evaluation_mode
from seekr.collation import Side
from seekr.errors import UnsupportedModel
from seekr.taalm.episodes import MetaItem, collate_items
from seekr.taalm.hypergradient import InnerLoop, hypergradient
from seekr.taalm.inner import AdamW, Tensors, differentiable_attention
from seekr.taalm.network import TrainAttention
from tests.seekr import tiny
from tests.seekr.taalm import taalm_reference as reference
from tests.seekr.taalm.taalm_problem import learner, random_items, train_attention, trained

SIDES: tuple[Side, Side] = ("right", "left")
OPTIMIZERS = {
    "damped": AdamW(learning_rate=0.02, damping=1e-8, weight_decay=0.1),
    "undamped": AdamW(learning_rate=0.02, weight_decay=0.1),
    "like SGD": AdamW(learning_rate=20.0, damping=1.0, weight_decay=0.0),
}


def settings(optimizer: str, dummy_steps: int, backend: Any = "unrolled") -> InnerLoop:
    return InnerLoop(
        optimizer=OPTIMIZERS[optimizer],
        dummy_steps=dummy_steps,
        backend=backend,
        difference=1e-5,
    )


def found(
    theta: Any, phi: TrainAttention, items: list[MetaItem], how: InnerLoop, side: Side = "right"
) -> Tensors:
    grads, _ = hypergradient(theta, phi, collate_items(items, tiny.PAD_ID, side), how)
    return grads


def flat(grads: Tensors) -> torch.Tensor:
    return torch.cat([g.flatten() for g in grads.values()])


def assert_close(one: Tensors, other: Tensors, tolerance: float) -> None:
    assert one.keys() == other.keys()
    scale = float(flat(other).norm())
    assert scale > 0
    assert float((flat(one) - flat(other)).norm()) <= tolerance * scale


def slope_by_differences(
    theta: Any, phi: TrainAttention, items: list[MetaItem], how: InnerLoop, along: Tensors
) -> float:
    """The outer loss's slope along a direction of phi; the dummy steps' weights stay as they are."""
    rows = [item.document for item in items]
    ends: list[float] = []
    with torch.no_grad():
        kept = [reference.weights(phi, row) for row in rows]
        h = 1e-6
        for sign in (1, -1):
            for name, p in trained(phi).items():
                p.add_(along[name], alpha=sign * h)
            moved = [reference.weights(phi, row) for row in rows]
            with torch.enable_grad():
                ends.append(reference.outer_loss(theta, items, kept, moved, how))
            for name, p in trained(phi).items():
                p.sub_(along[name], alpha=sign * h)
    return (ends[0] - ends[1]) / (2 * h)


@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize(
    ("optimizer", "dummy_steps"),
    [("damped", 0), ("damped", 2), ("undamped", 2), ("like SGD", 0), ("like SGD", 2)],
)
def test_unrolled_is_the_slope_of_the_loops(
    optimizer: str, dummy_steps: int, lora: bool, documents: int
) -> None:
    theta, phi = learner(lora, spread=0.3), train_attention(lora)
    items, how = random_items(documents), settings(optimizer, dummy_steps)
    grads = found(theta, phi, items, how)
    generator = torch.Generator().manual_seed(1)
    draw = {n: torch.randn(g.shape, generator=generator).double() for n, g in grads.items()}
    along = {n: 0.1 * part + grads[n] / flat(grads).norm() for n, part in draw.items()}
    slope = sum(float((grads[name] * part).sum()) for name, part in along.items())
    expected = slope_by_differences(theta, phi, items, how, along)
    assert slope == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("dummy_steps", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_directional_derivative_gives_the_unrolled_gradient(
    optimizer: str, dummy_steps: int, lora: bool, documents: int
) -> None:
    theta, phi = learner(lora, spread=0.3), train_attention(lora)
    items = random_items(documents)
    unrolled = found(theta, phi, items, settings(optimizer, dummy_steps))
    forward = found(theta, phi, items, settings(optimizer, dummy_steps, "jvp"))
    assert_close(forward, unrolled, 1e-9)
    if optimizer != "undamped":  # the numbers of v differ by many powers of 10 there
        central = found(theta, phi, items, settings(optimizer, dummy_steps, "central"))
        assert_close(central, unrolled, 1e-5)


@pytest.mark.parametrize("backend", ["unrolled", "jvp"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_adapters_that_start_at_zero_give_finite_gradients(optimizer: str, backend: str) -> None:
    theta, phi = learner(lora=True), train_attention()
    grads = found(theta, phi, random_items(1), settings(optimizer, 0, backend))
    assert torch.isfinite(flat(grads)).all()
    if optimizer != "undamped":
        assert flat(grads).norm() > 0


@pytest.mark.parametrize(
    ("attention", "backend", "tolerance"),
    [
        ("seekr", "unrolled", 1e-9),
        ("seekr", "jvp", 1e-9),
        ("seekr", "central", 1e-5),
        ("eager", "unrolled", 1e-4),  # transformers' eager softmax is float32 in any model
        ("eager", "jvp", 1e-4),
    ],
)
def test_every_attention_gives_the_same_gradient(
    attention: str, backend: str, tolerance: float
) -> None:
    phi, items = train_attention(), random_items(2)
    expected = found(learner(), phi, items, settings("damped", 1))
    grads = found(learner(attention=attention), phi, items, settings("damped", 1, backend))
    assert_close(grads, expected, tolerance)


@pytest.mark.parametrize("backend", ["unrolled", "jvp", "central"])
def test_the_side_of_padding_does_not_matter(backend: str) -> None:
    theta, phi, items = learner(), train_attention(), random_items(3)
    right, left = (found(theta, phi, items, settings("damped", 1, backend), s) for s in SIDES)
    assert_close(left, right, 1e-5 if backend == "central" else 1e-9)


@pytest.mark.parametrize("backend", ["unrolled", "jvp", "central"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_both_models_are_as_before(lora: bool, backend: str) -> None:
    theta, phi = learner(lora, spread=0.3), train_attention(lora)
    theta.train()
    models: tuple[torch.nn.Module, ...] = (theta, phi)
    before = [{n: v.clone() for n, v in model.state_dict().items()} for model in models]
    owners = [dict(model.named_parameters()) for model in models]
    found(theta, phi, random_items(2), settings("damped", 2, backend))
    for model, old, parameters in zip(models, before, owners, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())
    assert theta.training and not phi.training


def test_figures_are_those_of_the_loops() -> None:
    theta, phi, items = learner(), train_attention(), random_items(2)
    how = settings("damped", 1)
    with torch.no_grad():
        weights = [reference.weights(phi, item.document) for item in items]
    expected = reference.outer_loss(theta, items, weights, weights, how)
    labels = [w[1:] for w in weights]
    entropy = [float(-(w / w.sum() * (w / w.sum()).log()).sum()) for w in labels]
    entropy = [e / float(torch.tensor(len(w)).log()) for e, w in zip(entropy, labels, strict=True)]
    for backend in ("unrolled", "jvp", "central"):
        _, seen = hypergradient(
            theta, phi, collate_items(items, tiny.PAD_ID), settings("damped", 1, backend)
        )
        assert seen.outer_nll == pytest.approx(expected, rel=1e-9)
        assert seen.entropy == pytest.approx(sum(entropy) / 2, rel=1e-5)
        assert seen.mean_weight == pytest.approx(float(torch.cat(labels).mean()), rel=1e-5)


def test_allowed_kernels_are_as_before() -> None:
    def allowed() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        return (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled())

    theta = learner()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        before = allowed()
        with pytest.raises(KeyError), differentiable_attention(theta):
            assert allowed() != before
            raise KeyError
        assert allowed() == before


def test_attention_without_a_plain_form_is_refused() -> None:
    theta: Any = learner()
    theta.config._attn_implementation_internal = "flash_attention_2"
    with (
        pytest.raises(UnsupportedModel, match="flash_attention_2"),
        differentiable_attention(theta),
    ):
        pass


def test_dropout_is_off_inside() -> None:
    theta, phi, items = learner(), train_attention(), random_items(1)
    theta.config.attention_dropout = 0.5
    with evaluation_mode(theta):
        expected = found(theta, phi, items, settings("damped", 1))
    theta.train()
    assert_close(found(theta, phi, items, settings("damped", 1)), expected, 1e-12)


def test_central_differences_suffice_in_float32() -> None:
    theta, phi, items = learner(), train_attention(), random_items(2)
    exact = found(theta, phi, items, settings("damped", 1))
    how = replace(settings("damped", 1, "central"), difference=InnerLoop().difference)
    coarse = found(theta.float(), phi.float(), items, how)
    assert_close({n: g.double() for n, g in coarse.items()}, exact, 0.01)
