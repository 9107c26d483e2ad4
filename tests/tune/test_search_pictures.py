"""The pictures and words of a search's report, each against what it says of its numbers."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import yaml

from tests.pages import HOSTILE
from tune.charts import Tried, history, levels, running_best
from tune.coordinates import NOT_SET, Thread, axis_of, goal_axis, parallel, place
from tune.importance import importances
from tune.spaces import Range
from tune.words import difference, field_names, setting_change, with_error, written

MINUS, PLUS_MINUS = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"


def test_the_running_best_never_gets_worse() -> None:
    points = [(0, 0.5), (2, 0.4), (1, 0.7), (3, 0.6)]
    assert running_best(points, "max") == [(0, 0.5), (1, 0.7), (2, 0.7), (3, 0.7)]
    assert running_best(points, "min") == [(0, 0.5), (1, 0.5), (2, 0.4), (3, 0.4)]


def test_the_history_places_trials_by_number_and_value() -> None:
    tried = [
        Tried(number=n, value=v, error=None, mark="good", hint=HOSTILE)
        for n, v in enumerate([1.0, 3.0, 2.0])
    ]
    chart = str(history(tried, "max", "t"))
    spots = [
        (float(x), float(y))
        for x, y in re.findall(r'class="mark good" cx="(\S+)" cy="(\S+)"', chart)
    ]
    assert [x for x, _ in spots] == sorted(x for x, _ in spots)
    assert spots[1][1] < spots[2][1] < spots[0][1]
    assert "<script" not in chart


def test_the_better_a_value_the_stronger_its_line() -> None:
    assert levels([0.1, 0.5, 0.9], "max") == ["r0", "r4", "r9"]
    assert levels([0.1, 0.9], "min") == ["r9", "r0"]
    assert levels([0.4, 0.4], "max") == ["r9", "r9"]


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors() -> None:
    allowed = Range(log_uniform=(1e-5, 1e-1))
    places = [place(allowed, 10.0**power) for power in range(-5, 0)]
    assert places[0] == 0 and places[-1] == pytest.approx(1)
    assert [b - a for a, b in pairwise(places)] == pytest.approx([0.25] * 4)
    ticks = axis_of(allowed, "x").ticks
    assert [text for _, text in ticks] == ["1e-05", "0.0001", "0.001", "0.01", "0.1"]


@pytest.mark.parametrize(
    ("allowed", "values"),
    [
        (Range(uniform=(0.0, 2.0)), [0.0, 0.5, 1.0, 2.0]),
        (Range(integers=(1, 9), step=2), [1, 3, 5, 9]),
        (Range(choice=("a", None, {"b": 1})), ["a", None, {"b": 1}]),
        (Range(log_uniform=(0.1, 10.0)), [0.1, 0.2, 1.0, 10.0]),
    ],
)
def test_places_along_an_axis_rise_with_the_values(allowed: Range, values: list[Any]) -> None:
    places = [place(allowed, value) for value in values]
    assert places == sorted(set(places)) and (places[0], places[-1]) == (0.0, 1.0)
    ticks = axis_of(allowed, "x").ticks
    assert [at for at, _ in ticks] == sorted(at for at, _ in ticks)
    assert len(ticks) >= 2


def test_true_and_one_are_different_choices() -> None:
    allowed = Range(choice=(True, 1, 0))
    assert [place(allowed, value) for value in (True, 1, 0)] == [0.0, 0.5, 1.0]


def test_a_field_that_is_not_set_lies_below_its_axis_and_is_dashed() -> None:
    axes = [axis_of(Range(uniform=(0, 1)), "a"), axis_of(Range(uniform=(0, 1), when="a > 0"), "b")]
    axis, places = goal_axis([0.2, 0.8], "OP")
    chart = str(
        parallel(
            [*axes, axis],
            [
                Thread(places=[0.0, None, places[0]], css="r0", hint=""),
                Thread(places=[0.5, 0.0, places[1]], css="r9", hint=""),
            ],
            "t",
        )
    )
    assert chart.count(f">{NOT_SET}<") == 1
    dashed = re.findall(r'class="trial r0 unset" points="([^"]*)"', chart)
    whole = re.findall(r'class="trial r9" points="([^"]*)"', chart)
    assert len(dashed) == 2 and len(whole) == 1
    below = float(dashed[0].split()[1].split(",")[1])
    assert below > float(whole[0].split()[1].split(",")[1])


def test_the_field_that_alone_decides_is_the_most_important() -> None:
    space = {
        "a.rate": Range(log_uniform=(1e-4, 1e-1)),
        "a.size": Range(integers=(1, 30), step=3),
        "a.kind": Range(choice=("x", {"y": 1}, "z")),
    }
    settings = [
        {
            "a.rate": 10 ** (-4 + 3 * ((7 * n) % 40) / 40),
            "a.size": 1 + 3 * ((11 * n) % 10),
            "a.kind": ("x", {"y": 1}, "z")[n % 3],
        }
        for n in range(40)
    ]
    for field, value in (
        ("a.rate", lambda s: -abs(math.log10(s["a.rate"]) + 3.4)),
        ("a.size", lambda s: s["a.size"]),
        ("a.kind", lambda s: float(s["a.kind"] == {"y": 1})),
    ):
        shares = importances(space, settings, [value(own) for own in settings])
        assert next(iter(shares)) == field
        assert sum(shares.values()) == pytest.approx(1) and shares[field] > 0.5


def test_figures_are_written_with_their_units() -> None:
    assert written("op", 0.4125) == "41.2 %" and written("bwt", -0.031) == f"{MINUS}3.1 %"
    assert written("replay_bytes", 2048.0) == "2 KiB" and written("seconds", 200) == "3 min 20 s"
    assert with_error("score.sort", 0.5, 0.012) == f"50.0 {PLUS_MINUS} 1.2 %"
    assert difference("op", -0.02, 0.01) == f"{MINUS}2.0 {PLUS_MINUS} 1.0 points"
    assert difference("seconds", 5.0) == "+5.0 s" and difference("op", 0.0) == "0.0 points"


def test_fields_have_short_names_that_differ() -> None:
    names = field_names(["method.head_budget", "replay.ratio", "a.top_k", "b.top_k"])
    assert list(names.values()) == ["head budget", "replay ratio", "a.top_k", "b.top_k"]


@pytest.mark.parametrize("value", [1e-05, 0.1 + 0.2, 3, True, None, "a b", [1, 2], {"name": "x"}])
def test_a_change_is_read_back_as_the_same_value(value: Any) -> None:
    field, _, text = setting_change("train.x", value).partition("=")
    assert field == "train.x" and yaml.safe_load(text) == value
