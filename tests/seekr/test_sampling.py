"""Draws are pure functions of seed and content."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekr.errors import ConfigError, DataError
from seekr.sampling import draw, epoch_order, priority, query_positions, replay_size

ROWS = [f"{index:032x}" for index in range(300)]


def test_draws_are_pinned_so_that_no_upgrade_changes_a_stream() -> None:
    assert priority(0, "a") == 17356894160415517889
    assert draw(ROWS, 3, seed=0) == [ROWS[68], ROWS[97], ROWS[143]]
    assert query_positions(0, "a", 20, 5).tolist() == [2, 7, 8, 9, 10]
    assert epoch_order(0, 0, ROWS[:6]).tolist() == [1, 0, 2, 3, 5, 4]


def test_draw_takes_the_smallest_priorities_whatever_the_order_of_rows() -> None:
    expected = sorted(sorted(ROWS, key=lambda row_id: priority(7, row_id))[:25])
    shuffled = [ROWS[index] for index in np.random.default_rng(0).permutation(len(ROWS))]
    assert draw(ROWS, 25, 7) == draw(shuffled, 25, 7) == expected
    assert draw(ROWS, 25, 8) != expected


def test_a_larger_draw_contains_the_smaller_one() -> None:
    assert set(draw(ROWS, 10, 0)) < set(draw(ROWS, 11, 0))
    assert draw(ROWS, 300, 0) == ROWS


def test_repeated_rows_count_once() -> None:
    assert draw(ROWS + ROWS, 10, 0) == draw(ROWS, 10, 0)
    with pytest.raises(DataError, match=r"cannot draw 3 replay rows from 2 different ones \(4"):
        draw(["a", "b"] * 2, 3, 0)


@settings(max_examples=100, deadline=None)
@given(num_rows=st.integers(1, 5000), percent=st.integers(1, 1000))
def test_replay_size_is_the_nearest_integer_halves_up(num_rows: int, percent: int) -> None:
    ratio = percent / 1000
    exact = Fraction(percent, 1000) * num_rows
    if exact < Fraction(1, 2):
        with pytest.raises(ConfigError) as caught:
            replay_size(num_rows, ratio)
        smallest = float(re.search(r"keeps one is ([0-9.E+-]+):", str(caught.value)).group(1))
        assert replay_size(num_rows, smallest) == 1
        assert smallest <= 0.5 / num_rows * 1.02
    else:
        size = replay_size(num_rows, ratio)
        assert exact - Fraction(1, 2) < size <= exact + Fraction(1, 2)
        assert 1 <= size <= num_rows


def test_replay_size_examples() -> None:
    assert [replay_size(rows, 0.01) for rows in (50, 149, 150, 1000)] == [1, 1, 2, 10]
    assert replay_size(1000, 0.07) == 70
    assert replay_size(10, 1.0) == 10
    assert replay_size(3, rows=2) == 2


def test_empty_replay_sets_name_the_ratio_the_rows_and_the_way_out() -> None:
    message = "replay ratio 0.01 of 49 rows rounds to 0 rows; .* keeps one is 0.0103:"
    with pytest.raises(ConfigError, match=message):
        replay_size(49, 0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"ratio": 0.1, "rows": 1}, "exactly one"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"rows": 0}, r"rows is 0 and the task has 9; 1\.\.9"),
        ({"rows": 10}, r"rows is 10 and the task has 9; 1\.\.9"),
    ],
)
def test_replay_settings_out_of_range_are_refused(arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replay_size(9, **arguments)


def test_a_task_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="0 rows"):
        replay_size(0, 0.5)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 60), budget=st.integers(1, 70), seed=st.integers(0, 50))
def test_query_positions_are_sorted_distinct_and_within_the_row(
    length: int, budget: int, seed: int
) -> None:
    found = query_positions(seed, "row", length, budget)
    assert found.dtype == np.int64 and len(found) == min(length, budget)
    assert (np.diff(found) > 0).all() and found.min() >= 0 and found.max() < length
    assert np.array_equal(found, query_positions(seed, "row", length, budget))


def test_no_budget_keeps_every_query_row() -> None:
    assert query_positions(0, "row", 5, None).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="query budget is 0"):
        query_positions(0, "row", 5, 0)


def test_query_positions_are_uniform_and_differ_between_rows_and_seeds() -> None:
    counts = np.zeros(10)
    for row_id in ROWS:
        counts[query_positions(0, row_id, 10, 3)] += 1
    # 300 * 3 / 10 = 90 expected, sd 7.9.
    assert counts.min() > 50 and counts.max() < 130
    assert not np.array_equal(
        query_positions(0, ROWS[0], 100, 10), query_positions(1, ROWS[0], 100, 10)
    )


def test_epoch_order_is_a_permutation_that_ignores_the_input_order() -> None:
    order = epoch_order(3, 1, ROWS)
    assert sorted(order.tolist()) == list(range(300)) and order.dtype == np.int64
    shuffle = np.random.default_rng(0).permutation(300)
    shuffled = [ROWS[index] for index in shuffle]
    assert [shuffled[index] for index in epoch_order(3, 1, shuffled)] == [ROWS[i] for i in order]
    assert not np.array_equal(order, epoch_order(3, 2, ROWS))
    assert not np.array_equal(order, epoch_order(4, 1, ROWS))
