"""The count of operations against PyTorch's own counter, on models small enough to run.

PyTorch counts the products that are made. With eager attention, which forms whole maps, and without
padding these are the model FLOPs exactly, but for one place: under adapters nothing below the first
layer's inputs is trained, so their gradient is never formed, and the formula counts it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from seekr.errors import UnsupportedModel
from seekr.training.flops import device_peak, linear_layers, training_flops
from seekr.training.settings import Lora

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
ROWS, TOKENS = 3, 11


def config_of(family: str, **changes: int) -> PretrainedConfig:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return CONFIGS[family](**sizes | changes)


def counted(config: PretrainedConfig, lora: Lora | None = None) -> int:
    """Operations of a forward and backward pass with all logits, by PyTorch's count."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    if lora is not None:
        targets = list(lora.targets or linear_layers(config))
        settings = LoraConfig(r=lora.rank, lora_alpha=8, target_modules=targets)
        inject_adapter_in_model(settings, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    ids = torch.randint(0, 50, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    counter = FlopCounterMode(display=False)
    with counter:
        # The mean and not the model's loss, which forms no product either.
        model(input_ids=ids, use_cache=False).logits.mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", CONFIGS)
def test_full_training_counts_what_pytorch_counts(family: str) -> None:
    config = config_of(family)
    assert training_flops(config, [TOKENS] * ROWS) == counted(config)


def test_heads_may_be_wider_than_the_model() -> None:
    config = config_of("qwen3", head_dim=24)
    assert training_flops(config, [TOKENS] * ROWS) == counted(config)


@pytest.mark.parametrize("targets", [None, ("q_proj", "k_proj", "v_proj", "down_proj")])
def test_adapters_count_what_pytorch_counts_above_the_first_inputs(
    targets: tuple[str, ...] | None,
) -> None:
    config, lora = config_of("llama"), Lora(rank=2, alpha=8.0, targets=targets)
    layers = linear_layers(config)
    first = [layers[name] for name in ("q_proj", "k_proj", "v_proj")]
    weights = sum(inputs * outputs + lora.rank * inputs for inputs, outputs in first)
    never_formed = 2 * weights * ROWS * TOKENS
    assert training_flops(config, [TOKENS] * ROWS, lora=lora) - never_formed == counted(
        config, lora
    )


def test_a_large_model_takes_six_operations_per_weight_and_token() -> None:
    llama = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32
    )
    weights = 6_738_415_616 - 32000 * 4096 - 65 * 4096  # without embedding and norms
    assert training_flops(llama, [1]) == 6 * weights + 12 * 32 * 4096
    assert training_flops(llama, [1024]) == 1024 * (6 * weights + 12 * 32 * 4096 * 1024)


def test_rows_of_uneven_length_add_up() -> None:
    config = config_of("llama")
    parts = [training_flops(config, [length], answers) for length, answers in ((5, 2), (9, 4))]
    assert training_flops(config, [5, 9], 6) == sum(parts)


def test_the_head_counts_where_logits_are_read() -> None:
    config = config_of("llama")
    whole, part = training_flops(config, [10]), training_flops(config, [10], answers=4)
    assert whole - part == 6 * 6 * 32 * 50


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="mixtral"):
        training_flops(MixtralConfig(), [4])


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_of_the_very_device(name: str, peak: float | None) -> None:
    assert device_peak(name) == peak
