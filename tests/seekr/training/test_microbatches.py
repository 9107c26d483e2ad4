"""A step's rows cut for workers: none is lost, none is counted twice, and loss stays what it is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from seekr.batch_targets import collate_targets
from seekr.batches import StepRows
from seekr.collation import collate
from seekr.forward import batch_logits
from seekr.losses import answer_nll
from seekr.prompts import TokenizedRow
from seekr.teacher import teach_batch
from seekr.teacher_store import decode_target, encode_target
from seekr.training.microbatches import MicroBatch, TrainingRows, first_fit_decreasing
from tests.seekr import tiny

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=24)
REPLAY = st.lists(st.integers(1, 12), max_size=12)
WORLD = st.integers(1, 5)
SIZE = st.integers(1, 4)
PACK = st.none() | st.integers(1, 40)


def rows_of(kind: str, lengths: list[int]) -> list[TokenizedRow]:
    return [
        TokenizedRow(
            row_id=f"{kind}-{index}",
            input="",
            references=("",),
            input_ids=np.full(length, 1 + index, dtype=np.int32),
            prompt_length=0,
        )
        for index, length in enumerate(lengths)
    ]


def training_rows(task: list[int], replay: list[int]) -> tuple[TrainingRows, StepRows]:
    """Rows of these lengths, with their own id as target, and a step that has each, backwards."""
    task_rows, replay_rows = rows_of("task", task), rows_of("replay", replay)
    rows = TrainingRows(
        task=task_rows,
        task_ids=[row.row_id for row in task_rows],
        replay=replay_rows,
        replay_ids=[row.row_id for row in replay_rows],
        targets=[row.row_id.encode() for row in replay_rows],
    )
    step = StepRows(epoch=0, task=np.arange(len(task))[::-1], replay=np.arange(len(replay))[::-1])
    return rows, step


def ids_of(passes: list[MicroBatch]) -> list[str]:
    """The rows that count, pass after pass."""
    return [row.row_id for one in passes if one.counts for row in one.rows]


def tokens_of(one: MicroBatch) -> int:
    return sum(len(row.input_ids) for row in one.rows)


@settings(max_examples=150, deadline=None)
@given(task=LENGTHS, replay=REPLAY, world=WORLD, size=SIZE, pack=PACK)
def test_every_row_of_a_step_counts_exactly_once_over_all_workers(
    task: list[int], replay: list[int], world: int, size: int, pack: int | None
) -> None:
    rows, step = training_rows(task, replay)
    workers = [rows.micro_batches(step, rank, world, size, pack) for rank in range(world)]
    counted = Counter(row_id for passes in workers for row_id in ids_of(passes))
    assert counted == Counter([*rows.task_ids, *rows.replay_ids])


@settings(max_examples=150, deadline=None)
@given(task=LENGTHS, replay=REPLAY, world=WORLD, size=SIZE, pack=PACK)
def test_all_workers_make_the_same_passes_and_an_idle_one_counts_for_nothing(
    task: list[int], replay: list[int], world: int, size: int, pack: int | None
) -> None:
    rows, step = training_rows(task, replay)
    workers = [rows.micro_batches(step, rank, world, size, pack) for rank in range(world)]
    for together in zip(*workers, strict=True):
        assert len({(one.replay, one.packed) for one in together}) == 1
        # Idle passes are there for the workers that have one, and take the cheapest row.
        assert any(one.counts for one in together)
        for one in together:
            source = replay if one.replay else task
            assert one.counts or [tokens_of(one)] == [min(source)]
            assert one.packed or 1 <= len(one.rows) <= size
            assert one.packed == (pack is not None and not one.replay)


@settings(max_examples=100, deadline=None)
@given(task=LENGTHS, replay=REPLAY, world=WORLD, size=SIZE, pack=PACK)
def test_replay_rows_keep_their_targets_beside_them(
    task: list[int], replay: list[int], world: int, size: int, pack: int | None
) -> None:
    rows, step = training_rows(task, replay)
    for one in rows.micro_batches(step, world - 1, world, size, pack):
        expected = [row.row_id.encode() for row in one.rows] if one.replay else None
        assert one.targets == expected


@settings(max_examples=100, deadline=None)
@given(task=LENGTHS, replay=REPLAY, size=SIZE)
def test_rows_go_longest_first_and_ties_stay_in_the_steps_order(
    task: list[int], replay: list[int], size: int
) -> None:
    rows, step = training_rows(task, replay)
    expected = [
        *sorted((rows.task[i] for i in step.task), key=lambda row: -len(row.input_ids)),
        *sorted((rows.replay[i] for i in step.replay), key=lambda row: -len(row.input_ids)),
    ]
    assert ids_of(rows.micro_batches(step, 0, 1, size)) == [row.row_id for row in expected]


@settings(max_examples=150, deadline=None)
@given(task=LENGTHS, world=WORLD, pack=st.integers(1, 40))
def test_packs_stay_within_their_limit_and_do_not_depend_on_workers(
    task: list[int], world: int, pack: int
) -> None:
    rows, step = training_rows(task, [])
    workers = [rows.micro_batches(step, rank, world, 1, pack) for rank in range(world)]
    packs = [one for passes in workers for one in passes if one.counts]
    assert all(tokens_of(one) <= max(pack, max(task)) for one in packs)
    alone = rows.micro_batches(step, 0, 1, 1, pack)
    assert Counter(tuple(ids_of([one])) for one in packs) == Counter(
        tuple(ids_of([one])) for one in alone
    )


@settings(max_examples=150, deadline=None)
@given(task=LENGTHS, world=WORLD, size=SIZE, pack=PACK)
def test_workers_tokens_differ_by_at_most_a_pass(
    task: list[int], world: int, size: int, pack: int | None
) -> None:
    rows, step = training_rows(task, [])
    workers = [rows.micro_batches(step, rank, world, size, pack) for rank in range(world)]
    loads = [sum(tokens_of(one) for one in passes if one.counts) for passes in workers]
    largest = max(task) if pack is None else max(tokens_of(one) for one in workers[0])
    assert max(loads) - min(loads) <= largest


@given(lengths=LENGTHS, limit=st.integers(1, 30))
def test_first_fit_opens_a_pack_only_where_no_other_has_room(
    lengths: list[int], limit: int
) -> None:
    lengths = sorted(lengths, reverse=True)
    packs = first_fit_decreasing(lengths, limit)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in pack) for pack in packs]
    for place, pack in enumerate(packs):
        assert totals[place] <= limit or len(pack) == 1
        first = pack[0]
        for before in packs[:place]:
            held = sum(lengths[index] for index in before if index < first)
            assert held + lengths[first] > limit


def test_a_row_longer_than_the_limit_is_packed_alone_and_raises_the_limit_to_its_length() -> None:
    rows, step = training_rows([3, 9, 4, 5], [])
    found = rows.micro_batches(step, 0, 1, 1, 6)
    assert [[len(row.input_ids) for row in one.rows] for one in found] == [[9], [5, 4], [3]]


def test_one_row_is_packed_alone_and_an_empty_replay_makes_no_pass() -> None:
    rows, step = training_rows([5], [])
    (found,) = rows.micro_batches(step, 0, 1, 4, 100)
    assert found.counts and found.packed and ids_of([found]) == ["task-0"]
    batch, targets = found.tensors(0, torch.device("cpu"))
    assert batch.input_ids_BT.shape == (1, 5) and targets is None
    (idle,) = rows.micro_batches(step, 1, 2, 4, 100)
    assert not idle.counts and tokens_of(idle) == 5


def test_counts_are_of_the_whole_step_and_never_zero() -> None:
    rows = TrainingRows(
        task=tiny.rows((5, 7), answer=2),
        task_ids=["a/0", "a/1"],
        replay=tiny.rows((6,), answer=3),
        replay_ids=["b/0"],
        targets=None,
    )
    both = StepRows(epoch=0, task=np.array([1, 0]), replay=np.array([0, 0]))
    assert rows.counts(both) == {
        "task_tokens": 4,
        "task_rows": 2,
        "replay_tokens": 6,
        "replay_rows": 2,
        "tokens": 24,
    }
    alone = StepRows(epoch=0, task=np.array([1]), replay=np.zeros(0, dtype=np.int64))
    assert rows.counts(alone) == {
        "task_tokens": 2,
        "task_rows": 1,
        "replay_tokens": 1,
        "replay_rows": 1,
        "tokens": 7,
    }


def test_targets_are_decoded_for_the_rows_of_their_pass() -> None:
    replay = tiny.rows((5, 9, 7))
    queries = [np.array([1, 4]), np.array([0, 4, 8]), np.array([3, 5, 6])]
    teacher = tiny.build("llama2-gqa")
    taught = teach_batch(teacher, collate(replay, 0), {0: (1, 2)}, queries, logits=True)
    encoded = [encode_target(target) for target in taught]
    rows = TrainingRows(
        task=replay,
        task_ids=["a", "b", "c"],
        replay=replay,
        replay_ids=["a", "b", "c"],
        targets=encoded,
    )
    step = StepRows(epoch=0, task=np.arange(3), replay=np.arange(3))
    passes = rows.micro_batches(step, 0, 1, 2, 100)
    assert [one.replay for one in passes] == [False, True, True]
    batch, targets = passes[1].tensors(0, torch.device("cpu"))
    assert batch.row_ids == (replay[1].row_id, replay[2].row_id) and targets is not None
    expected = collate_targets([decode_target(encoded[1]), decode_target(encoded[2])], batch)
    assert torch.equal(targets.positions_BQ, expected.positions_BQ)
    assert isinstance(targets.logits, torch.Tensor) and isinstance(expected.logits, torch.Tensor)
    assert torch.equal(targets.logits, expected.logits)


def loss_of(model: nn.Module, passes: list[MicroBatch]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for one in passes:
        batch, _ = one.tensors(tiny.PAD_ID, torch.device("cpu"))
        nll_B, _ = answer_nll(batch_logits(model, batch), batch.labels_BT)
        total = total + nll_B.sum() * float(one.counts)
    return total


@pytest.mark.parametrize("name", tiny.MODELS)
def test_packing_and_workers_change_neither_loss_nor_gradient(name: str) -> None:
    task = tiny.rows((9, 5, 7, 3, 8))
    rows = TrainingRows(
        task=task, task_ids=[row.row_id for row in task], replay=[], replay_ids=[], targets=None
    )
    step = StepRows(epoch=0, task=np.arange(5), replay=np.zeros(0, dtype=np.int64))
    alone, packed = tiny.build(name), tiny.build(name)
    expected = loss_of(alone, rows.micro_batches(step, 0, 1, 1))
    passes = [one for rank in range(2) for one in rows.micro_batches(step, rank, 2, 1, 13)]
    assert max(len(one.rows) for one in passes) > 1
    found = loss_of(packed, passes)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    expected.backward()
    found.backward()
    for fast, slow in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-9, atol=1e-11)
