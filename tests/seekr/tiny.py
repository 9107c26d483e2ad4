"""Tiny random models and rows for tests: the named families, with own and shared key heads, windows.

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
    Qwen3Config,
)

from seekr.attention import register
from seekr.collation import Batch, Side, collate
from seekr.prompts import TokenizedRow
from tests.seekr import reference

VOCAB = 29
PAD_ID = 0
LAYERS, HEADS = 3, 4
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = (
    *("llama2-mha", "llama2-gqa", "llama3-mha", "llama3-gqa"),
    *("mistral-window-mha", "mistral-window-gqa"),
    *("qwen2-mixed-window-mha", "qwen2-mixed-window-gqa", "qwen3-mha", "qwen3-mixed-window-gqa"),
)


def config(name: str) -> PretrainedConfig:
    """Return the configuration of one of MODELS. Windows are shorter than the rows."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if name.endswith("mha") else 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,  # sharp, uneven attention maps
        "pad_token_id": PAD_ID,
    }
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    match name.split("-")[0]:
        case "llama2":
            return LlamaConfig(**sizes)
        case "llama3":
            return LlamaConfig(**sizes, rope_parameters=LLAMA3_ROPE)
        case "mistral":
            return MistralConfig(**sizes, sliding_window=4)
        case "qwen2":
            return Qwen2Config(**sizes, **window)
    return Qwen3Config(**sizes, head_dim=6, **(window if "window" in name else {}))


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


def row(row_id: str, ids: list[int], prompt: int) -> TokenizedRow:
    """Return a row of these tokens, the first `prompt` of which are its prompt."""
    return TokenizedRow(
        row_id=row_id,
        input="",
        references=("",),
        input_ids=np.array(ids, dtype=np.int32),
        prompt_length=prompt,
    )
