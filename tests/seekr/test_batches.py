"""Which rows a step sees, whatever the world size, the micro-batch or the ratio."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekr.batches import BatchPlan, num_micro_batches, share


def plan(rows: int, replay: int = 0, **changes: object) -> BatchPlan:
    values: dict[str, object] = {
        "row_ids": [f"row-{i}" for i in range(rows)],
        "replay_ids": [f"old-{i}" for i in range(replay)],
        "epochs": 2,
        "batch_size": 4,
        "batch_ratio": 0.5,
        "seed": 3,
    }
    return BatchPlan(**(values | changes))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    replay=st.integers(1, 30),
    batch_size=st.integers(1, 16),
    ratio=st.sampled_from([0.01, 0.1, 1 / 3, 0.5, 1.0, 2.5]),
)
def test_every_epoch_sees_each_row_once_and_replay_keeps_its_ratio_exactly(
    rows: int, replay: int, batch_size: int, ratio: float
) -> None:
    found = plan(rows, replay, batch_size=batch_size, batch_ratio=ratio, epochs=3)
    steps = [found.step(index) for index in range(found.num_steps)]
    for epoch in range(3):
        seen = np.concatenate([step.task for step in steps if step.epoch == epoch])
        assert sorted(seen) == list(range(rows))
    replayed = np.concatenate([step.replay for step in steps])
    assert len(replayed) == int(Fraction(str(ratio)) * 3 * rows)
    whole_passes = len(replayed) // replay * replay
    counts = np.bincount(replayed[:whole_passes].astype(int), minlength=replay)
    assert (counts == len(replayed) // replay).all()


def test_a_replay_set_larger_than_the_task_is_used_all_the_same() -> None:
    found = plan(4, 100, batch_ratio=1.0, epochs=5)
    used = {int(i) for index in range(found.num_steps) for i in found.step(index).replay}
    assert len(used) == 20


@given(rows=st.integers(0, 50), world=st.integers(1, 7), size=st.integers(1, 9))
def test_workers_share_a_step_without_loss_and_make_equally_many_passes(
    rows: int, world: int, size: int
) -> None:
    step = np.arange(rows)
    shares = [share(step, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares)) == list(range(rows))
    passes = num_micro_batches(rows, world, size)
    assert all(-(-len(own) // size) <= passes for own in shares)
    assert passes == max(-(-len(own) // size) for own in shares)


def test_the_order_changes_with_the_seed_and_the_epoch_and_not_with_the_input_order() -> None:
    ids = [f"row-{i}" for i in range(20)]
    forth, back = plan(20, batch_size=20), plan(20, batch_size=20, row_ids=ids[::-1])
    first = [ids[i] for i in forth.step(0).task]
    assert first == [ids[::-1][i] for i in back.step(0).task]
    assert first != [ids[i] for i in forth.step(1).task]
    assert first != [ids[i] for i in plan(20, batch_size=20, seed=4).step(0).task]


def test_a_step_outside_the_training_is_an_error() -> None:
    with pytest.raises(IndexError, match="outside"):
        plan(4).step(2)
