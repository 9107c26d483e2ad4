"""Models, documents and tasks that Train-Attention is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from seekr.prompts import TokenizedRow
from seekr.taalm.adapters import add_adapters
from seekr.taalm.episodes import MetaItem
from seekr.taalm.network import TrainAttention
from seekr.training.build import is_adapter
from seekr.training.settings import Lora
from tests.seekr import tiny

LORA = Lora(rank=2, alpha=4.0)


def row(ids: Sequence[int], prompt: int = 1, row_id: str | None = None) -> TokenizedRow:
    """A row of these tokens, named by them."""
    return tiny.row("-".join(map(str, ids)) if row_id is None else row_id, list(ids), prompt)


def item(document: Sequence[int], task: Sequence[int], objects: Sequence[int]) -> MetaItem:
    """An item whose task has its object at these positions."""
    mask = np.zeros(len(task), dtype=bool)
    mask[list(objects)] = True
    return MetaItem(document=row(document), task=row(task), object_mask_T=mask)


def random_items(count: int, seed: int = 0) -> list[MetaItem]:
    """Items of unequal length, of random tokens."""
    draw = np.random.default_rng(seed)
    found = []
    for index in range(count):
        document = draw.integers(1, tiny.VOCAB, size=9 - 2 * (index % 3)).tolist()
        task = draw.integers(1, tiny.VOCAB, size=5 + index % 2).tolist()
        found.append(item(document, task, [2, 3 + index % 2]))
    return found


def learner(lora: bool = False, attention: str = "sdpa", spread: float = 0.0) -> PreTrainedModel:
    """A tiny Llama with shared key heads in float64.

    Args:
        lora: Train adapters. spread: what B is drawn with, instead of its zeros.
    """
    theta = tiny.build("llama2-gqa", attention=attention)
    if lora:
        add_adapters(theta, LORA, "theta")
        theta.double()
        randomise_b(theta, spread)
    return theta


def randomise_b(model: torch.nn.Module, spread: float) -> None:
    """Move the adapters away from their start, at which half of the gradients vanish."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_adapter(name) and ".lora_B." in name:
                p.copy_(spread * torch.randn(p.shape, generator=generator))


def train_attention(lora: bool = False, slope: float = 0.5) -> TrainAttention:
    """A tiny Train-Attention in float64 whose weights are spread over (0, 1)."""
    body: Any = tiny.build("llama2-gqa", attention="sdpa", seed=1).base_model
    phi = TrainAttention(body, LORA if lora else None, seed=3)
    phi.double()
    randomise_b(phi, 0.3 if lora else 0.0)
    with torch.no_grad():
        phi.head.weight.mul_(slope / 0.001)
        phi.head.bias.zero_()
    return phi


def trained(phi: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What is trained, as it lies in the model."""
    return {name: p for name, p in phi.named_parameters() if p.requires_grad}
