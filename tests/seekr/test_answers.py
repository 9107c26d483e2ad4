"""Losses from hidden states, in chunks, against the same losses on whole logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from seekr.answers import HiddenStates, PositionLoss, WholeLogits, has_plain_head, reading_head
from seekr.attention import inner_model
from seekr.batch_targets import BatchTargets
from seekr.errors import DataError, UnsupportedModel
from seekr.losses import AnswerNLL, LogitKL, LogitMSE, answer_positions
from seekr.sparse_rows import keep_largest
from tests.seekr import tiny

DOUBLE = torch.float64


def labels_of(shape: tuple[int, int], vocab: int, share: float, seed: int) -> Tensor:
    """Return labels [B,T] of which about `share` bear a loss, the first column none."""
    generator = torch.Generator().manual_seed(seed)
    labels_BT = torch.randint(vocab, shape, generator=generator)
    labels_BT[torch.rand(shape, generator=generator) >= share] = -100
    labels_BT[:, 0] = -100
    return labels_BT


def targets_for(
    labels_BT: Tensor, vocab: int, *, shift: bool = True, keep: int | None = None
) -> BatchTargets:
    """Return a random teacher's logits, or its largest probabilities, at the answer positions."""
    row_A, position_A = answer_positions(labels_BT, shift=shift)
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(len(row_A), vocab, generator=generator, dtype=DOUBLE) * 2
    possible = torch.full((len(row_A),), vocab)
    return BatchTargets(
        heads_by_layer={},
        positions_BQ=torch.zeros(len(labels_BT), 0, dtype=torch.int64),
        attention={},
        valid={},
        logits=logits if keep is None else keep_largest(logits.softmax(dim=-1), possible, keep),
        logit_row_A=row_A,
        logit_position_A=position_A,
    )


def losses_for(labels_BT: Tensor, vocab: int) -> tuple[PositionLoss, ...]:
    """Return every kind of loss, at both kinds of positions, so that some share theirs."""
    return (
        AnswerNLL(labels_BT),
        LogitKL(targets_for(labels_BT, vocab)),
        LogitMSE(targets_for(labels_BT, vocab, shift=False)),
        LogitKL(targets_for(labels_BT, vocab, keep=2)),
        LogitKL(targets_for(labels_BT, vocab, shift=False, keep=1)),
    )


def head_of(
    shape: tuple[int, int],
    width: int,
    vocab: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = DOUBLE,
) -> list[Tensor]:
    """Return random hidden states [B,T,H], weight [V,H] and, if wanted, bias [V], to be learnt."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(*shape, width), (vocab, width)] + ([(vocab,)] if bias else [])
    return [
        torch.randn(*size, generator=generator, dtype=DOUBLE).to(dtype).requires_grad_()
        for size in shapes
    ]


def whole(hidden_BTH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> WholeLogits:
    return WholeLogits(functional.linear(hidden_BTH, weight_VH, bias_V))


def weighted(sums: tuple[Tensor, ...]) -> Tensor:
    """Return a total in which every loss and every batch row has another weight."""
    sums_KB = torch.stack(sums)
    weights = torch.arange(1, sums_KB.numel() + 1, dtype=sums_KB.dtype)
    return (sums_KB.flatten() * weights / len(weights)).sum()


def compare(
    tensors: list[Tensor], losses: tuple[PositionLoss, ...], chunk_elements: int, tolerance: float
) -> None:
    """Check sums and gradients of hidden states in chunks against those of whole logits."""
    chunked = HiddenStates(*tensors, chunk_elements=chunk_elements).sums(*losses)
    expected = whole(*tensors).sums(*losses)
    for found_B, wanted_B in zip(chunked, expected, strict=True):
        assert found_B.dtype == wanted_B.dtype
        torch.testing.assert_close(found_B, wanted_B, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(weighted(chunked), tensors)
    wanted = torch.autograd.grad(weighted(expected), tensors)
    for tensor, found_grad, wanted_grad in zip(tensors, found, wanted, strict=True):
        assert found_grad.dtype == tensor.dtype
        scale = max(1.0, float(wanted_grad.abs().max()))
        torch.testing.assert_close(found_grad, wanted_grad, rtol=0, atol=tolerance * scale)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 7)),
    width=st.integers(1, 5),
    vocab=st.integers(2, 11),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    chunk_elements=st.integers(1, 90),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_sums_and_gradients_do_not_depend_on_the_chunks(
    shape: tuple[int, int],
    width: int,
    vocab: int,
    share: float,
    chunk_elements: int,
    bias: bool,
    seed: int,
) -> None:
    losses = losses_for(labels_of(shape, vocab, share, seed), vocab)
    compare(head_of(shape, width, vocab, bias=bias), losses, chunk_elements, 1e-10)


def test_float32_is_computed_in_float32() -> None:
    losses = losses_for(labels_of((2, 9), 13, 0.5, 0), 13)
    compare(head_of((2, 9), 6, 13, dtype=torch.float32), losses, 40, 3e-6)


def test_bfloat16_weights_give_float32_losses_and_bfloat16_gradients() -> None:
    losses = losses_for(labels_of((2, 9), 13, 0.5, 0), 13)
    tensors = head_of((2, 9), 6, 13, dtype=torch.bfloat16)
    assert all(sum_B.dtype == torch.float32 for sum_B in HiddenStates(*tensors).sums(*losses))
    compare(tensors, losses, 40, 2e-2)


def test_a_bfloat16_gradient_is_summed_over_chunks_in_float32() -> None:
    positions = 600  # as many equal terms would stop to count at the 256th in bfloat16
    labels_BT = torch.tensor([[-100] + [1] * positions])
    hidden_BTH = torch.ones(1, positions + 1, 2, dtype=torch.bfloat16)
    weight_VH = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    answers = HiddenStates(hidden_BTH, weight_VH, chunk_elements=3)
    answers.sums(AnswerNLL(labels_BT))[0].sum().backward()
    expected = torch.tensor([[1 / 3], [-2 / 3], [1 / 3]]).expand(3, 2) * positions
    torch.testing.assert_close(weight_VH.grad.float(), expected, rtol=2**-7, atol=0)


def test_under_autocast_products_are_in_its_dtype_and_losses_in_float32() -> None:
    losses = losses_for(labels_of((2, 9), 13, 0.5, 0), 13)
    tensors = head_of((2, 9), 6, 13, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = HiddenStates(*tensors, chunk_elements=40).sums(*losses)
        expected = whole(*tensors).sums(*losses)
    exact = whole(*tensors).sums(*losses)
    for found_B, wanted_B, exact_B in zip(chunked, expected, exact, strict=True):
        assert found_B.dtype == torch.float32
        torch.testing.assert_close(found_B, wanted_B, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found_B, exact_B, rtol=1e-5, atol=1e-5)
    # Backward runs outside, as it does in training; the products are in bfloat16 there too.
    found = torch.autograd.grad(weighted(chunked), tensors)
    wanted = torch.autograd.grad(weighted(expected), tensors)
    for found_grad, wanted_grad in zip(found, wanted, strict=True):
        assert found_grad.dtype == torch.float32
        scale = float(wanted_grad.abs().max())
        torch.testing.assert_close(found_grad, wanted_grad, rtol=0, atol=2e-2 * scale)


def test_float64_stays_under_autocast() -> None:
    losses = losses_for(labels_of((2, 9), 13, 0.5, 0), 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(head_of((2, 9), 6, 13), losses, 40, 1e-10)


@pytest.mark.parametrize("learnt", [0, 1, 2])
def test_only_what_is_learnt_gets_a_gradient(learnt: int) -> None:
    losses = losses_for(labels_of((2, 6), 7, 0.5, 0), 7)
    tensors = [tensor.detach() for tensor in head_of((2, 6), 4, 7)]
    tensors[learnt].requires_grad_()
    weighted(HiddenStates(*tensors, chunk_elements=20).sums(*losses)).backward()
    (expected,) = torch.autograd.grad(weighted(whole(*tensors).sums(*losses)), tensors[learnt])
    torch.testing.assert_close(tensors[learnt].grad, expected, rtol=1e-10, atol=1e-10)
    assert [tensor.grad is None for tensor in tensors] == [at != learnt for at in range(3)]


def test_without_positions_sums_are_zero_and_everything_still_has_a_gradient() -> None:
    labels_BT = torch.full((2, 5), -100)
    tensors = head_of((2, 5), 4, 7)
    sums = HiddenStates(*tensors).sums(*losses_for(labels_BT, 7))
    assert all(sum_B.tolist() == [0.0, 0.0] for sum_B in sums)
    weighted(sums).backward()
    for tensor in tensors:
        assert tensor.grad is not None and not tensor.grad.any()


def test_the_gradient_is_that_of_the_values() -> None:
    losses = losses_for(labels_of((2, 4), 5, 0.6, 1), 5)
    tensors = head_of((2, 4), 3, 5)

    def sums(*given: Tensor) -> tuple[Tensor, ...]:
        return HiddenStates(*given, chunk_elements=12).sums(*losses)

    assert torch.autograd.gradcheck(sums, tensors)


def test_a_gradient_may_be_asked_for_more_than_once() -> None:
    losses = losses_for(labels_of((2, 4), 5, 0.6, 1), 5)
    tensors = head_of((2, 4), 3, 5)
    total = weighted(HiddenStates(*tensors, chunk_elements=12).sums(*losses))
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    second = torch.autograd.grad(total, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_tensor_is_larger_than_a_chunk_or_a_gradient_of_weights() -> None:
    vocab, width, shape = 1000, 4, (2, 40)
    labels_BT = labels_of(shape, vocab, 1.0, 0)
    losses = AnswerNLL(labels_BT), LogitKL(targets_for(labels_BT, vocab, keep=3))
    tensors = head_of(shape, width, vocab)
    most = {}
    for name, answers in (
        ("chunked", lambda: HiddenStates(*tensors, chunk_elements=8 * vocab)),
        ("whole", lambda: whole(*tensors)),
    ):
        with Largest() as seen:
            weighted(answers().sums(*losses)).backward()
        most[name] = seen.elements
    assert most == {"chunked": 8 * vocab, "whole": 2 * 40 * vocab}


def test_what_is_kept_for_backward_is_the_parameter_itself_and_one_row_per_position() -> None:
    labels_BT = labels_of((2, 6), 7, 0.5, 0)
    hidden_BTH, weight_VH = head_of((2, 6), 4, 7, bias=False)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        HiddenStates(hidden_BTH, weight_VH).sums(*losses_for(labels_BT, 7)[:2])
    assert any(tensor is weight_VH for tensor in kept)
    matrices = [tensor.shape for tensor in kept if tensor is not weight_VH and tensor.dim() > 1]
    assert matrices == [(int((labels_BT != -100).sum()), 4)]


def test_values_of_a_parameter_that_are_put_back_before_backward_are_used() -> None:
    losses = losses_for(labels_of((2, 6), 7, 0.5, 0), 7)
    tensors = head_of((2, 6), 4, 7, bias=False)
    expected = torch.autograd.grad(weighted(whole(*tensors).sums(*losses)), tensors)
    total = weighted(HiddenStates(*tensors, chunk_elements=20).sums(*losses))
    values = tensors[1].data
    tensors[1].data = torch.empty(0, dtype=DOUBLE)  # as ZeRO-3 leaves it between the two
    tensors[1].data = values.clone()
    for found, wanted in zip(torch.autograd.grad(total, tensors), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_sizes_are_those_of_the_batch_and_the_vocabulary() -> None:
    tensors = head_of((2, 6), 4, 7)
    for answers in (HiddenStates(*tensors), whole(*tensors)):
        assert (answers.num_rows, answers.vocab_size) == (2, 7)


def test_another_vocabulary_is_refused_from_hidden_states_too() -> None:
    labels_BT = labels_of((2, 6), 7, 0.5, 0)
    answers = HiddenStates(*head_of((2, 6), 4, 6))
    with pytest.raises(DataError, match="7 entries and the student 6"):
        answers.sums(LogitKL(targets_for(labels_BT, 7)))
    with pytest.raises(DataError, match="must share a vocabulary"):
        answers.sums(LogitKL(targets_for(labels_BT, 7, keep=7)))


# --- the model's own head -------------------------------------------------------------------------


def loss_of(model: nn.Module, chunk_elements: int | None) -> Tensor:
    """Return a loss of `model` on a batch: in chunks, or with None from the logits it gives out."""
    batch = tiny.batch("right")
    losses = AnswerNLL(batch.labels_BT), LogitKL(targets_for(batch.labels_BT, tiny.VOCAB, keep=3))
    given = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
    if chunk_elements is None:
        return weighted(WholeLogits(model(**given, use_cache=False).logits).sums(*losses))

    def read(hidden_BTH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        answers = HiddenStates(hidden_BTH, weight_VH, bias_V, chunk_elements=chunk_elements)
        return weighted(answers.sums(*losses))

    with reading_head(model, read):
        return model(**given, use_cache=False).logits


def gradients(model: nn.Module, chunk_elements: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and the gradient of every parameter that is learnt."""
    model.zero_grad()
    loss = loss_of(model, chunk_elements)
    loss.backward()
    learnt = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = {}
    for name, parameter in learnt.items():
        assert parameter.grad is not None, name
        grad: Any = parameter.grad
        found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return loss.detach(), found


def check_same(model: nn.Module, tolerance: float) -> None:
    stock, expected = gradients(model, None)
    loss, found = gradients(model, 4 * tiny.VOCAB)
    torch.testing.assert_close(loss, stock, rtol=tolerance, atol=tolerance)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_model_read_at_its_head_has_the_loss_and_gradients_of_its_logits(name: str) -> None:
    model = tiny.build(name)
    assert has_plain_head(model)
    check_same(model, 1e-10)


def test_gradients_of_tied_embeddings_are_those_of_both_uses() -> None:
    config = tiny.config("llama2-gqa")
    config.tie_word_embeddings = True
    model = tiny.to_exact(AutoModelForCausalLM.from_config(config))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_same(model, 1e-10)


def test_a_head_with_a_bias_is_read_with_it() -> None:
    model = tiny.build("llama2-gqa")
    model.lm_head = nn.Linear(16, tiny.VOCAB, dtype=DOUBLE)
    assert has_plain_head(model)
    check_same(model, 1e-10)


def test_a_peft_model_is_read_and_its_frozen_head_gets_no_gradient() -> None:
    torch.manual_seed(0)
    adapters = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.build("llama2-gqa"), adapters).double()
    assert has_plain_head(model)
    check_same(model, 1e-10)
    assert inner_model(model).lm_head.weight.grad is None


def test_a_head_with_adapters_is_not_plain() -> None:
    adapters = LoraConfig(target_modules=["lm_head"])
    assert not has_plain_head(get_peft_model(tiny.build("llama2-gqa"), adapters))


def test_models_in_ddp_and_fsdp2_are_read_where_their_head_is_whole(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        check_same(DistributedDataParallel(tiny.build("llama2-gqa")), 1e-10)
        mesh = distributed.init_device_mesh("cpu", (1,))
        for head_too in (False, True):
            sharded = tiny.build("llama2-gqa")
            for part in [*sharded.model.layers, *([sharded.lm_head] if head_too else [])]:
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
            fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
            assert has_plain_head(sharded)
            check_same(sharded, 1e-10)
    finally:
        distributed.destroy_process_group()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = [set(module.__dict__) for module in model.modules()]
    expected = loss_of(model, None)
    yield
    assert [set(module.__dict__) for module in model.modules()] == before
    assert torch.equal(loss_of(model, None), expected)


def test_a_model_is_as_before_after_the_block_and_after_an_exception() -> None:
    model = tiny.build("llama2-gqa")
    with unchanged(model):
        loss_of(model, 100)

    def fails(*_: Any) -> Tensor:
        raise ValueError("no reading today")

    with (
        unchanged(model),
        pytest.raises(ValueError, match="no reading"),
        reading_head(model, fails),
    ):
        model(tiny.batch().input_ids_BT)


def test_two_readings_at_once_are_refused_and_the_first_stays() -> None:
    model = tiny.build("llama2-gqa")
    ids_BT = tiny.batch().input_ids_BT
    with reading_head(model, lambda hidden_BTH, *_: hidden_BTH):
        with (
            pytest.raises(RuntimeError, match="replaced already"),
            reading_head(model, lambda hidden_BTH, *_: hidden_BTH),
        ):
            pass
        assert not has_plain_head(model)
        assert model(ids_BT).logits.shape == (*ids_BT.shape, 16)


def test_a_model_without_a_head_is_refused() -> None:
    model = tiny.build("llama2-gqa").model
    assert not has_plain_head(model)
    with (
        pytest.raises(UnsupportedModel, match="LlamaModel has no output embeddings"),
        reading_head(model, lambda hidden_BTH, *_: hidden_BTH),
    ):
        pass


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def family(name: str, **changes: Any) -> nn.Module:
    """Return a model of a family on the meta device."""
    config = AutoConfig.for_model(name, **SIZES | changes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


PLAIN = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "olmo2", "glm", "gemma")


@pytest.mark.parametrize("name", [*PLAIN, "qwen3_moe", "deepseek_v3", "gemma3_text"])
def test_families_that_give_out_the_product_have_a_plain_head(name: str) -> None:
    assert has_plain_head(family(name))


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "cohere2", "hyperclovax"])
def test_families_that_cap_or_scale_logits_have_none(name: str) -> None:
    assert not has_plain_head(family(name))


def test_gemma_has_a_plain_head_exactly_without_its_cap() -> None:
    assert has_plain_head(family("gemma2", final_logit_softcapping=None))
    assert not has_plain_head(family("gemma3_text", final_logit_softcapping=20.0))


def test_a_config_that_names_a_scale_is_believed_whatever_the_code_says() -> None:
    model = family("llama", logits_scaling=2.0)
    assert not has_plain_head(model)
    assert has_plain_head(family("llama", logits_scaling=1))


def test_a_head_of_another_class_is_not_plain() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = tiny.build("llama2-gqa")
    model.lm_head = Scaled(16, tiny.VOCAB, bias=False)
    assert not has_plain_head(model)


def test_code_that_does_more_with_logits_or_cannot_be_read_is_not_plain() -> None:
    stock = type(tiny.build("llama2-gqa"))

    class Doubling(stock):
        def forward(self, hidden: Tensor) -> Any:
            logits = self.lm_head(hidden)
            logits += logits
            return dict(logits=logits)

    class Delegating(stock):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Other(stock):
        def forward(self, hidden: Tensor) -> Any:
            logits = self.model(hidden)
            return dict(logits=logits)

    class Plain(stock):
        def forward(self, hidden: Tensor) -> Any:
            logits = self.lm_head(hidden)
            return dict(logits=logits)

    unread: dict[str, Any] = {}
    exec("def forward(self, hidden):\n    return self.lm_head(hidden)", unread)
    Unread = type("Unread", (stock,), {"forward": unread["forward"]})
    config = tiny.config("llama2-gqa")
    kinds = (Doubling, Delegating, Other, Unread, Plain)
    assert [has_plain_head(kind(config)) for kind in kinds] == [False, False, False, False, True]
