"""What a training step has to compute, in floating-point operations, and what a device could do.

The figure made of both is MFU, model FLOPs utilisation, as PaLM defines it (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B): products of matrices alone, each multiplication and addition counted, the
backward pass twice the forward pass. Per token that is 6 N + 12 L H Q T for N weights outside the
embedding, L layers, H heads of size Q and rows of T tokens. Attention counts whole T x T maps, though
a causal kernel leaves out half, and nothing counts that is computed again to save memory: MFU says what a
step achieves, not how busy it keeps the device.

Two things differ from the plain formula, and both make it smaller. Under adapters a frozen weight
needs no gradient, which leaves 4 operations of the 6. And the head's product counts at the positions
whose logits a loss reads, as no other is needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PretrainedConfig

from seekr.errors import UnsupportedModel
from seekr.models import model_shape
from seekr.training.settings import Lora

# Families whose layers are four projections of attention and a gated MLP of three.
_GATED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Dense bfloat16 operations per second of the SXM modules (B200, H100, H200, A100) and of the L40S card,
# from NVIDIA's data sheets. A100's PCIe card has the module's figure.
_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
# Words in a device's name that say it is slower than the module: other cards, and parts of a device.
_SLOWER = frozenset({"NVL", "PCIE", "HBM2E", "MIG"})


def linear_layers(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of the linear layers in one decoder layer, by name.

    Raises:
        UnsupportedModel: the family has other layers than these.
    """
    text = config.get_text_config()
    if text.model_type not in _GATED:
        raise UnsupportedModel(
            f"the operations of model type {text.model_type!r} are not known; known are "
            f"{', '.join(sorted(_GATED))}: report tokens per second without MFU"
        )
    shape = model_shape(config)
    width, inner = text.hidden_size, text.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }


def training_flops(
    config: PretrainedConfig,
    lengths: Sequence[int],
    answers: int | None = None,
    lora: Lora | None = None,
) -> int:
    """Return the model FLOPs of a forward and backward pass over rows.

    Args:
        config: Of a Llama, Mistral, Qwen2 or Qwen3.
        lengths: Tokens of each row, without padding. Rows do not see each other.
        answers: Positions whose logits are needed, in all rows together; None is every token.
        lora: The adapters, if these alone are trained. For the first layer's inputs a gradient is
            counted as for all others, though nothing below needs it.

    Raises:
        UnsupportedModel: the family is another one.
    """
    shape, layers, tokens = model_shape(config), linear_layers(config), sum(lengths)
    per_weight = 6 if lora is None else 4
    weights = sum(inputs * outputs for inputs, outputs in layers.values())
    per_token = per_weight * weights + 6 * _adapter_weights(layers, lora)
    maps = sum(length * length for length in lengths)
    attention = 12 * shape.num_heads * shape.head_dim * maps
    width = config.get_text_config().hidden_size
    read = tokens if answers is None else answers
    head = per_weight * width * shape.vocab_size * read
    return shape.num_layers * (per_token * tokens + attention) + head


def _adapter_weights(layers: dict[str, tuple[int, int]], lora: Lora | None) -> int:
    """Return how many weights one decoder layer's adapters have."""
    if lora is None:
        return 0
    targets = lora.targets or tuple(layers)
    return sum(lora.rank * sum(layers[name]) for name in targets)


def device_peak(name: str) -> float | None:
    """Return a device's dense bfloat16 operations per second, None where it is not known.

    Args:
        name: As `torch.cuda.get_device_name` gives it.
    """
    words = set(re.split(r"[\s-]+", name.upper()))
    if (words & _SLOWER and "A100" not in words) or "MIG" in words:
        return None
    return next((peak for key, peak in _PEAKS.items() if key in words), None)
