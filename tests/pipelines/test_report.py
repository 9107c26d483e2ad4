"""The report as a browser and a reader get it: complete, harmless, reproducible, right."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from committed import Committer, commit_stream, heads_json, replay_bytes, score_of, target_bytes
from hypothesis import given
from hypothesis import strategies as st

from pipelines.figures import MAX_POINTS, Series, head_map, line_chart, thin
from pipelines.labels import before, retaught
from pipelines.readable import duration, points, size
from pipelines.report import render_report, write_report
from pipelines.report_accuracy import tiles
from pipelines.report_statistics import general_ability, pairs
from pipelines.results import StageResult, StreamView
from pipelines.store import Store
from pipelines.svg import Frame, nice_ticks, shorten, spread

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """Every element, its attributes and its text; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def matrix_of(page: str) -> list[list[str]]:
    """The cells of R's table as shown, row by row, without its margins."""
    table = re.search(r'<table class="matrix.*?</table>', page, re.S)
    assert table
    rows = re.findall(r"<tr><th title.*?</tr>", table[0], re.S)
    return [re.findall(r'<td class="(?:heat|blank)[^>]*>([^<]*)</td>', row) for row in rows]


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    page = Page(render_report(commit_stream(tmp_path)))

    assert page.open == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use"}
    attributes = [(name, value) for _, attrs in page.elements for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name in {"src", "href"} or name.startswith("on")]
    styles = (Path(__file__).parents[2] / "pipelines/templates/report.css").read_text()
    assert "url(" not in styles and "@import" not in styles


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first = render_report(commit_stream(tmp_path / "a"))
    assert render_report(commit_stream(tmp_path / "b")) == first


def test_the_matrix_shows_every_measured_cell_and_nothing_else(tmp_path: Path) -> None:
    base, *rows = matrix_of(render_report(commit_stream(tmp_path)))

    blank = "\N{MIDDLE DOT}"
    assert base == [blank, "10.0", "10.0"]
    for i, row in enumerate(rows):
        assert row[: i + 1] == [f"{100 * score_of(i, j):.1f}" for j in range(i + 1)]
        assert row[i + 1 :] == (["15.0"] + [blank] * (1 - i) if i < 2 else [])


def test_the_tiles_state_op_and_both_definitions_of_bwt(tmp_path: Path) -> None:
    view = commit_stream(tmp_path)
    last = [score_of(2, j) for j in range(3)]
    lost = sum(score_of(2, j) - score_of(j, j) for j in range(2))

    values = [tile["value"] for tile in tiles(view, view.matrix())]

    assert values[0] == f"{100 * sum(last) / 3:.1f}"
    assert values[1] == f"{100 * lost / 2:+.1f}".replace("-", "\N{MINUS SIGN}")
    assert values[2] == f"{100 * lost / 3:+.1f}".replace("-", "\N{MINUS SIGN}")
    assert values[3] == "+5.0"
    seconds = sum(result.record.seconds for result in view.stages)
    assert values[4] == duration(seconds)


def test_hostile_names_and_settings_are_shown_and_never_become_markup(tmp_path: Path) -> None:
    view = commit_stream(tmp_path, ["<b>sort", "x&y", "<script>z"])
    view = replace(view, name=HOSTILE, model=HOSTILE, config={HOSTILE: [HOSTILE, {"a": HOSTILE}]})

    page = Page(render_report([view, view]))

    assert page.open == []
    assert not {tag for tag, _ in page.elements} & {"script", "img", "b>sort"}
    assert HOSTILE in page.text
    assert "<b>sort" in page.text.replace(" ", "")


def test_credentials_in_the_configuration_stay_out_of_the_page(tmp_path: Path) -> None:
    page = render_report(commit_stream(tmp_path))

    assert "mlflow.example:5000" in page
    assert "hunter2" not in page and "ada:" not in page


def test_fingerprints_digests_and_versions_are_written_in_full(tmp_path: Path) -> None:
    view = commit_stream(tmp_path)
    page = render_report(view)

    for result in view.stages:
        assert result.fingerprint in page
    for _, _, found in view.sources():
        assert found in page
    assert "2.13.0" in page and "0f3c2a9" in page


def test_a_method_without_heads_and_replay_says_so(tmp_path: Path) -> None:
    text = Page(render_report(commit_stream(tmp_path, method="seqft"))).text

    assert "The method seqft selects no heads." in text
    assert "The method seqft keeps no replay rows." in text


def test_one_task_has_no_backward_transfer_and_no_forgetting_curve(tmp_path: Path) -> None:
    view = commit_stream(tmp_path, ["sort"])
    shown = tiles(view, view.matrix())

    assert [tile["value"] for tile in shown[:4]] == ["80.0", "n/a", "n/a", "n/a"]
    assert {tile["hint"] for tile in shown[1:4]} == {"needs two tasks"}
    assert "nothing to forget yet" in render_report(view)


def test_a_joint_model_fills_the_last_row_only(tmp_path: Path) -> None:
    out = Committer(Store.open(tmp_path))
    cells = [
        {"model_after": "all", "task": task, "metric": "accuracy", "score": score, "rows": 9}
        for task, score in (("sort", 0.5), ("copy", 0.7))
    ]
    out.commit("train", "all", files={"history.json": b'{"steps": [{"step": 1, "loss": 2.0}]}'})
    out.commit("evaluate", "all", files={"scores.json": json.dumps({"cells": cells}).encode()})
    view = StreamView(
        name="joint", method="mtl", model="m", tasks=("sort", "copy"), config={},
        stages=tuple(out.stages),
    )  # fmt: skip

    page = render_report(view)

    assert matrix_of(page) == [["50.0", "70.0"]]
    values = [tile["value"] for tile in tiles(view, view.matrix())]
    assert values[:4] == ["60.0", "n/a", "n/a", "n/a"]


def test_a_stream_that_is_half_done_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    whole = commit_stream(tmp_path)
    done = tuple(r for r in whole.stages if r.learnt != "copy")
    view = replace(whole, stages=done)

    page = Page(render_report(view))

    assert "So far 2 of 3 are learnt and evaluated." in page.text
    assert tiles(view, view.matrix())[0]["value"] == f"{50 * (score_of(1, 0) + score_of(1, 1)):.1f}"
    nothing = replace(whole, stages=done[:1])
    assert "No task has been evaluated yet" in render_report(nothing)


def test_the_comparison_marks_the_better_stream_in_every_column(tmp_path: Path) -> None:
    ours = commit_stream(tmp_path / "a", name="ours", forget=0.02)
    plain = commit_stream(tmp_path / "b", name="plain", method="seqft", forget=0.2)

    page = render_report([ours, plain])

    rows = re.findall(r'<tr><td class="wrap">(ours|plain)</td>(.*?)</tr>', page, re.S)
    best = {name: re.findall(r'class="num best">([^<]*)<', cells) for name, cells in rows}
    assert len(best["ours"]) == 3 and best["plain"] == [duration(plain.seconds()), "none"]
    assert "same tasks in the same order" in page
    other = replace(plain, tasks=tuple(reversed(plain.tasks)))
    assert "different tasks or orders" in render_report([ours, other])


def test_a_loss_that_was_not_finite_is_left_out_of_the_curve(tmp_path: Path) -> None:
    out = Committer(Store.open(tmp_path))
    steps = [
        {"step": n, "loss": None if n == 3 else float(n), "own_part": 1.0} for n in range(1, 6)
    ]
    out.commit("train", "sort", files={"history.json": json.dumps({"steps": steps}).encode()})
    view = StreamView(
        name="s", method="m", model="m", tasks=("sort",), config={}, stages=tuple(out.stages)
    )

    page = render_report(view)

    lines = re.findall(r'<polyline class="line s0" points="([^"]*)">', page)
    assert [len(line.split()) for line in lines] == [4]
    assert "own_part" in page


def test_the_replay_store_counts_rows_and_live_targets_and_names_replaced_ones(
    tmp_path: Path,
) -> None:
    view = commit_stream(tmp_path)

    first, second, third = view.replay()

    assert (first.row_bytes, first.target_bytes) == (replay_bytes(0), target_bytes(2))
    assert first.stale_bytes == target_bytes(0) + target_bytes(1)
    assert (second.target_bytes, second.stale_bytes) == (target_bytes(1), 0)
    assert (third.row_bytes, third.rows) == (replay_bytes(2), 10)
    total = sum(replay_bytes(k) for k in range(3)) + 2 * target_bytes(2) + target_bytes(1)
    assert view.replay_bytes() == total
    assert size(total) in Page(render_report(view)).text


def test_stages_count_for_the_task_whose_arrival_caused_them(tmp_path: Path) -> None:
    out = Committer(Store.open(tmp_path))
    names = ["sort", retaught("sort", "copy"), before("copy")]
    assert [out.commit("teach", name).learnt for name in names] == ["sort", "copy", "copy"]


def test_reused_stages_are_told_from_those_that_ran(tmp_path: Path) -> None:
    view = commit_stream(tmp_path, reused=2)
    page = render_report(view)

    ran = [result for result in view.stages if result.state == "ran"]
    assert page.count('<span class="state ran">') == len(ran) < len(view.stages)
    assert f"This run did {len(ran)} of them in {duration(view.seconds(ran_only=True))}" in page


def test_a_written_report_leaves_nothing_else_behind(tmp_path: Path) -> None:
    view = commit_stream(tmp_path / "store")
    path = tmp_path / "reports" / "demo.html"

    assert write_report(view, path) == path
    write_report(view, path)

    assert [file.name for file in path.parent.iterdir()] == ["demo.html"]
    assert path.read_text(encoding="utf-8") == render_report(view)


def test_no_stream_is_not_a_report() -> None:
    with pytest.raises(ValueError, match="at least one stream"):
        render_report([])


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


def test_results_read_only_what_the_record_vouches_for(tmp_path: Path) -> None:
    out = Committer(Store.open(tmp_path))
    result: StageResult = out.commit("select", "sort", files={"other.json": b"{}"})
    out.store.write_bytes(f"{result.record.key}/heads.json", heads_json(0, (2, 2)))

    assert result.read_json("heads.json") is None
    assert result.read_json("other.json") == {}


def test_finished_streams_are_tested_row_by_row_against_each_other(tmp_path: Path) -> None:
    views = [
        commit_stream(tmp_path / name, name=name, method=method, forget=forget)
        for name, method, forget in (
            ("a", "seekr", 0.01),
            ("b", "replay", 0.2),
            ("c", "seqft", 0.2),
        )
    ]
    matrices = [view.matrix() for view in views]
    found = pairs(views, matrices)
    assert found is not None and found["left_out"] == []
    first, _, last = found["rows"]
    ops = [matrix.op() for matrix in matrices]
    assert first["difference"] == points(ops[0] - ops[1]) and first["rows"] == "300"
    assert first["sure"] and float(first["p"].removeprefix("< ")) < 0.01
    assert (last["first"], last["second"], last["difference"]) == ("b", "c", "0.0")
    assert not last["sure"] and last["p"] == "1.0000"
    page = Page(render_report(views)).text
    assert "Paired tests of the final models" in page and "cannot be compared" not in page


def test_streams_with_other_rows_or_unfinished_ones_are_not_compared(tmp_path: Path) -> None:
    whole = commit_stream(tmp_path / "a", name="whole")
    half = replace(
        commit_stream(tmp_path / "b", name="half"), tasks=("sort", "reverse", "copy", "new")
    )
    other = commit_stream(tmp_path / "c", ("sort", "copy", "upper"), name="other")
    views = [whole, half, other]
    found = pairs(views, [view.matrix() for view in views])
    assert found is not None and found["rows"] == []
    assert found["left_out"] == [
        "half is not finished",
        "whole and other were not tested on the same rows",
    ]
    variant = replace(whole, config=whole.config | {"benchmark": "another variant"})
    assert "cannot be compared" in Page(render_report([whole, variant])).text


def test_a_report_says_what_was_measured(tmp_path: Path) -> None:
    view = commit_stream(tmp_path)
    view = replace(view, config=view.config | {"benchmark": f"TRACE {HOSTILE}"})
    page = Page(render_report(view))
    assert "What was measured" in page.text and "greedy, at most 16 tokens" in page.text
    assert "Data: TRACE" in page.text and page.open == []
    assert "standard error" in tiles(view, view.matrix())[0]["hint"]


def test_general_ability_stands_beside_the_base_models(tmp_path: Path) -> None:
    out = Committer(Store.open(tmp_path))
    for model, value in (("base", 0.5), ("sort", 0.375)):
        cell = {"metric": "acc", "value": value, "error": 0.125, "rows": 8, "all": {}}
        content = json.dumps({"tasks": {"piqa": cell}}).encode()
        out.commit("general", model, files={"general.json": content})
    view = commit_stream(tmp_path / "stream")
    found = general_ability(replace(view, stages=tuple(out.stages)))
    assert found == {
        "models": ["base model", "after sort"],
        "rows": [
            {
                "task": "piqa",
                "metric": "acc",
                "cells": ["0.500 \N{PLUS-MINUS SIGN} 0.125", "0.375 \N{PLUS-MINUS SIGN} 0.125"],
                "change": "-0.125",
            }
        ],
    }
    page = Page(render_report(replace(view, stages=view.stages + tuple(out.stages)))).text
    assert "General ability" in page and "after sort" in page
    assert general_ability(view) is None
