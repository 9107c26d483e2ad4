"""Model families: what probes see equals transformers' own eager maps, or the family is refused.

One tiny random model per family, with shared key heads where the family has them, in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from seekr.attention import check_probeable, probing, register, token_positions
from seekr.distillation import DistillationProbe
from seekr.errors import UnsupportedModel
from seekr.probes import RowProbe
from seekr.score_probes import GradientProbe
from seekr.sparse_rows import keep_largest

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS, LENGTHS = 11, (11, 7)
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LATENT = {  # multi-head latent attention: every head gets its own keys
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
# Tested name: (model type, what differs from SIZES).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Apertus": ("apertus", {}),
    "Arcee": ("arcee", {}),
    "BitNet": ("bitnet", {}),
    "Cohere": ("cohere", {}),
    "Cohere2": ("cohere2", MIXED),
    "DeepSeek V3": ("deepseek_v3", {**EXPERTS, **LATENT}),
    "Ernie 4.5": ("ernie4_5", {"head_dim": 8}),
    "EXAONE 4": ("exaone4", MIXED),
    "Gemma": ("gemma", {"head_dim": 8}),
    "Gemma 3": ("gemma3_text", {**MIXED, "head_dim": 8}),
    "GLM": ("glm", {"head_dim": 8}),
    "GLM-4": ("glm4", {"head_dim": 8}),
    "GLM-4 MoE": ("glm4_moe", {**EXPERTS, "n_group": 1, "topk_group": 1, "head_dim": 8}),
    "GPT-2": ("gpt2", {"n_positions": 64, "n_inner": 48}),
    "GPT-NeoX": ("gpt_neox", {}),
    "Granite": ("granite", {"attention_multiplier": 0.2}),
    "Granite MoE": ("granitemoe", {**EXPERTS, "attention_multiplier": 0.2}),
    "Helium": ("helium", {"head_dim": 8}),
    "HunYuan": ("hunyuan_v1_dense", {"head_dim": 8}),
    "Llama 2": ("llama", {"num_key_value_heads": 4}),
    "Llama 3": ("llama", {"rope_parameters": ROPE}),
    "Llama 4": (
        "llama4_text",
        {
            **EXPERTS,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 4,
            "no_rope_layers": [1, 0],
        },
    ),
    "MiniCPM3": ("minicpm3", LATENT),
    "Ministral": ("ministral", {"head_dim": 8, **MIXED}),
    "Mistral": ("mistral", {"sliding_window": 4}),
    "Mixtral": ("mixtral", {**EXPERTS, "sliding_window": 4}),
    "ModernBERT decoder": ("modernbert-decoder", {**MIXED, "num_key_value_heads": 4}),
    "Nemotron": ("nemotron", {}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", MIXED),
    "OLMoE": ("olmoe", EXPERTS),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Phi": ("phi", {}),
    "Phi-3": ("phi3", {"sliding_window": 4}),
    "Phi-3.5 MoE": ("phimoe", {**EXPERTS, "sliding_window": 4}),
    "Qwen2.5": ("qwen2", {}),
    "Qwen2.5 windowed": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "Qwen2 MoE": ("qwen2_moe", EXPERTS),
    "Qwen3": ("qwen3", {"head_dim": 12}),
    "Qwen3 MoE": ("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    "Seed-OSS": ("seed_oss", {"head_dim": 8}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "StableLM": ("stablelm", {}),
    "StarCoder2": ("starcoder2", {"sliding_window": 4}),
}
# Refused name: (model type, what the message says, what differs from the type's defaults).
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BART": ("bart", "two attention modules", {}),
    "Bamba": ("bamba", "linear_attention", {}),
    "BERT": ("bert", "both directions", {}),
    "BLOOM": ("bloom", "does not go through AttentionInterface", {}),
    "DeepSeek V3.2": ("deepseek_v32", "indexed_attention", {}),
    "DiffLlama": ("diffllama", "differential attention", {}),
    "Doge": ("doge", "dynamic masks", {}),
    "Falcon": ("falcon", "does not go through AttentionInterface", {}),
    "Falcon-H1": ("falcon_h1", "hybrid", {}),
    "Falcon Mamba": ("falcon_mamba", "linear_attention", {}),
    "Gemma 2": ("gemma2", "attn_logit_softcapping is 50.0", {}),
    "Gemma 3, bidirectional": (
        "gemma3_text",
        "both directions",
        {"use_bidirectional_attention": True, "num_hidden_layers": 2},
    ),
    "gpt-oss": ("gpt_oss", "attention sinks", {}),
    "GPT-J": ("gptj", "does not go through AttentionInterface", {}),
    "Granite 4 hybrid": ("granitemoehybrid", "linear_attention", {}),
    "Jamba": ("jamba", "linear_attention", {}),
    "LFM2": (
        "lfm2",
        "conv",
        {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    ),
    "LongCat Flash": ("longcat_flash", "attention modules in", {}),
    "Mamba": ("mamba", "linear_attention", {}),
    "MiniMax": ("minimax", "linear_attention", {}),
    "MPT": ("mpt", "does not go through AttentionInterface", {}),
    "Nemotron-H": ("nemotron_h", "linear_attention", {}),
    "Qwen3-Next": ("qwen3_next", "linear_attention", {}),
    "Qwen3.5": ("qwen3_5_text", "linear_attention", {}),
    "RecurrentGemma": ("recurrent_gemma", "linear_attention", {}),
    "RWKV": ("rwkv", "does not go through AttentionInterface", {}),
    "T5": ("t5", "no causal language model class", {}),
    "Whisper": ("whisper", "two attention modules", {}),
    "Zamba2": ("zamba2", "hybrid", {}),
}


def family_config(name: str) -> PretrainedConfig:
    model_type, changes = FAMILIES[name]
    return AutoConfig.for_model(model_type, **{**SIZES, **changes})


def build(name: str, attention: str, seed: int = 0) -> PreTrainedModel:
    """Return a model in evaluation mode; the same name and seed give the same weights."""
    register()
    model = AutoModelForCausalLM.from_config(
        family_config(name), attn_implementation=attention, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25, generator=generator)
    return model.eval()


def inputs(side: str) -> dict[str, Tensor]:
    real_BT = torch.zeros(len(LENGTHS), TOKENS, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        real_BT[row, slice(TOKENS - length, None) if side == "left" else slice(length)] = 1
    ids_BT = torch.randint(3, 40, real_BT.shape, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids_BT * real_BT,
        "attention_mask": real_BT,
        "position_ids": token_positions(real_BT),
    }


def eager_maps(model: PreTrainedModel, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return transformers' own maps [B,H,T,T] per layer, 0 in the query rows of padding."""
    maps = model(**given, use_cache=False, output_attentions=True).attentions
    padding = ~given["attention_mask"].bool()[:, None, :, None]
    return tuple(layer.masked_fill(padding, 0.0) for layer in maps)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_and_kl_equal_those_of_the_eager_maps(name: str, side: str) -> None:
    check_probeable(family_config(name))
    given = inputs(side)
    real_BT = given["attention_mask"].bool()
    model = build(name, "seekr")
    everything = torch.arange(TOKENS).expand(2, TOKENS)
    heads = {layer: (0, 1, 2, 3) for layer in range(2)}
    rows = RowProbe(heads, everything)
    with torch.no_grad():
        expected = eager_maps(build(name, "eager"), given)
        theirs = eager_maps(build(name, "eager", seed=1), given)
        with probing(model, rows):
            logits = model(**given, use_cache=False).logits
        stock = build(name, "sdpa")(**given, use_cache=False).logits
    assert torch.equal(logits, stock)
    own = real_BT[:, None, :, None]
    for layer in range(2):
        found = rows.log_rows[layer].exp().masked_fill(~own, 0.0)
        torch.testing.assert_close(found, expected[layer], rtol=0, atol=1e-5)

    possible_R = (theirs[0] > 0).sum(dim=-1).flatten()
    teachers = {at: keep_largest(theirs[at].flatten(0, 2), possible_R, None) for at in range(2)}
    probe = DistillationProbe(heads, everything, teachers)
    with torch.no_grad(), probing(model, probe):
        assert torch.equal(model(**given, use_cache=False).logits, stock)
    for layer in range(2):
        t, p = theirs[layer].double(), expected[layer].double()
        wanted = torch.where(t > 0, t * (t.log() - p.log()), 0.0).sum(dim=-1)
        assert wanted.max() > 0.01
        found = probe.kl_by_layer[layer].double()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_squares_equal_those_of_autograd_on_the_eager_maps(name: str) -> None:
    given = inputs("left")
    real_BT = given["attention_mask"].bool()
    model, slow = build(name, "seekr"), build(name, "eager")
    probe = GradientProbe(real_BT)
    with probing(model, probe):
        logits = model(**given, use_cache=False).logits
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        direction = direction.masked_fill(~real_BT[..., None], 0.0)
        (logits * direction).sum().backward()
    out = slow(**given, use_cache=False, output_attentions=True)
    gradients = torch.autograd.grad((out.logits * direction).sum(), out.attentions)
    both = real_BT[:, None, :, None] & real_BT[:, None, None, :]
    square = [grad.double().square().masked_fill(~both, 0.0) for grad in gradients]
    allowed = [value * (layer > 0) for value, layer in zip(square, out.attentions, strict=True)]
    for found, values in ((probe.square_BLH, square), (probe.causal_BLH, allowed)):
        expected = torch.stack([value.sum(dim=(-2, -1)) for value in values], dim=1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_other_attention_is_refused_by_name_with_cause_and_remedy(name: str) -> None:
    model_type, cause, changes = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=cause) as caught:
        check_probeable(AutoConfig.for_model(model_type, **changes))
    assert repr(model_type) in str(caught.value)
    assert "choose such a model, or a method without attention distillation" in str(caught.value)


def test_gemma_2_without_its_cap_is_accepted() -> None:
    small = {**SIZES, "head_dim": 8, "sliding_window": 4}
    check_probeable(AutoConfig.for_model("gemma2", **small, attn_logit_softcapping=None))


def test_a_config_without_a_causal_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no causal language model class"):
        check_probeable(PretrainedConfig())


def test_looking_at_a_model_allocates_no_weights_and_leaves_the_config_alone() -> None:
    config = AutoConfig.for_model("llama", hidden_size=8192, num_attention_heads=64)
    before = config.to_dict(), config._attn_implementation
    check_probeable(config)  # 69 GB in float32, were it built
    assert (config.to_dict(), config._attn_implementation) == before
