"""Folders in, folders out, and greedy generation that does not depend on its batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

from seekr.collation import Batch, collate_prompts
from seekr.errors import ConfigError, UnsupportedModel
from seekr.models import (
    byte_tokenizer,
    generate_greedy,
    load_model,
    load_tokenizer,
    model_shape,
    save_model,
    tiny_llama,
)
from seekr.prompts import Example, Template, encode

TOKENIZER = byte_tokenizer()
PAD, EOS = 0, 1


def prompts(texts: list[str]) -> Batch:
    rows = [
        encode(
            Example(input=text, references=("x",)),
            Template.parse("{input}"),
            TOKENIZER,
            max_length=64,
            max_answer_length=4,
        )
        for text in texts
    ]
    return collate_prompts(rows, PAD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(tiny_llama(seed=3), TOKENIZER, path)
    return path


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_byte_tokenizer_gives_back_any_text(text: str):
    ids = TOKENIZER(text).input_ids
    assert ids == [byte + 2 for byte in text.encode()] or "<pad>" in text or "<eos>" in text
    assert TOKENIZER.decode(ids) == text


def test_the_byte_tokenizer_survives_its_folder(folder: Path):
    again = load_tokenizer(folder)
    text = "Ünï 日本\n\t🎉 's"
    assert again.get_vocab() == TOKENIZER.get_vocab() and len(again) == 258
    assert again(text).input_ids == TOKENIZER(text).input_ids
    assert (again.pad_token_id, again.eos_token_id) == (PAD, EOS)


def test_tiny_llama_is_a_function_of_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, same, other = tiny_llama(seed=1), tiny_llama(seed=1), tiny_llama(seed=2)
    assert torch.equal(torch.rand(3), expected)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_saved_model_comes_back_bit_for_bit(folder: Path, tmp_path: Path):
    model, again = tiny_llama(seed=3), load_model(folder, dtype=torch.float32, attention="sdpa")
    assert not again.training
    state = again.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name])
    save_model(again, load_tokenizer(folder), tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_dtype_asked_for_is_the_one_in_memory(folder: Path):
    model = load_model(folder, dtype=torch.bfloat16, attention="sdpa")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_the_attention_asked_for_is_the_one_in_use_and_all_agree(folder: Path):
    batch = prompts(["hello there", "a"])
    logits = {}
    for name in ("seekr", "sdpa", "eager"):
        model = load_model(folder, dtype=torch.float32, attention=name)
        assert model.config._attn_implementation == name
        with torch.no_grad():
            output = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
        logits[name] = output.logits[batch.attention_mask_BT.bool()]
    torch.testing.assert_close(logits["seekr"], logits["sdpa"], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=0, atol=1e-5)


def test_a_path_that_is_no_model_folder_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no folder"):
        load_model("meta-llama/Llama-2-7b-hf", dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"without config\.json"):
        load_model(tmp_path, dtype=torch.float32)


def copy_without_weights(folder: Path, target: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def test_a_folder_without_safetensors_weights_is_refused_and_pickle_is_never_opened(
    folder: Path, tmp_path: Path
):
    target = copy_without_weights(folder, tmp_path)
    with pytest.raises(ConfigError, match="no weights"):
        load_model(target, dtype=torch.float32)
    torch.save(tiny_llama().state_dict(), target / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only pickle weights"):
        load_model(target, dtype=torch.float32)


def test_an_index_with_a_missing_shard_is_refused(folder: Path, tmp_path: Path):
    target = copy_without_weights(folder, tmp_path)
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "model-00001.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"1 of 2 weight files.*model-00002"):
        load_model(target, dtype=torch.float32)


def test_a_checkpoint_that_leaves_weights_random_is_refused(folder: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    target = copy_without_weights(folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(target, dtype=torch.float32, attention="sdpa")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path):
    target = copy_without_weights(folder, tmp_path)
    (target / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer_config"):
        load_tokenizer(target)


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen3Config])
def test_the_shape_is_read_from_any_grouped_query_decoder(kind: type[PretrainedConfig]):
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = kind(hidden_size=96, vocab_size=50, head_dim=16, **sizes)
    shape = model_shape(config)
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads) == (3, 8, 2)
    assert (shape.head_dim, shape.vocab_size) == (16, 50)


def test_the_shape_of_a_model_without_grouped_heads_has_as_many_key_heads():
    shape = model_shape(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=9))
    assert (shape.num_kv_heads, shape.head_dim) == (4, 8)


def test_a_configuration_without_heads_is_unsupported():
    with pytest.raises(UnsupportedModel, match="num_attention_heads"):
        model_shape(PretrainedConfig())


def greedy_by_hand(model, text: str, count: int) -> list[int]:
    """The slow reference: the whole sequence again for every token, no cache, no padding."""
    ids = [byte + 2 for byte in text.encode()]
    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == EOS:
            return new[:-1]
    return new


@pytest.mark.parametrize("attention", ["seekr", "sdpa"])
def test_batched_generation_equals_a_loop_over_single_rows(folder: Path, attention: str):
    model = load_model(folder, dtype=torch.float32, attention=attention)
    texts = ["abc", "a much longer prompt than that", "x", "hello wor"]
    found = generate_greedy(model, prompts(texts), 12, EOS, PAD)
    assert found == [greedy_by_hand(model, text, 12) for text in texts]
    assert found == [generate_greedy(model, prompts([text]), 12, EOS, PAD)[0] for text in texts]
    assert len({tuple(ids) for ids in found}) > 1


def test_generation_stops_at_eos_and_leaves_it_out(folder: Path):
    model = load_model(folder, dtype=torch.float32, attention="sdpa")
    free = generate_greedy(model, prompts(["abc", "zz"]), 12, EOS, PAD)
    stop = free[0][0]
    stopped = generate_greedy(model, prompts(["abc", "zz"]), 12, stop, PAD)
    assert stopped[0] == []
    assert stopped[1] == (free[1][: free[1].index(stop)] if stop in free[1] else free[1])


def test_the_models_own_generation_defaults_are_ignored_and_kept(folder: Path):
    model = load_model(folder, dtype=torch.float32, attention="sdpa")
    expected = generate_greedy(model, prompts(["abc"]), 12, EOS, PAD)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.max_length = 2
    model.train()
    assert generate_greedy(model, prompts(["abc"]), 12, EOS, PAD) == expected
    assert model.generation_config.repetition_penalty == 50.0 and model.training
