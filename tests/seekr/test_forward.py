"""Logits of padded and packed rows, and the models whose rows must not be packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from seekr.collation import collate_packed
from seekr.errors import UnsupportedModel
from seekr.forward import batch_logits, check_packable
from tests.seekr import tiny

LENGTHS = (9, 3, 7, 5)
ATTENTIONS = ("seekr", "sdpa", "eager")
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def logits_alone(model: PreTrainedModel, row: Any) -> Tensor:
    ids_T = torch.from_numpy(row.input_ids).long()
    return model(input_ids=ids_T[None], use_cache=False).logits[0]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_packed_rows_have_the_logits_they_have_alone(name: str, attention: str) -> None:
    model = tiny.build(name, attention=attention)
    rows = tiny.rows(LENGTHS)
    batch = collate_packed(rows)
    # The eager softmax of transformers is float32 in every model.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if attention == "eager" else EXACT
    with torch.no_grad():
        packed = batch_logits(model, batch)[0].split(batch.lengths_B.tolist())
        alone = [logits_alone(model, row) for row in rows]
    for found, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)
    check_packable(model)


def test_one_packed_row_has_the_logits_it_has_alone() -> None:
    model, row = tiny.build("mistral-window-gqa"), tiny.rows((9,))[0]
    with torch.no_grad():
        found = batch_logits(model, collate_packed([row]))[0]
        torch.testing.assert_close(found, logits_alone(model, row), **EXACT)


class WithoutKeeping(nn.Module):
    """A model that is not known to leave out columns."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner
        inner.forward = lambda **inputs: type(inner).forward(inner, **inputs)

    def forward(self, **inputs: Tensor) -> Any:
        assert "logits_to_keep" not in inputs
        return self.inner(**inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_wanted_columns_are_those_of_all_logits(side: Any) -> None:
    batch, kept_T = tiny.batch(side), torch.tensor([1, 4, 8])
    model = tiny.build("qwen2-mixed-window-gqa")
    with torch.no_grad():
        expected = batch_logits(model, batch)[:, kept_T]
        found = batch_logits(model, batch, kept_T)
        without = batch_logits(WithoutKeeping(model), batch, kept_T)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(without, expected)


@pytest.mark.parametrize(
    ("model_type", "changes", "cause"),
    [
        # OPT makes its mask without looking at positions.
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}, "reaches into the row before"),
        ("bloom", {"n_layer": 2, "n_head": 2}, "takes no position_ids"),
    ],
)
def test_a_model_whose_packed_rows_see_each_other_is_refused_by_name(
    model_type: str, changes: dict[str, Any], cause: str
) -> None:
    sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **sizes, **changes), attn_implementation="eager"
    )
    with pytest.raises(UnsupportedModel, match=cause) as caught:
        check_packable(model)
    assert repr(model_type) in str(caught.value) and "without packing" in str(caught.value)


def test_checking_a_model_leaves_it_as_it_was() -> None:
    model = tiny.build("llama2-gqa").train()
    model.lm_head.requires_grad_(False)
    check_packable(model)
    assert model.training and not model.lm_head.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
