"""A batch through a model: the positions of its tokens, and the logits that are wanted.

Rows have to be blind to each other, or a batch would mean something else than its rows. Padded rows
are, by the attention mask. Packed rows are where transformers builds its masks from positions that
start again; the few models that do not are found by trying.

Shape suffixes: B batch, T tokens, D hidden dimension, V vocabulary.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from seekr.attention import evaluation_mode, inner_model, token_positions
from seekr.collation import Batch
from seekr.errors import UnsupportedModel

# Two rows of this many tokens are packed to try a model. A window is never shorter than two.
_TRIED_LENGTHS = (3, 2)


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return what a model is called with: positions count from each row's first real token."""
    inputs = batch.inputs()
    if "position_ids" not in inputs:
        inputs["position_ids"] = token_positions(batch.attention_mask_BT)
    return inputs


def batch_logits(model: nn.Module, batch: Batch, kept_T: Tensor | None = None) -> Tensor:
    """Run a model with every row's positions counted from its first real token.

    Args:
        model: Any causal LM, bare or wrapped.
        batch: On the model's device, padded on either side or packed.
        kept_T: Columns whose logits are wanted; others are not computed where the model can leave
            them. All by default.

    Returns:
        Logits [B,T,V], or [B,kept,V].
    """
    inputs = model_inputs(batch)
    if kept_T is None:
        return model(**inputs, use_cache=False).logits
    if "logits_to_keep" in _parameters(inner_model(model)):
        return model(**inputs, use_cache=False, logits_to_keep=kept_T).logits
    return model(**inputs, use_cache=False).logits[:, kept_T]


def check_packable(model: nn.Module) -> None:
    """Check that rows packed into one sequence do not see each other.

    Two short rows are packed, and the logits of the second one may not change by a bit when the
    first one does. Parameters and modes stay as they are.

    Args:
        model: Loaded, bare or wrapped; where it is sharded, all workers have to call.

    Raises:
        UnsupportedModel: they do, or the model is not given positions.
    """
    inner = inner_model(model)
    if "position_ids" not in _parameters(inner):
        cause = "it takes no position_ids, which tell where a row begins"
    elif _sees_the_row_before(model):
        cause = "its attention reaches into the row before"
    else:
        return
    raise UnsupportedModel(
        f"model type {inner.config.model_type!r} ({type(inner).__name__}) cannot be trained on "
        f"packed rows: {cause}. Rows must not see each other: train it without packing (pack_tokens "
        "null), or choose a model like Llama, Mistral, Qwen2 or Qwen3"
    )


def _sees_the_row_before(model: nn.Module) -> bool:
    """Return whether the second of two packed rows answers to a change of the first one."""
    ids_BT = torch.tensor([[1, 2, 3, 4, 5], [3, 1, 2, 4, 5]])
    first, second = _TRIED_LENGTHS
    positions_BT = torch.tensor([[*range(first), *range(second)]])
    device = next(inner_model(model).parameters()).device
    logits: list[Tensor] = []
    with evaluation_mode(model), torch.no_grad():
        for ids in ids_BT:
            inputs = {"input_ids": ids[None].to(device), "position_ids": positions_BT.to(device)}
            logits.append(model(**inputs, use_cache=False).logits[0, first:])
    return not torch.equal(logits[0], logits[1])


def _parameters(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)
