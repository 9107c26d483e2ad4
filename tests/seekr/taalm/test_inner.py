"""AdamW out of place against torch's, and parameters that are values."""

from __future__ import annotations

import copy

import pytest
import torch

from seekr.collation import collate
from seekr.errors import ConfigError
from seekr.forward import batch_logits
from seekr.models import tiny_llama
from seekr.taalm.inner import (
    AdamState,
    AdamW,
    adamw_step,
    logits_with,
    trained_parameters,
    weighted_step,
)
from tests.seekr import tiny
from tests.seekr.taalm import taalm_reference as reference
from tests.seekr.taalm.taalm_problem import learner, row

ROWS = [row([3, 4, 5, 6, 7], prompt=1), row([9, 2, 11], prompt=1)]


def test_without_damping_it_is_torchs_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=generator, dtype=torch.float64)
    own = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([own], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)
    settings = AdamW(learning_rate=0.1, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.3)
    params = {"p": start}
    state = AdamState.zeros(params)
    for _ in range(5):
        own.grad = torch.randn(7, generator=generator, dtype=torch.float64)
        theirs.step()
        params, state = adamw_step(params, {"p": own.grad}, state, settings)
        torch.testing.assert_close(params["p"], own.detach(), rtol=1e-12, atol=1e-14)
    assert state.step == 5


def test_the_first_damped_step_is_the_formula_of_the_text() -> None:
    g = torch.tensor([0.0, 1e-6, -1e-3, 2.0], dtype=torch.float64)
    params = {"p": torch.zeros(4, dtype=torch.float64)}
    settings = AdamW(learning_rate=0.1, weight_decay=0.0, eps=0.0, damping=1e-8)
    moved, _ = adamw_step(params, {"p": g}, AdamState.zeros(params), settings)
    torch.testing.assert_close(moved["p"], -0.1 * g / (g * g + 1e-5).sqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("damping", [0.0, 1e-8, 1.0])
def test_its_derivatives_are_right_twice(damping: float) -> None:
    settings = AdamW(learning_rate=0.1, weight_decay=0.1, damping=damping)
    params = {"p": torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)}
    first = {"p": torch.tensor([0.5, -0.4, 0.2], dtype=torch.float64)}
    params, state = adamw_step(params, first, AdamState.zeros(params), settings)

    def step(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return adamw_step({"p": p}, {"p": g}, state, settings)[0]["p"]

    g = torch.tensor([0.1, 0.7, -0.3], dtype=torch.float64, requires_grad=True)
    p = params["p"].requires_grad_()
    assert torch.autograd.gradcheck(step, (p, g))
    assert torch.autograd.gradgradcheck(step, (p, g))


def test_a_gradient_that_was_always_zero_moves_nothing_and_has_a_finite_derivative() -> None:
    params = {"p": torch.ones(2)}
    g = torch.zeros(2, requires_grad=True)
    settings = AdamW(weight_decay=0.0)
    moved, _ = adamw_step(params, {"p": g}, AdamState.zeros(params), settings)
    assert torch.equal(moved["p"], params["p"])
    moved["p"].sum().backward()
    assert g.grad is not None and torch.isfinite(g.grad).all()


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_a_model_with_other_parameters_computes_what_a_changed_model_computes(lora: bool) -> None:
    theta = learner(lora, spread=0.3)
    assert all((".lora_" in name) is lora for name in trained_parameters(theta))
    batch = collate(ROWS, tiny.PAD_ID)
    other = {name: 1.1 * p for name, p in trained_parameters(theta).items()}
    changed = copy.deepcopy(theta)
    with torch.no_grad():
        for name, p in changed.named_parameters():
            if name in other:
                p.copy_(other[name])
        before = batch_logits(theta, batch)
        assert torch.equal(logits_with(theta, other, batch), batch_logits(changed, batch))
        assert torch.equal(batch_logits(theta, batch), before)
        assert not torch.equal(batch_logits(changed, batch), before)


def test_tied_embeddings_move_together() -> None:
    theta = tiny_llama(vocab_size=tiny.VOCAB, hidden=16)
    batch = collate(ROWS, tiny.PAD_ID)
    other = {name: p + 0.1 for name, p in trained_parameters(theta).items()}
    assert "lm_head.weight" not in other
    changed = copy.deepcopy(theta)
    with torch.no_grad():
        for name, p in changed.named_parameters():
            p.copy_(other[name])
        torch.testing.assert_close(logits_with(theta, other, batch), batch_logits(changed, batch))


@pytest.mark.parametrize("damping", [0.0, 1e-8])
def test_weighted_steps_are_those_of_an_in_place_loop(damping: float) -> None:
    theta, settings = learner(), AdamW(learning_rate=0.01, damping=damping)
    weights = [torch.linspace(0.1, 0.9, 5).double(), torch.linspace(0.8, 0.2, 3).double()]
    changed = copy.deepcopy(theta)
    loop = reference.InPlaceAdamW(changed, settings)
    batch = collate(ROWS, tiny.PAD_ID)
    weights_BT = torch.zeros(2, 5, dtype=torch.float64)
    weights_BT[0], weights_BT[1, :3] = weights
    params = trained_parameters(theta)
    state = AdamState.zeros(params)
    for _ in range(3):
        loop.step(reference.weighted_loss(changed, ROWS, weights))
        params, state = weighted_step(theta, params, state, batch, weights_BT, settings)
    for name, p in changed.named_parameters():
        torch.testing.assert_close(params[name], p.detach(), rtol=1e-7, atol=1e-10)


def test_parameters_too_coarse_for_small_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch\.bfloat16, the first is"):
        trained_parameters(learner().bfloat16())
    with pytest.raises(ConfigError, match="nothing of LlamaForCausalLM is trained"):
        trained_parameters(learner().requires_grad_(False))


@pytest.mark.parametrize("wrong", [{"damping": -1e-8}, {"beta2": 1.0}, {"learning_rate": -1.0}])
def test_settings_outside_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AdamW(**wrong)
