"""Standard errors and paired tests against sums by hand and complete enumeration."""

from __future__ import annotations

import itertools
import math
import random
from statistics import mean, stdev

import pytest

from seekr.statistics import holm, mean_and_error, op_error, paired


def test_a_mean_has_the_standard_error_of_the_textbook() -> None:
    values = [0.2, 0.4, 0.9, 0.1]
    found, error = mean_and_error(values)
    assert found == pytest.approx(mean(values))
    assert error == pytest.approx(stdev(values) / math.sqrt(4))
    assert mean_and_error([0.5]) == (0.5, None)


def test_the_error_of_op_weighs_tasks_not_rows() -> None:
    scores = {"big": {str(i): float(i % 2) for i in range(100)}, "small": {"a": 0.0, "b": 1.0}}
    errors = [stdev([0, 1] * 50) / 10, stdev([0, 1]) / math.sqrt(2)]
    assert op_error(scores) == pytest.approx(math.hypot(*errors) / 2)
    assert op_error({"one": {"a": 1.0}}) is None and op_error({}) is None


def test_a_paired_test_is_the_share_of_sign_flips_that_differ_as_much() -> None:
    draw = random.Random(0)
    first = {t: {str(i): draw.random() for i in range(n)} for t, n in (("x", 6), ("y", 3))}
    second = {t: {row: draw.random() for row in rows} for t, rows in first.items()}
    found = paired(first, second)
    assert found is not None
    weighted = [
        (first[t][row] - second[t][row]) / (len(first[t]) * 2) for t in first for row in first[t]
    ]
    flips = [
        sum(s * w for s, w in zip(signs, weighted, strict=True))
        for signs in itertools.product((1, -1), repeat=9)
    ]
    extreme = sum(abs(flip) >= abs(sum(weighted)) - 1e-12 for flip in flips)
    assert found.difference == pytest.approx(sum(weighted))
    assert found.p_value == pytest.approx(extreme / len(flips))
    assert found.rows == 9


def test_equal_models_do_not_differ_and_clearly_better_ones_do() -> None:
    rows = {"t": {str(i): float(i % 3 == 0) for i in range(60)}}
    same = paired(rows, rows)
    assert same is not None and (same.difference, same.p_value) == (0.0, 1.0)
    better = paired({"t": dict.fromkeys(rows["t"], 1.0)}, rows)
    assert better is not None
    assert better.difference == pytest.approx(2 / 3) and better.p_value < 0.001


def test_rows_that_only_one_model_has_do_not_count() -> None:
    found = paired({"t": {"a": 1.0, "b": 0.0}}, {"t": {"b": 1.0, "c": 1.0}, "u": {"d": 1.0}})
    assert found is not None and (found.rows, found.difference) == (1, -1.0)
    assert paired({"t": {"a": 1.0}}, {"u": {"a": 1.0}}) is None


def test_holm_multiplies_the_smallest_most_and_never_turns_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
