"""Tiny random models and rows for tests: multi-head, grouped-query and sliding-window attention.

`build(..., exact=True)` gives float64 models whose norms are float64 too (transformers' RMSNorm
rounds to float32 inside), so results can be compared at 1e-6 and better.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from seekr.attention import register
from seekr.prompts import Batch, Side, TokenizedRow, collate
from tests.seekr import reference

VOCAB = 29
PAD_ID = 0
LAYERS, HEADS = 3, 4
MODELS = ("llama-mha", "llama-gqa", "mistral-window", "qwen2-mixed-window")


def config(name: str) -> PretrainedConfig:
    """Return the configuration of one of MODELS. Windows are shorter than the rows."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if name == "llama-mha" else 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,  # sharp, uneven attention maps
        "pad_token_id": PAD_ID,
    }
    if name.startswith("llama"):
        return LlamaConfig(**sizes)
    if name == "mistral-window":
        return MistralConfig(**sizes, sliding_window=4)
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    return Qwen2Config(**sizes, **window)


def build(
    name: str, *, attention: str = "seekr", seed: int = 0, exact: bool = True
) -> PreTrainedModel:
    """Return a model in evaluation mode; the same name and seed give the same weights."""
    register()
    reference.register()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(name), attn_implementation=attention).eval()
    return to_exact(model) if exact else model


def to_exact(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in float64, norms included."""
    model = copy.deepcopy(model).double()
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, nn.RMSNorm):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon).double()
                norm.weight = child.weight
                setattr(parent, child_name, norm)
    return model


def rows(
    lengths: tuple[int, ...] = (9, 5, 7), answer: int = 2, seed: int = 0
) -> list[TokenizedRow]:
    """Return rows of random tokens; the last `answer` tokens of each bear the loss."""
    generator = np.random.default_rng(seed)
    return [
        TokenizedRow(
            row_id=f"row-{seed}-{index}",
            input="",
            references=("",),
            input_ids=generator.integers(1, VOCAB, size=length).astype(np.int32),
            prompt_length=length - answer,
        )
        for index, length in enumerate(lengths)
    ]


def batch(
    side: Side = "right", lengths: tuple[int, ...] = (9, 5, 7), multiple_of: int = 1
) -> Batch:
    """Return the rows of `rows(lengths)` padded on one side."""
    return collate(rows(lengths), PAD_ID, side, multiple_of)
