"""Slow float64 references, written from the equations of the paper for one row without padding.

`register()` adds the attention "reference": it builds its own causal or window mask entry by entry,
keeps each layer's full map A on the module and lets autograd fill A's gradient. Everything else
here is loops.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from seekr.prompts import TokenizedRow

Maps = list[Tensor]


def register() -> None:
    """Make attn_implementation="reference" known."""
    AttentionInterface.register("reference", _attention)
    AttentionMaskInterface.register("reference", sdpa_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **kwargs: object
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    tokens, window = query.shape[2], _window(module)
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(tokens):
            allowed[i, j] = j <= i and i - j < window
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    attention = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)
    module.reference_map = attention
    module.reference_allowed = allowed
    if attention.requires_grad:
        attention.retain_grad()
    return (attention @ value).transpose(1, 2), None


def _window(module: nn.Module) -> float:
    config = module.config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[module.layer_idx] == "full_attention":
        return math.inf
    window = getattr(config, "sliding_window", None)
    return math.inf if window is None else window


def forward(model: PreTrainedModel, row: TokenizedRow) -> tuple[Tensor, Maps]:
    """Return (logits [T,V], maps [H,T,T] per layer) of one row alone."""
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits, [layer.self_attn.reference_map for layer in model.model.layers]


def answer_loss(logits: Tensor, row: TokenizedRow) -> tuple[Tensor, int]:
    """Return (sum of -log p of the answer tokens, their number)."""
    total = torch.zeros((), dtype=logits.dtype)
    for position in range(row.prompt_length, len(row.input_ids)):
        probabilities = logits[position - 1].softmax(dim=-1)
        total = total - probabilities[int(row.input_ids[position])].log()
    return total, len(row.input_ids) - row.prompt_length


def gradient_squares(
    model: PreTrainedModel, row: TokenizedRow
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums of (dL/dA_ij)^2 per [layer, head]: over allowed pairs, and over all pairs."""
    logits, maps = forward(model, row)
    total, count = answer_loss(logits, row)
    gradients = torch.autograd.grad(total / count, maps)
    allowed = [layer.self_attn.reference_allowed for layer in model.model.layers]
    causal = [(g[0] * a).square().sum(dim=(1, 2)) for g, a in zip(gradients, allowed, strict=True)]
    square = [g[0].square().sum(dim=(1, 2)) for g in gradients]
    return torch.stack(causal).numpy(), torch.stack(square).numpy()


def difference_squares(
    before: PreTrainedModel, after: PreTrainedModel, row: TokenizedRow, queries: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums of (A_after - A_before)^2 per [layer, head]: all query rows, and `queries`."""
    with torch.no_grad():
        maps_before, maps_after = forward(before, row)[1], forward(after, row)[1]
    both = zip(maps_after, maps_before, strict=True)
    squares = torch.stack([(a[0] - b[0]).square() for a, b in both])
    return squares.sum(dim=(2, 3)).numpy(), squares[:, :, queries].sum(dim=(2, 3)).numpy()


def kl(teacher: NDArray[np.float64], student: NDArray[np.float64], epsilon: float = 0.0) -> float:
    """KL(teacher || student) of two distributions given as numbers."""
    total = 0.0
    for p, q in zip(teacher.tolist(), student.tolist(), strict=True):
        if p > 0:
            total += p * (math.log(p) - math.log(q + epsilon))
    return total


def attention_distillation(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    row: TokenizedRow,
    heads: dict[int, tuple[int, ...]],
    queries: NDArray[np.int64],
) -> tuple[float, float]:
    """Return one row's (equation (12), the official code's mean of means)."""
    with torch.no_grad():
        maps_teacher, maps_student = forward(teacher, row)[1], forward(student, row)[1]
    per_layer: list[list[float]] = []
    for layer, chosen in heads.items():
        a, b = maps_teacher[layer][0].numpy(), maps_student[layer][0].numpy()
        per_layer.append([kl(a[head, t], b[head, t]) for head in chosen for t in queries])
    total = sum(sum(values) for values in per_layer)
    means = [sum(values) / len(values) for values in per_layer]
    return total, sum(means) / len(means)
