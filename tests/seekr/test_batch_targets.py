"""Targets of single rows on the padding of a batch, against each row's own numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seekr.attention import probing
from seekr.batch_targets import BatchTargets, collate_targets
from seekr.collation import collate
from seekr.errors import DataError
from seekr.forward import batch_logits
from seekr.probes import RowProbe
from seekr.sparse_rows import SparseRows, keep_largest
from seekr.teacher import Keep, TeacherTarget, teach_batch
from tests.seekr import tiny

HEADS = {0: (0, 3), 2: (1, 2, 3)}
QUERIES = [np.array([0, 4, 8]), np.array([1, 4]), np.array([3, 5, 6])]
FEW = Keep(logits=4, attention=2)


def taught(side: Any = "right", **changes: Any) -> list[TeacherTarget]:
    options = {"logits": True} | changes
    return teach_batch(tiny.build("llama2-gqa"), tiny.batch(side), HEADS, QUERIES, **options)


def entries(rows: SparseRows, index: int) -> dict[int, float]:
    """One row's columns and values."""
    row = rows.cut(index, index + 1)
    return dict(zip(row.columns_N.tolist(), row.values_N.tolist(), strict=True))


def assert_joined(joined: BatchTargets, targets: list[TeacherTarget | None], batch: Any) -> None:
    """Look up every row of every target, entry by entry, and find nothing else."""
    num_queries = joined.positions_BQ.shape[1]
    union: dict[int, set[int]] = {}
    for target in targets:
        for layer, heads in ({} if target is None else target.heads_by_layer).items():
            union.setdefault(layer, set()).update(heads)
    assert joined.heads_by_layer == {layer: tuple(sorted(union[layer])) for layer in sorted(union)}
    assert joined.attention.keys() == joined.valid.keys() == union.keys()
    for layer, heads in joined.heads_by_layer.items():
        rows = joined.attention[layer]
        assert len(rows) == len(targets) * len(heads) * num_queries
        assert joined.valid[layer].shape == (len(targets), len(heads), num_queries)
    for index, target in enumerate(targets):
        own = np.zeros(0) if target is None else target.query_positions
        start = int(batch.start_B[index])
        placed = [start + q for q in own.tolist()] + [-1] * (num_queries - len(own))
        assert joined.positions_BQ[index].tolist() == placed
        found = 0
        for layer, heads in joined.heads_by_layer.items():
            mine = () if target is None else target.heads_by_layer.get(layer, ())
            for slot, head in enumerate(heads):
                for query in range(num_queries):
                    at = (index * len(heads) + slot) * num_queries + query
                    has = head in mine and query < len(own)
                    assert bool(joined.valid[layer][index, slot, query]) == has
                    row, tail = entries(joined.attention[layer], at), joined.attention[layer].tail_R
                    if not has:
                        assert row == {} and tail[at] == 0
                        continue
                    expected = entries(target.attention, found)
                    assert row == {start + key: value for key, value in expected.items()}
                    assert tail[at] == target.attention.tail_R[found]
                    found += 1
        assert found == (0 if target is None or not target.attention else len(target.attention))


@pytest.mark.parametrize("keep", [None, FEW])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_joined_row_equals_the_rows_own(side: Any, keep: Keep | None) -> None:
    targets, batch = taught(keep=keep), tiny.batch(side, multiple_of=4)
    joined = collate_targets(targets, batch)
    assert_joined(joined, targets, batch)
    assert all(valid.any() for valid in joined.valid.values())


def draw_target(length: int, seed: int) -> TeacherTarget:
    """A target of random heads, query rows and entries; without logits."""
    source = np.random.default_rng(seed)
    layers = source.choice(3, size=source.integers(0, 4), replace=False)
    heads = {
        int(layer): tuple(sorted(source.choice(4, source.integers(1, 5), replace=False).tolist()))
        for layer in sorted(layers)
    }
    queries = np.sort(source.choice(length, source.integers(0, length + 1), replace=False))
    num_rows = sum(map(len, heads.values())) * len(queries)
    dense = torch.from_numpy(source.dirichlet(np.full(length, 0.3), num_rows))
    kept = keep_largest(dense.reshape(num_rows, length), torch.full((num_rows,), length), 2)
    return TeacherTarget(
        length=length,
        shift=True,
        logits=None,
        heads_by_layer=heads,
        query_positions=queries if heads else np.zeros(0, dtype=np.int64),
        attention=kept if heads else None,
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(3, 9), min_size=1, max_size=4).map(tuple),
    side=st.sampled_from(["left", "right"]),
    multiple_of=st.sampled_from([1, 8]),
    absent=st.sets(st.integers(0, 3)),
)
def test_targets_of_any_heads_query_rows_and_padding_are_joined(
    seed: int, lengths: tuple[int, ...], side: Any, multiple_of: int, absent: set[int]
) -> None:
    targets = [
        None if index in absent else draw_target(length, seed + index)
        for index, length in enumerate(lengths)
    ]
    batch = tiny.batch(side, lengths, multiple_of)
    assert_joined(collate_targets(targets, batch), targets, batch)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collated_targets_lie_where_the_student_puts_its_own_rows(side: Any) -> None:
    targets, batch = taught("right"), tiny.batch(side, multiple_of=4)
    joined = collate_targets(targets, batch)
    model = tiny.build("llama2-gqa")
    probe = RowProbe(joined.heads_by_layer, joined.positions_BQ)
    with probing(model, probe), torch.no_grad():
        logits = batch_logits(model, batch)
    for layer in HEADS:
        seen = probe.log_rows[layer].exp()
        found = joined.attention[layer].dense_RC(seen.shape[-1]).reshape(seen.shape)
        torch.testing.assert_close(found, seen, rtol=1e-9, atol=1e-12)
    student = logits[joined.logit_row_A, joined.logit_position_A]
    torch.testing.assert_close(joined.logits, student, rtol=1e-9, atol=1e-12)
    assert joined.logit_row_A.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_logits_follow_the_batch_rows_and_their_answers(side: Any, shift: bool) -> None:
    targets, batch = taught(keep=FEW, shift=shift), tiny.batch(side, multiple_of=4)
    joined = collate_targets([targets[0], None, targets[2]], batch)
    assert joined.logit_row_A.tolist() == [0, 0, 2, 2] and len(joined.logits) == 4
    expected = [(targets[0].logits, 0), (targets[0].logits, 1)]
    expected += [(targets[2].logits, 0), (targets[2].logits, 1)]
    for index, (rows, at) in enumerate(expected):
        assert entries(joined.logits, index) == entries(rows, at)
        assert joined.logits.tail_R[index] == rows.tail_R[at]
    starts, lengths = batch.start_B.tolist(), batch.lengths_B.tolist()
    first = [starts[row] + lengths[row] - 2 - shift for row in (0, 2)]
    assert joined.logit_position_A.tolist() == [first[0], first[0] + 1, first[1], first[1] + 1]


def test_rows_of_different_tasks_are_joined_on_the_union_of_their_heads() -> None:
    batch, model = tiny.batch(), tiny.build("llama2-gqa")
    first = teach_batch(model, batch, {0: (1, 3)}, QUERIES, logits=True)[0]
    second = teach_batch(model, batch, {0: (2, 3), 1: (0,)}, QUERIES, logits=False)[1]
    joined = collate_targets([first, second, None], batch)
    assert joined.heads_by_layer == {0: (1, 2, 3), 1: (0,)}
    own = joined.valid[0].any(dim=-1).tolist()
    assert own == [[True, False, True], [False, True, True], [False, False, False]]
    assert joined.valid[1].sum(dim=(1, 2)).tolist() == [0, 2, 0]
    assert joined.positions_BQ.tolist() == [[0, 4, 8], [1, 4, -1], [-1, -1, -1]]
    assert joined.logit_row_A.tolist() == [0, 0] and joined.logits.shape == (2, tiny.VOCAB)
    assert_joined(joined, [first, second, None], batch)


def test_a_batch_without_any_target_has_nothing_to_compare() -> None:
    joined = collate_targets([None] * 3, tiny.batch())
    assert joined.heads_by_layer == joined.attention == joined.valid == {}
    assert joined.logits is None and len(joined.logit_row_A) == 0
    assert joined.positions_BQ.shape == (3, 0)


@pytest.mark.parametrize("keep", [None, FEW])
def test_moving_targets_keeps_every_value(keep: Keep | None) -> None:
    targets, batch = taught(keep=keep), tiny.batch()
    joined = collate_targets(targets, batch)
    assert_joined(joined.to("cpu"), targets, batch)
    moved = joined.to("meta")
    parts: list[Tensor] = [moved.positions_BQ, moved.logit_row_A, moved.logit_position_A]
    parts += [*moved.valid.values(), *(rows.values_N for rows in moved.attention.values())]
    parts += [moved.logits if keep is None else moved.logits.values_N]
    assert {part.device.type for part in parts} == {"meta"}
    # How many entries a row has is read on the host, without waiting for a device.
    assert all(rows.offsets.device.type == "cpu" for rows in moved.attention.values())


def test_targets_of_a_row_that_has_another_length_now_are_refused() -> None:
    targets, batch = taught(), tiny.batch()
    with pytest.raises(DataError, match="row-0-0 was made for 5 tokens and the row has 9"):
        collate_targets([targets[1], targets[1], targets[2]], batch)


@pytest.mark.parametrize("keep", [None, FEW])
def test_targets_of_another_answer_are_refused(keep: Keep | None) -> None:
    targets, batch = taught(keep=keep), tiny.batch()
    longer = collate(tiny.rows(answer=3), tiny.PAD_ID)
    with pytest.raises(DataError, match="row-0-0 has 2 answer logits and the row 3 answer tokens"):
        collate_targets(targets, longer)
    with pytest.raises(ValueError, match="2 targets for a batch of 3"):
        collate_targets(targets[:2], batch)


def test_query_positions_outside_their_row_are_refused() -> None:
    targets = taught()
    beyond = replace(targets[1], query_positions=np.array([1, 5]))
    with pytest.raises(DataError, match="5 tokens and a query position of 5"):
        collate_targets([targets[0], beyond, targets[2]], tiny.batch())


def test_whole_and_kept_logits_in_one_batch_are_refused() -> None:
    whole, kept = taught(), taught(keep=FEW)
    with pytest.raises(
        DataError, match="2 rows of the batch carry whole logits and 1 their largest"
    ):
        collate_targets([whole[0], kept[1], whole[2]], tiny.batch())
