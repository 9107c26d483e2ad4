"""Figures and the numbers on them: each mark once, nothing outside its plot, written for people."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.figures import MAX_POINTS, Series, head_map, line_chart, thin
from pipelines.readable import duration, points
from pipelines.svg import Frame, nice_ticks, shorten, spread
from tests.pages import HOSTILE
from tests.pipelines.committed import heads_json


def test_a_head_map_draws_each_head_once_and_outlines_the_selected() -> None:
    content = json.loads(heads_json(0, (5, 7)))
    content["importance"][2][3] = math.nan
    chosen = {(layer, head) for layer, head in content["heads"]}

    figure = str(head_map(content["importance"], chosen, title="t", width=300))

    assert sum(d.count("M") for d in re.findall(r' d="([^"]*)"', figure)) == 5 * 7 - 1
    hints = re.findall(r"<title>layer (\d+), head (\d+)", figure)
    assert {(int(layer), int(head)) for layer, head in hints} == chosen


def test_a_large_head_map_stays_small() -> None:
    importance = json.loads(heads_json(3, (40, 40)))["importance"]
    assert len(head_map(importance, frozenset(), title="t", width=300)) < 60_000


def test_labels_of_a_chart_are_escaped() -> None:
    line = Series(label=HOSTILE, xs=[1, 2], ys=[0.1, 0.2])
    chart = line_chart(
        [line], title=HOSTILE, x_label=HOSTILE, frame=Frame(width=300, height=200), end_labels=True
    )
    assert "<script" not in chart and html.escape("<script>") in chart


@given(
    st.lists(st.floats(0, 300), min_size=1, max_size=15),
)
def test_spread_labels_keep_their_order_and_distance_inside_the_plot(places: list[float]) -> None:
    moved = spread(places, 14.0, 0.0, 300.0)

    order = sorted(range(len(places)), key=lambda i: places[i])
    laid = [moved[i] for i in order]
    assert all(b - a >= 14.0 - 1e-6 for a, b in pairwise(laid))
    assert laid[0] >= -1e-6 and laid[-1] <= 300.0 + 1e-6


def test_labels_that_do_not_touch_stay_where_they_are() -> None:
    assert spread([200.0, 10.0, 100.0], 14.0, 0.0, 300.0) == [200.0, 10.0, 100.0]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_lie_inside_the_range_and_are_not_too_many(
    low: float, width: float, count: int
) -> None:
    ticks = nice_ticks(low, low + width, count)
    slack = 1e-6 * width + 4 * math.ulp(abs(low) + width)  # what numbers so far from 0 are apart
    assert all(low - slack <= tick <= low + width + slack for tick in ticks)
    assert len(ticks) <= 2 * count + 1


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=3000))
def test_thinning_bounds_the_points_and_keeps_the_ends_of_the_axis(ys: Sequence[float]) -> None:
    line = thin(Series(label="", xs=range(len(ys)), ys=ys))

    assert len(line.xs) <= MAX_POINTS
    if len(ys) <= MAX_POINTS:
        assert list(line.ys) == list(ys)
    assert min(ys) - 1e-6 <= min(line.ys) and max(line.ys) <= max(ys) + 1e-6


@given(st.text(max_size=80), st.integers(4, 40))
def test_a_shortened_name_fits_and_keeps_its_ends(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert len(short) <= limit
    assert short == text if len(text) <= limit else (short[0], short[-1]) == (text[0], text[-1])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"),
     (7509, "2 h 05 min")],
)  # fmt: skip
def test_durations_are_written_for_people(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_differences_are_signed_and_zero_is_not() -> None:
    assert [points(x) for x in (0.031, -0.031, -0.0001, None)] == [
        "+3.1",
        "\N{MINUS SIGN}3.1",
        "0.0",
        "n/a",
    ]
