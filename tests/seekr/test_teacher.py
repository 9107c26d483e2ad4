"""What a teacher writes for a row, against the maps and logits of slow references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seekr.attention import probing
from seekr.collation import Batch, collate
from seekr.errors import ConfigError, DataError
from seekr.forward import batch_logits
from seekr.probes import RowProbe
from seekr.sparse_rows import SparseRows
from seekr.teacher import Keep, TeacherTarget, place_positions, teach_batch
from seekr.teacher_store import decode_target, encode_target
from tests.seekr import reference, tiny

HEADS = {0: (0, 3), 2: (1, 2, 3)}
NUM_HEADS = 5
QUERIES = [np.array([0, 4, 8]), np.array([1, 4]), np.array([3, 5, 6])]


def taught(side: Any = "right", **changes: Any) -> list[TeacherTarget]:
    options = {"logits": True} | changes
    return teach_batch(tiny.build("llama2-gqa"), tiny.batch(side), HEADS, QUERIES, **options)


def forward(model: torch.nn.Module, batch: Batch, probe: RowProbe) -> Tensor:
    with probing(model, probe), torch.no_grad():
        return batch_logits(model, batch)


def dense_rows(target: TeacherTarget) -> dict[int, Tensor]:
    """Per layer the kept entries as [S,Q,length]."""
    assert target.attention is not None
    dense = target.attention.dense_RC(target.length)
    found, start = {}, 0
    for layer, heads in target.heads_by_layer.items():
        shape = (len(heads), len(target.query_positions), target.length)
        stop = start + shape[0] * shape[1]
        found[layer] = dense[start:stop].reshape(shape)
        start = stop
    assert start == len(target.attention)
    return found


def kept_largest(rows: np.ndarray, keep: int) -> np.ndarray:
    """Zero all but the keep * len(rows) largest numbers of all rows together, one by one."""
    order = sorted(range(rows.size), key=lambda index: -rows.flat[index])
    kept = np.zeros_like(rows)
    for index in order[: keep * len(rows)]:
        kept.flat[index] = rows.flat[index]
    return kept


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_whole_targets_equal_the_reference_maps_and_logits(name: str, side, shift: bool) -> None:
    batch = tiny.batch(side, multiple_of=4)
    targets = teach_batch(tiny.build(name), batch, HEADS, QUERIES, logits=True, shift=shift)
    slow = tiny.build(name, attention="reference")
    for index, (row, target) in enumerate(zip(tiny.rows(), targets, strict=True)):
        logits, maps = reference.forward(slow, row)
        length, first = len(row.input_ids), row.prompt_length - shift
        assert (target.length, target.shift) == (length, shift)
        expected = logits[first : length - shift].detach()
        torch.testing.assert_close(target.logits, expected, rtol=1e-6, atol=1e-9)
        assert target.heads_by_layer == HEADS
        assert np.array_equal(target.query_positions, QUERIES[index])
        assert not target.attention.tail_R.any()
        for layer, found in dense_rows(target).items():
            rows = maps[layer][0, list(HEADS[layer])][:, QUERIES[index]].detach()
            torch.testing.assert_close(found, rows, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_kept_targets_are_the_largest_entries_of_the_references_and_one_mass(
    name: str, keep: int
) -> None:
    batch = tiny.batch("left")
    targets = teach_batch(
        tiny.build(name), batch, HEADS, QUERIES, logits=True, keep=Keep(logits=keep, attention=keep)
    )
    slow = tiny.build(name, attention="reference")
    for row, queries, target in zip(tiny.rows(), QUERIES, targets, strict=True):
        logits, maps = reference.forward(slow, row)
        own = [maps[layer][0, list(heads)][:, queries] for layer, heads in HEADS.items()]
        rows = torch.cat([part.reshape(-1, target.length) for part in own]).detach().numpy()
        answers = logits[row.prompt_length - 1 : target.length - 1].softmax(dim=-1)
        pairs = [(target.attention, rows), (target.logits, answers.detach().numpy())]
        for found, whole in pairs:
            kept = kept_largest(whole, keep)
            columns = whole.shape[1]
            np.testing.assert_allclose(found.dense_RC(columns), kept, rtol=1e-6, atol=1e-12)
            np.testing.assert_allclose(found.tail_R, 1.0 - kept.sum(axis=1), rtol=0, atol=1e-9)
            complete = (kept > 0).sum(axis=1) == (whole > 0).sum(axis=1)
            assert not found.tail_R[torch.from_numpy(complete)].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_whole_target_of_32_bits_is_what_the_model_computed_to_the_bit(name: str, side) -> None:
    batch, model = tiny.batch(side, multiple_of=8), tiny.build(name, exact=False)
    probe = RowProbe(HEADS, place_positions(QUERIES, batch))
    logits = forward(model, batch, probe)
    targets = teach_batch(model, batch, HEADS, QUERIES, logits=True)
    for index, target in enumerate(targets):
        found = decode_target(encode_target(target, 32))
        start, length = int(batch.start_B[index]), target.length
        own = logits[index, start : start + length]
        answer = batch.labels_BT[index, start : start + length] != -100
        assert torch.equal(found.logits, own[:-1][answer[1:]])
        assert not found.attention.tail_R.any()
        for layer, rows in dense_rows(found).items():
            seen = probe.log_rows[layer][index, :, : len(QUERIES[index]), start : start + length]
            assert torch.equal(rows, seen.exp())


def test_all_entries_are_kept_where_the_number_allows_it() -> None:
    whole, found = taught(), taught(keep=Keep(logits=tiny.VOCAB, attention=9))
    for full, kept in zip(whole, found, strict=True):
        assert isinstance(kept.logits, SparseRows)
        assert torch.equal(kept.logits.dense_RC(tiny.VOCAB), full.logits.softmax(dim=-1))
        assert torch.equal(kept.attention.values_N, full.attention.values_N)
        assert torch.equal(kept.attention.columns_N, full.attention.columns_N)
        assert not kept.logits.tail_R.any() and not kept.attention.tail_R.any()


def test_logits_and_attention_are_kept_apart() -> None:
    for target in taught(keep=Keep(attention=1)):
        assert isinstance(target.logits, Tensor) and target.attention.tail_R.any()
    for target in taught(keep=Keep(logits=3)):
        assert isinstance(target.logits, SparseRows) and not target.attention.tail_R.any()
        assert len(target.logits) == 2 and len(target.logits.values_N) == 6
        assert len(target.attention) == NUM_HEADS * len(target.query_positions)


@pytest.mark.parametrize("keep", [None, Keep(logits=4, attention=2)])
def test_targets_do_not_depend_on_batch_composition_or_padding(keep: Keep | None) -> None:
    together = taught("left", keep=keep)
    for index, row in enumerate(tiny.rows()):
        batch = collate([row], tiny.PAD_ID, "right", multiple_of=8)
        model, queries = tiny.build("llama2-gqa"), [QUERIES[index]]
        (alone,) = teach_batch(model, batch, HEADS, queries, logits=True, keep=keep)
        pairs = [(alone.attention, together[index].attention)]
        if keep is None:
            torch.testing.assert_close(alone.logits, together[index].logits, rtol=1e-9, atol=0)
        else:
            pairs.append((alone.logits, together[index].logits))
        for found, expected in pairs:
            assert torch.equal(found.columns_N, expected.columns_N)
            assert torch.equal(found.offsets, expected.offsets)
            torch.testing.assert_close(found.values_N, expected.values_N, rtol=1e-9, atol=0)
            torch.testing.assert_close(found.tail_R, expected.tail_R, rtol=0, atol=1e-12)


def test_heads_are_kept_in_ascending_order_however_they_were_given() -> None:
    model, batch = tiny.build("llama2-gqa"), tiny.batch()
    (found, *_) = teach_batch(model, batch, {2: (3, 1, 2), 0: (3, 0)}, QUERIES, logits=False)
    assert list(found.heads_by_layer.items()) == list(HEADS.items())
    assert torch.equal(found.attention.values_N, taught()[0].attention.values_N)


def test_bfloat16_models_are_taught_from_in_float32() -> None:
    model = tiny.build("llama2-gqa", exact=False).to(torch.bfloat16)
    keeps = [None, Keep(logits=3, attention=2)]
    for keep in keeps:
        (found, *_) = teach_batch(model, tiny.batch(), HEADS, QUERIES, logits=True, keep=keep)
        logits = found.logits if keep is None else found.logits.values_N
        assert logits.dtype == found.attention.values_N.dtype == torch.float32
        torch.testing.assert_close(found.attention.mass_R(), torch.ones(15), rtol=0, atol=1e-6)


def test_teaching_runs_without_dropout_or_gradient_and_restores_the_mode() -> None:
    model = tiny.build("llama2-gqa").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = teach_batch(model, tiny.batch(), HEADS, QUERIES, logits=True)
    for target, expected in zip(found, taught(), strict=True):
        assert torch.equal(target.logits, expected.logits)
        assert not target.logits.requires_grad and not target.attention.values_N.requires_grad
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_logits_and_attention_can_be_left_out() -> None:
    assert all(target.logits is None for target in taught(logits=False))
    stock = tiny.build("llama2-gqa", attention="sdpa")
    for target in teach_batch(stock, tiny.batch(), None, [], logits=True):
        assert target.attention is None and target.heads_by_layer == {}
        assert len(target.query_positions) == 0 and target.logits.shape == (2, tiny.VOCAB)


def test_attention_targets_need_a_model_that_can_be_probed() -> None:
    stock = tiny.build("llama2-gqa", attention="sdpa")
    with pytest.raises(ConfigError, match="attn_implementation='sdpa'"):
        teach_batch(stock, tiny.batch(), HEADS, QUERIES, logits=True)


def test_query_positions_outside_a_row_are_refused() -> None:
    with pytest.raises(DataError, match=r"5 tokens and a query position of 5; 0\.\.4"):
        place_positions([QUERIES[0], np.array([5]), QUERIES[2]], tiny.batch())
