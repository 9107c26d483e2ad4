"""The student's KL while it runs forward: values, gradients, and the ways a training runs it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointError

from seekr.attention import probing
from seekr.attention_kl import reduce_attention_kl
from seekr.batch_targets import BatchTargets, collate_targets
from seekr.collation import Batch, collate
from seekr.distillation import DistillationProbe
from seekr.forward import batch_logits
from seekr.sparse_rows import concatenate
from seekr.teacher import Keep, teach_batch
from tests.seekr import reference, tiny

HEADS = {0: (0, 3), 2: (1, 2, 3)}
QUERIES = [np.array([0, 4, 8]), np.array([1, 4]), np.array([3, 5, 6])]
# Heads frozen per task: every row has its own.
FROZEN = [{0: (0, 3), 2: (1,)}, {2: (0, 1, 2)}, {0: (1,), 1: (2, 3)}]


def taught(name: str, batch: Batch, exact: bool = True, keep: int | None = None) -> BatchTargets:
    teacher = tiny.build(name, seed=1, exact=exact)
    kept = Keep(attention=keep)
    return collate_targets(
        teach_batch(teacher, batch, HEADS, QUERIES, logits=False, keep=kept), batch
    )


def probe_for(targets: BatchTargets) -> DistillationProbe:
    return DistillationProbe(targets.heads_by_layer, targets.positions_BQ, targets.attention)


def distil(
    model: nn.Module, batch: Batch, targets: BatchTargets, *, autocast: bool = False
) -> Tensor:
    """Run forward and backward; return the loss. Gradients are added to the parameters'."""
    probe = probe_for(targets)
    with probing(model, probe):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = batch_logits(model, batch)
        kl_B = reduce_attention_kl(probe.kl_by_layer, targets.valid, "sum")
        loss = kl_B.sum() + logits.to(kl_B.dtype).square().mean()
        loss.backward()
    return loss.detach()


def equal_gradients(found: nn.Module, wanted: nn.Module, rtol: float, atol: float) -> None:
    pairs = list(zip(found.parameters(), wanted.parameters(), strict=True))
    assert any(slow.grad is not None and slow.grad.any() for _, slow in pairs)
    for fast, slow in pairs:
        torch.testing.assert_close(fast.grad, slow.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_kl_equals_equation_12_row_by_row_with_heads_frozen_per_task(name: str, side) -> None:
    batch = tiny.batch(side)
    queries = [np.array([0, 4, 8]), np.array([1, 4]), np.arange(7)]
    teacher, student = tiny.build(name, seed=1), tiny.build(name)
    targets = [
        teach_batch(teacher, batch, heads, queries, logits=False)[index]
        for index, heads in enumerate(FROZEN)
    ]
    joined = collate_targets(targets, batch)
    probe = probe_for(joined)
    with probing(student, probe), torch.no_grad():
        batch_logits(student, batch)
    slow = [tiny.build(name, attention="reference", seed=seed) for seed in (1, 0)]
    for index, row in enumerate(tiny.rows()):
        expected = reference.attention_distillation(*slow, row, FROZEN[index], queries[index])
        for reduction, wanted in zip(("sum", "mean"), expected, strict=True):
            found = reduce_attention_kl(probe.kl_by_layer, joined.valid, reduction)[index]
            assert math.isclose(found, wanted, rel_tol=1e-6)


@pytest.mark.parametrize("keep", [None, 2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_gradients_of_parameters_equal_those_through_the_reference_maps(
    name: str, side, keep: int | None
) -> None:
    batch = tiny.batch(side)
    targets = taught(name, batch, keep=keep)
    model, slow = tiny.build(name), tiny.build(name, attention="reference")
    probe = probe_for(targets)
    with probing(model, probe):
        batch_logits(model, batch)
    loss = reduce_attention_kl(probe.kl_by_layer, targets.valid, "sum").sum()
    loss.backward()
    expected = torch.zeros((), dtype=torch.float64)
    for index, row in enumerate(tiny.rows()):
        maps = reference.forward(slow, row)[1]
        start, length = int(batch.start_B[index]), len(row.input_ids)
        for layer, heads in HEADS.items():
            stored, shape = targets.attention[layer], targets.valid[layer].shape
            dense = stored.dense_RC(batch.input_ids_BT.shape[1]).view(*shape, -1)
            tails = stored.tail_R.view(shape)
            for slot, head in enumerate(heads):
                for order, query in enumerate(QUERIES[index]):
                    t = dense[index, slot, order, start : start + length]
                    p, tail = maps[layer][0, head, query], tails[index, slot, order]
                    kept = t > 0
                    expected = expected + (t[kept] * (t[kept] / p[kept]).log()).sum()
                    if tail > 0:
                        expected = expected + tail * (tail / p[~kept].sum()).log()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for found, wanted in zip(model.parameters(), slow.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_activation_checkpointing_gives_the_same_loss_and_gradients(name: str) -> None:
    batch = tiny.batch("left")
    targets = taught(name, batch)
    plain, checkpointed = tiny.build(name).train(), tiny.build(name).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(distil(checkpointed, batch, targets), distil(plain, batch, targets))
    equal_gradients(checkpointed, plain, rtol=1e-12, atol=1e-14)


def test_a_layer_that_runs_again_in_backward_keeps_the_first_values() -> None:
    batch = tiny.batch()
    targets = taught("llama2-gqa", batch)
    model, probe = tiny.build("llama2-gqa").train(), probe_for(targets)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with probing(model, probe):
        batch_logits(model, batch)
        first = dict(probe.kl_by_layer)
        reduce_attention_kl(first, targets.valid).sum().backward()
    assert sorted(first) == sorted(HEADS)
    assert all(probe.kl_by_layer[layer] is first[layer] for layer in HEADS)


def test_checkpointed_backward_outside_probing_fails_loudly() -> None:
    batch = tiny.batch()
    targets = taught("llama2-gqa", batch)
    model, probe = tiny.build("llama2-gqa").train(), probe_for(targets)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with probing(model, probe):
        batch_logits(model, batch)
    with pytest.raises(CheckpointError, match="different number of tensors"):
        reduce_attention_kl(probe.kl_by_layer, targets.valid).sum().backward()


def test_reentrant_checkpointing_is_refused_instead_of_losing_the_gradient() -> None:
    batch = tiny.batch()
    model, probe = tiny.build("llama2-gqa").train(), probe_for(taught("llama2-gqa", batch))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with probing(model, probe), pytest.raises(RuntimeError, match="use_reentrant=False"):
        batch_logits(model, batch)


def test_a_compiled_model_gives_the_same_loss_and_gradients_with_and_without_a_probe() -> None:
    batch = tiny.batch("left")
    targets = taught("mistral-window-gqa", batch)
    eager, inner = (tiny.build("mistral-window-gqa").train() for _ in range(2))
    compiled = torch.compile(inner, backend="aot_eager")
    try:
        for _ in range(2):  # the second time finds what the first compiled
            torch.testing.assert_close(batch_logits(compiled, batch), batch_logits(eager, batch))
            expected, found = distil(eager, batch, targets), distil(compiled, batch, targets)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
            equal_gradients(inner, eager, rtol=1e-6, atol=1e-11)
        graphs = counters["stats"]["unique_graphs"]
        for _ in range(2):
            batch_logits(compiled, batch)
            distil(compiled, batch, targets)
        assert counters["stats"]["unique_graphs"] == graphs
    finally:
        torch.compiler.reset()


def test_ddp_and_fsdp2_give_the_same_loss_and_gradients(tmp_path: Path) -> None:
    batch = tiny.batch()
    targets = taught("llama2-gqa", batch, exact=False)
    plain = tiny.build("llama2-gqa", exact=False)
    expected = distil(plain, batch, targets)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(tiny.build("llama2-gqa", exact=False))
        sharded = tiny.build("llama2-gqa", exact=False)
        mesh = distributed.init_device_mesh("cpu", (1,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for model in (ddp, sharded):
            assert torch.equal(distil(model, batch, targets), expected)
            for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
                grad = found.grad.full_tensor() if model is sharded else found.grad
                torch.testing.assert_close(grad, wanted.grad, rtol=1e-5, atol=1e-7)
    finally:
        distributed.destroy_process_group()


def test_autocast_lowers_the_projections_and_not_the_kl() -> None:
    batch = tiny.batch()
    targets = taught("llama2-gqa", batch, exact=False)
    plain, cast = (tiny.build("llama2-gqa", exact=False) for _ in range(2))
    expected, found = distil(plain, batch, targets), distil(cast, batch, targets, autocast=True)
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=0)
    probe = probe_for(targets)
    with probing(cast, probe), torch.autocast("cpu", dtype=torch.bfloat16):
        batch_logits(cast, batch)
    assert {kl.dtype for kl in probe.kl_by_layer.values()} == {torch.float32}
    own = taught(
        "llama2-gqa", batch, exact=False
    )  # a student that is its teacher, but for bfloat16
    same = probe_for(own)
    teacher = tiny.build("llama2-gqa", seed=1, exact=False)
    with probing(teacher, same), torch.autocast("cpu", dtype=torch.bfloat16):
        batch_logits(teacher, batch)
    assert all((kl >= -1e-6).all() and (kl < 0.05).all() for kl in same.kl_by_layer.values())


@pytest.mark.parametrize("name", tiny.MODELS)
def test_packed_rows_cost_what_they_cost_alone(name: str) -> None:
    batch = tiny.batch("right")
    targets = taught(name, batch)
    alone, packed = tiny.build(name), tiny.build(name)
    probe = probe_for(targets)
    with probing(alone, probe):
        batch_logits(alone, batch)
    expected = reduce_attention_kl(probe.kl_by_layer, targets.valid, "sum").sum()
    expected.backward()

    rows = tiny.rows()
    lengths = [len(row.input_ids) for row in rows]
    starts = np.cumsum([0, *lengths])
    singles = [taught_alone(name, index) for index in range(len(rows))]
    heads = {layer: tuple(chosen) for layer, chosen in HEADS.items()}
    places = [queries + starts[index] for index, queries in enumerate(QUERIES)]
    positions = torch.from_numpy(np.concatenate(places))[None]
    together = {}
    for layer, chosen in heads.items():
        parts = []
        for slot in range(len(chosen)):
            for index, single in enumerate(singles):
                own = single.attention[layer]
                count = len(QUERIES[index])
                cut = own.cut(slot * count, (slot + 1) * count)
                parts.append(replace(cut, columns_N=cut.columns_N + int(starts[index])))
        together[layer] = concatenate(parts)
    probe = DistillationProbe(heads, positions, together)
    ids = torch.from_numpy(np.concatenate([row.input_ids for row in rows]).astype(np.int64))
    place = torch.cat([torch.arange(length) for length in lengths])
    with probing(packed, probe):
        packed(input_ids=ids[None], position_ids=place[None], use_cache=False)
    found = sum(kl.sum() for kl in probe.kl_by_layer.values())
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    for fast, slow in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-6, atol=1e-11)


def taught_alone(name: str, index: int) -> BatchTargets:
    """Return the targets of one row in a batch of its own."""
    batch = collate([tiny.rows()[index]], tiny.PAD_ID, "right")
    teacher = tiny.build(name, seed=1)
    return collate_targets(
        teach_batch(teacher, batch, HEADS, [QUERIES[index]], logits=False), batch
    )
