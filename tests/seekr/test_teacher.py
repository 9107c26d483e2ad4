"""What a teacher writes, what is stored, and how targets of single rows meet a batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from seekr.attention import probing, token_positions
from seekr.batch_targets import collate_targets
from seekr.errors import ConfigError, DataError, StoreError
from seekr.probes import RowProbe
from seekr.prompts import collate
from seekr.teacher import (
    TeacherTarget,
    decode_target,
    encode_target,
    place_positions,
    teach_batch,
)
from tests.seekr import reference, tiny

HEADS = {0: (0, 3), 2: (1, 2, 3)}
QUERIES = [np.array([0, 4, 8]), np.array([1, 4]), np.array([3, 5, 6])]


def taught(side="right", **changes) -> list[TeacherTarget]:
    options = {"logits": True} | changes
    return teach_batch(tiny.build("llama-gqa"), tiny.batch(side), HEADS, QUERIES, **options)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_targets_equal_the_reference_maps_and_logits(name: str, side, shift: bool) -> None:
    batch = tiny.batch(side, multiple_of=4)
    targets = teach_batch(tiny.build(name), batch, HEADS, QUERIES, logits=True, shift=shift)
    slow = tiny.build(name, attention="reference")
    for index, (row, target) in enumerate(zip(tiny.rows(), targets, strict=True)):
        logits, maps = reference.forward(slow, row)
        length, first = len(row.input_ids), row.prompt_length - shift
        assert (target.length, target.shift) == (length, shift)
        expected = logits[first : length - shift].detach()
        np.testing.assert_allclose(target.logits_AV, expected, rtol=1e-6, atol=1e-9)
        assert target.heads_by_layer == HEADS
        assert np.array_equal(target.query_positions, QUERIES[index])
        for layer, heads in HEADS.items():
            rows = maps[layer][0, list(heads)][:, QUERIES[index]].detach()
            np.testing.assert_allclose(target.attention[layer], rows, rtol=1e-6, atol=1e-12)
            np.testing.assert_allclose(target.attention[layer].sum(axis=-1), 1.0, rtol=1e-12)


def test_targets_do_not_depend_on_batch_composition_or_padding() -> None:
    rows = tiny.rows()
    together = taught("left")
    for index, row in enumerate(rows):
        batch = collate([row], tiny.PAD_ID, "right", multiple_of=8)
        (alone,) = teach_batch(tiny.build("llama-gqa"), batch, HEADS, [QUERIES[index]], logits=True)
        np.testing.assert_allclose(alone.logits_AV, together[index].logits_AV, rtol=1e-9)
        for layer in HEADS:
            np.testing.assert_allclose(
                alone.attention[layer], together[index].attention[layer], rtol=1e-9
            )


def test_teaching_runs_without_dropout_or_gradient_and_restores_the_mode() -> None:
    model = tiny.build("llama-gqa").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = teach_batch(model, tiny.batch(), HEADS, QUERIES, logits=True)
    for target, expected in zip(found, taught(), strict=True):
        assert np.array_equal(target.logits_AV, expected.logits_AV)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_logits_and_attention_can_be_left_out() -> None:
    assert all(target.logits_AV is None for target in taught(logits=False))
    stock = tiny.build("llama-gqa", attention="sdpa")
    for target in teach_batch(stock, tiny.batch(), None, [], logits=True):
        assert target.attention == {} and target.heads_by_layer == {}
        assert len(target.query_positions) == 0 and target.logits_AV.shape == (2, tiny.VOCAB)


def test_attention_targets_need_a_model_that_can_be_probed() -> None:
    stock = tiny.build("llama-gqa", attention="sdpa")
    with pytest.raises(ConfigError, match="attn_implementation='sdpa'"):
        teach_batch(stock, tiny.batch(), HEADS, QUERIES, logits=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_encoding_keeps_everything_but_the_rounding_to_the_stored_type(dtype) -> None:
    for target in taught():
        data = encode_target(target, dtype)
        found = decode_target(data)
        assert (found.length, found.shift) == (target.length, target.shift)
        assert found.heads_by_layer == target.heads_by_layer
        assert np.array_equal(found.query_positions, target.query_positions)
        pairs = [(found.logits_AV, target.logits_AV)]
        pairs += [(found.attention[layer], target.attention[layer]) for layer in HEADS]
        for stored, original in pairs:
            assert stored.dtype == np.float32
            assert np.array_equal(stored, original.astype(dtype).astype(np.float32))
        assert encode_target(target, dtype) == data
    half, full = (len(encode_target(taught()[0], dtype)) for dtype in ("float16", "float32"))
    assert half < full


def test_targets_without_logits_or_attention_survive_encoding() -> None:
    stock = tiny.build("llama-gqa", attention="sdpa")
    (target, *_) = teach_batch(stock, tiny.batch(), None, [], logits=True, shift=False)
    found = decode_target(encode_target(target))
    assert found.attention == {} and found.shift is False and len(found.query_positions) == 0
    assert decode_target(encode_target(taught(logits=False)[0])).logits_AV is None


def test_any_flipped_byte_or_truncation_is_a_store_error() -> None:
    data = encode_target(taught()[1])
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(StoreError, match="cannot be read"):
            decode_target(bytes(damaged))
    for length in (0, 3, 50, len(data) - 1):
        with pytest.raises(StoreError, match="cannot be read"):
            decode_target(data[:length])
    with pytest.raises(StoreError, match="cannot be read"):
        decode_target(save({"weights": np.zeros(3, dtype=np.float32)}))


def test_bytes_of_a_later_format_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seekr.teacher._FORMAT", 2)
    data = encode_target(taught()[0])
    monkeypatch.undo()
    with pytest.raises(StoreError, match="its format is 2 and this version reads 1"):
        decode_target(data)
    assert "meta" in load(data)


def test_values_that_cannot_be_stored_are_refused() -> None:
    target = taught()[0]
    with pytest.raises(StoreError, match="float16 cannot hold"):
        encode_target(replace(target, logits_AV=np.full((2, 3), 1e6)), "float16")
    with pytest.raises(StoreError, match="NaN"):
        encode_target(replace(target, logits_AV=np.full((2, 3), np.nan)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_collated_targets_lie_where_the_student_puts_its_own_rows(side) -> None:
    targets, batch = taught("right"), tiny.batch(side, multiple_of=4)
    joined = collate_targets(targets, batch)
    model = tiny.build("llama-gqa")
    probe = RowProbe(joined.heads_by_layer, joined.positions_BQ)
    with probing(model, probe), torch.no_grad():
        logits = model(
            batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=token_positions(batch.attention_mask_BT),
        ).logits
    for layer in HEADS:
        found = joined.teacher_rows[layer]
        torch.testing.assert_close(found, probe.log_rows[layer].exp(), rtol=1e-9, atol=1e-12)
        expected = (joined.positions_BQ >= 0)[:, None].expand_as(joined.valid[layer])
        assert torch.equal(joined.valid[layer], expected)
    student = logits[joined.logit_row_A, joined.logit_position_A]
    torch.testing.assert_close(joined.logits_AV, student, rtol=1e-9, atol=1e-12)
    assert joined.logit_row_A.tolist() == [0, 0, 1, 1, 2, 2]


def test_rows_of_different_tasks_are_joined_on_the_union_of_their_heads() -> None:
    batch = tiny.batch()
    model = tiny.build("llama-gqa")
    first = teach_batch(model, batch, {0: (1, 3)}, QUERIES, logits=True)[0]
    second = teach_batch(model, batch, {0: (2, 3), 1: (0,)}, QUERIES, logits=False)[1]
    joined = collate_targets([first, second, None], batch)
    assert joined.heads_by_layer == {0: (1, 2, 3), 1: (0,)}
    own = joined.valid[0].any(dim=-1).tolist()
    assert own == [[True, False, True], [False, True, True], [False, False, False]]
    assert joined.valid[1].sum(dim=(1, 2)).tolist() == [0, 2, 0]
    found = joined.teacher_rows[0]
    assert np.array_equal(found[0, [0, 2], :3], first.attention[0])
    assert np.array_equal(found[1, 1:, :2, :5], second.attention[0])
    assert found[1, 0].sum() == 0 and found[2].sum() == 0 and found[1, :, 2].sum() == 0
    assert joined.positions_BQ.tolist() == [[0, 4, 8], [1, 4, -1], [-1, -1, -1]]
    assert joined.logit_row_A.tolist() == [0, 0] and joined.logits_AV.shape == (2, tiny.VOCAB)


def test_moving_targets_keeps_every_value() -> None:
    joined = collate_targets(taught(), tiny.batch())
    moved = joined.to("cpu")
    assert torch.equal(moved.positions_BQ, joined.positions_BQ)
    assert all(torch.equal(moved.teacher_rows[k], joined.teacher_rows[k]) for k in HEADS)
    assert joined.to("meta").logits_AV.device.type == "meta"


def test_targets_of_another_row_or_length_are_refused() -> None:
    targets, batch = taught(), tiny.batch()
    with pytest.raises(DataError, match="row-0-0 was made for 5 tokens and the row has 9"):
        collate_targets([targets[1], targets[1], targets[2]], batch)
    longer = replace(targets[0], logits_AV=np.zeros((3, tiny.VOCAB), dtype=np.float32))
    with pytest.raises(DataError, match="3 answer logits and the row 2 answer tokens"):
        collate_targets([longer, *targets[1:]], batch)
    with pytest.raises(ValueError, match="2 targets for a batch of 3"):
        collate_targets(targets[:2], batch)


def test_query_positions_outside_a_row_are_refused() -> None:
    with pytest.raises(DataError, match=r"5 tokens and a query position of 5; 0\.\.4"):
        place_positions([QUERIES[0], np.array([5]), QUERIES[2]], tiny.batch())
