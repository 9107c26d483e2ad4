"""Train-Attention as a network: its weights, its start, its files, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seekr.collation import Batch, Side, collate
from seekr.errors import ConfigError
from seekr.models import byte_tokenizer, load_tokenizer, save_model, tiny_llama
from seekr.taalm.network import SPEC, TENSORS, TrainAttention, check_same_tokenizer
from seekr.training.settings import Lora
from tests.seekr import tiny
from tests.seekr.taalm import taalm_reference as reference
from tests.seekr.taalm.taalm_problem import LORA, row, train_attention, trained

ROWS = [row([3, 4, 5, 6, 7, 8], prompt=1), row([9, 2, 11, 3], prompt=2)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    save_model(tiny_llama(hidden=16), byte_tokenizer(), folder)
    return folder


def batch(side: Side = "right") -> Batch:
    return collate(ROWS, tiny.PAD_ID, side, multiple_of=8)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@torch.no_grad()
def test_weights_are_those_of_the_loops_and_zero_elsewhere(lora: bool, side: Side) -> None:
    phi, padded = train_attention(lora), batch(side)
    weights_BT = phi(padded)
    expected = torch.zeros_like(weights_BT)
    for index, own in enumerate(ROWS):
        start, first = int(padded.start_B[index]), reference.first_label(own)
        kept = reference.weights(phi, own)[first:]
        expected[index, start + first : start + first + len(kept)] = kept
    torch.testing.assert_close(weights_BT, expected, rtol=1e-12, atol=0)
    assert float(weights_BT[weights_BT > 0].std()) > 0.05  # the problem is not uniform


@torch.no_grad()
def test_a_weight_does_not_know_what_comes_later() -> None:
    phi = train_attention()
    short, whole = (collate([row([3, 4, 5, 6, 7, 8][:n])], 0) for n in (4, 6))
    torch.testing.assert_close(phi(short)[0], phi(whole)[0, :4], rtol=1e-12, atol=0)


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "LoRA"])
@torch.no_grad()
def test_it_starts_near_equal_weights(base: Path, lora: Lora | None) -> None:
    phi = TrainAttention.start(base, lora=lora, seed=4)
    weights_BT = phi(batch())
    weights = weights_BT[weights_BT > 0]
    expected = torch.tensor(4.0).sigmoid()
    torch.testing.assert_close(weights, expected.expand_as(weights), atol=1e-3, rtol=0)
    assert weights_BT.dtype == torch.float32
    assert 0.0005 < float(phi.head.weight.std()) < 0.0015


def test_the_start_depends_on_the_seed_and_moves_no_generator(base: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, same, other = (TrainAttention.start(base, lora=LORA, seed=s) for s in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, p), q, r in zip(
        trained(one).items(), trained(same).values(), trained(other).values(), strict=True
    ):
        assert torch.equal(p, q)
        if "lora_B" not in name and "bias" not in name:
            assert not torch.equal(p, r)


def test_what_is_trained_is_all_of_it_or_adapters_and_head(base: Path) -> None:
    phi = TrainAttention.start(base)
    assert trained(phi).keys() == dict(phi.named_parameters()).keys()
    adapted = TrainAttention.start(base, lora=LORA, dtype=torch.bfloat16)
    names = set(trained(adapted))
    assert {n for n in names if ".lora_" not in n} == {"head.weight", "head.bias"}
    assert len(names) == 2 + 2 * 7 * 2  # A and B of seven layers in each of two blocks
    assert {p.dtype for p in trained(adapted).values()} == {torch.float32}
    assert adapted.body.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=3.0, targets=("q_proj",))])
@torch.no_grad()
def test_it_comes_back_from_its_files_to_the_same_bits(
    base: Path, tmp_path: Path, lora: Lora | None, dtype: torch.dtype
) -> None:
    phi = TrainAttention.start(base, lora=lora, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    for p in trained(phi).values():
        p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
    phi.save(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = TrainAttention.load(tmp_path)
    assert loaded.lora == lora and not loaded.training
    assert trained(loaded).keys() == trained(phi).keys()
    for name, value in phi.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(batch()), phi(batch()))
    check_same_tokenizer(load_tokenizer(tmp_path), load_tokenizer(base))


def test_the_body_beside_the_head_is_a_plain_model(base: Path, tmp_path: Path) -> None:
    TrainAttention.start(base, lora=LORA).save(tmp_path)
    own, files = (load_file(folder / "model.safetensors") for folder in (base, tmp_path))
    assert {f"model.{name}" for name in files} == own.keys()
    assert all(torch.equal(value, own[f"model.{name}"]) for name, value in files.items())


def test_a_folder_without_train_attention_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match=f"has no {SPEC}"):
        TrainAttention.load(base)


def test_files_of_two_trainings_are_refused(base: Path, tmp_path: Path) -> None:
    TrainAttention.start(base, lora=LORA).save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors.pop("head.bias")
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(ConfigError, match=r"first odd tensor is 'head\.bias'"):
        TrainAttention.load(tmp_path)


def test_a_body_without_all_weights_is_refused(base: Path, tmp_path: Path) -> None:
    TrainAttention.start(base).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights of LlamaModel.*'norm\.weight'"):
        TrainAttention.load(tmp_path)


def test_tokenizers_that_differ_are_refused() -> None:
    own: Any = byte_tokenizer()
    check_same_tokenizer(own, byte_tokenizer())
    other: Any = byte_tokenizer()
    other.pad_token = "<eos>"
    check_same_tokenizer(own, other)
    other.bos_token = "<pad>"
    with pytest.raises(ConfigError, match="bos_token is None and '<pad>'"):
        check_same_tokenizer(own, other)
    longer: Any = byte_tokenizer()
    longer.add_tokens(["extra"])
    with pytest.raises(ConfigError, match="token 'extra' is absent and 258"):
        check_same_tokenizer(own, longer)
