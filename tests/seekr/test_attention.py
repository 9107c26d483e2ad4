"""The registered attention is the stock one, and probes see its maps exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointError

from seekr.attention import probing, register
from seekr.errors import ConfigError, UnsupportedModel
from seekr.forward import batch_logits
from seekr.probes import RowProbe
from seekr.score_probes import GradientProbe
from seekr.softmax import masked_log_softmax
from seekr.teacher import place_positions
from tests.seekr import reference, tiny

HEADS = {0: (0, 3), 2: (1, 2, 3)}
QUERIES = [np.array([0, 4, 8]), np.array([1, 4]), np.array([3, 5, 6])]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_output_equals_stock_sdpa_bit_for_bit_with_and_without_a_probe(name: str, side) -> None:
    batch = tiny.batch(side)
    stock = batch_logits(tiny.build(name, attention="sdpa", exact=False), batch)
    model = tiny.build(name, exact=False)
    assert torch.equal(batch_logits(model, batch), stock)
    with probing(model, RowProbe(HEADS, place_positions(QUERIES, batch))):
        assert torch.equal(batch_logits(model, batch), stock)
    with probing(model, GradientProbe(batch.attention_mask_BT.bool())):
        assert torch.equal(batch_logits(model, batch), stock)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_equal_the_reference_attention_and_padding_takes_no_part(name: str, side) -> None:
    batch = tiny.batch(side)
    logits = batch_logits(tiny.build(name), batch)
    model = tiny.build(name, attention="reference")
    for index, row in enumerate(tiny.rows()):
        start = int(batch.start_B[index])
        expected, _ = reference.forward(model, row)
        found = logits[index, start : start + len(row.input_ids)]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_registering_twice_changes_nothing() -> None:
    before = batch_logits(tiny.build("llama2-gqa"), tiny.batch())
    register()
    assert torch.equal(batch_logits(tiny.build("llama2-gqa"), tiny.batch()), before)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_row_probe_returns_the_rows_of_the_reference_maps(name: str, side) -> None:
    batch = tiny.batch(side, multiple_of=4)
    model, slow = tiny.build(name), tiny.build(name, attention="reference")
    probe = RowProbe(HEADS, place_positions(QUERIES, batch))
    with probing(model, probe):
        batch_logits(model, batch)
    assert sorted(probe.log_rows) == sorted(HEADS)
    for index, row in enumerate(tiny.rows()):
        maps = reference.forward(slow, row)[1]
        start, queries = int(batch.start_B[index]), QUERIES[index]
        for layer, heads in HEADS.items():
            found = probe.log_rows[layer][index].exp()
            expected = torch.zeros_like(found)
            rows = maps[layer][0][list(heads)][:, queries]
            expected[:, : len(queries), start : start + len(row.input_ids)] = rows
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_activation_checkpointing_gives_the_same_gradients_and_keeps_the_first_rows() -> None:
    batch = tiny.batch()
    plain, checkpointed = tiny.build("llama2-gqa").train(), tiny.build("llama2-gqa").train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        probe = RowProbe(HEADS, place_positions(QUERIES, batch))
        with probing(model, probe):
            logits = batch_logits(model, batch)
            rows = dict(probe.log_rows)
            loss = sum(value.exp().square().sum() for value in rows.values()) + logits.sum()
            loss.backward()
        assert all(probe.log_rows[layer] is rows[layer] for layer in HEADS)
    for found, wanted in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-14)


def test_checkpointed_backward_outside_probing_fails_loudly() -> None:
    batch = tiny.batch()
    model = tiny.build("llama2-gqa").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    probe = RowProbe(HEADS, place_positions(QUERIES, batch))
    with probing(model, probe):
        batch_logits(model, batch)
    loss = sum(value.exp().square().sum() for value in probe.log_rows.values())
    with pytest.raises(CheckpointError, match="different number of tensors"):
        loss.backward()


def test_reentrant_checkpointing_is_refused_instead_of_losing_the_gradient() -> None:
    batch = tiny.batch()
    model = tiny.build("llama2-gqa").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    probe = RowProbe(HEADS, place_positions(QUERIES, batch))
    with probing(model, probe), pytest.raises(RuntimeError, match="use_reentrant=False"):
        batch_logits(model, batch)


def test_autocast_does_not_lower_the_precision_of_rows() -> None:
    scores = []
    for enabled in (False, True):
        batch = tiny.batch()
        model = tiny.build("llama2-gqa", exact=False)
        probe = RowProbe({0: (0, 1, 2, 3)}, place_positions(QUERIES, batch))
        with probing(model, probe), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            batch_logits(model, batch)
        scores.append(probe.log_rows[0])
    assert scores[1].dtype == torch.float32
    finite = scores[0].isfinite()
    # Queries and keys differ by bfloat16 rounding of the projections, the rows still sum to 1.
    valid = place_positions(QUERIES, tiny.batch()) >= 0
    sums = scores[1].exp().sum(dim=-1).movedim(1, 2)[valid]
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)
    assert torch.equal(finite, scores[1].isfinite())


def test_masked_rows_never_give_nan_values_or_gradients() -> None:
    scores = torch.randn(2, 3, 4, requires_grad=True)
    allowed = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    rows = masked_log_softmax(scores, allowed)
    assert torch.equal(rows.isfinite(), allowed.expand_as(rows))
    rows.backward(torch.where(allowed, 1.0, torch.nan).expand_as(rows))
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert (scores.grad[:, 1] == 0).all()


def test_probing_needs_the_registered_attention() -> None:
    model, probe = tiny.build("llama2-mha", attention="sdpa"), row_probe()
    with pytest.raises(ConfigError, match="attn_implementation='sdpa'"), probing(model, probe):
        pass


def test_probing_twice_at_once_is_refused_and_leaves_the_first_attached() -> None:
    model, first = tiny.build("llama2-mha"), row_probe()
    with probing(model, first):
        with pytest.raises(RuntimeError, match="already being probed"), probing(model, row_probe()):
            pass
        batch_logits(model, tiny.batch())
    assert sorted(first.log_rows) == sorted(HEADS)


def test_probe_is_detached_after_an_exception() -> None:
    model, probe = tiny.build("llama2-mha"), row_probe()
    with pytest.raises(KeyboardInterrupt), probing(model, probe):
        raise KeyboardInterrupt
    batch_logits(model, tiny.batch())
    assert probe.log_rows == {}
    with probing(model, probe):
        batch_logits(model, tiny.batch())
    assert sorted(probe.log_rows) == sorted(HEADS)


def test_unknown_layers_and_heads_are_refused() -> None:
    model = tiny.build("llama2-mha")
    positions_BQ = place_positions(QUERIES, tiny.batch())
    layer, head = RowProbe({9: (0,)}, positions_BQ), RowProbe({0: (4,)}, positions_BQ)
    message = r"layer 9; the model has layers 0\.\.2"
    with pytest.raises(ConfigError, match=message), probing(model, layer):
        pass
    with probing(model, head), pytest.raises(ValueError, match=r"heads 0\.\.3"):
        batch_logits(model, tiny.batch())


def test_additive_masks_and_cached_keys_are_refused_under_a_probe() -> None:
    model, batch = tiny.build("llama2-mha"), tiny.batch()
    with probing(model, row_probe()):
        with pytest.raises(UnsupportedModel, match="additive"):
            model(batch.input_ids_BT, attention_mask=torch.zeros(3, 1, 9, 9, dtype=torch.float64))
        with pytest.raises(ValueError, match="use_cache=False"):
            cache = model.model(batch.input_ids_BT, use_cache=True).past_key_values
            model(batch.input_ids_BT[:, :1], past_key_values=cache, use_cache=True)


def row_probe() -> RowProbe:
    return RowProbe(HEADS, place_positions(QUERIES, tiny.batch()))


def test_probes_work_inside_ddp_and_fsdp2(tmp_path: Path) -> None:
    batch = tiny.batch()
    alone = RowProbe(HEADS, place_positions(QUERIES, batch))
    plain = tiny.build("llama2-gqa", seed=1, exact=False)
    with probing(plain, alone):
        batch_logits(plain, batch)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(tiny.build("llama2-gqa", seed=1, exact=False))
        sharded = tiny.build("llama2-gqa", seed=1, exact=False)
        mesh = distributed.init_device_mesh("cpu", (1,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for model in (ddp, sharded):
            probe = RowProbe(HEADS, place_positions(QUERIES, batch))
            with probing(model, probe):
                batch_logits(model, batch).sum().backward()
            assert sorted(probe.log_rows) == sorted(HEADS)
            assert all(torch.equal(probe.log_rows[at], alone.log_rows[at]) for at in HEADS)
    finally:
        distributed.destroy_process_group()
