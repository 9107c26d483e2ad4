"""The report as a browser and a reader get it: complete, harmless, reproducible, right."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.labels import before, retaught
from pipelines.readable import duration, points, size
from pipelines.report import render_report, write_report
from pipelines.report_accuracy import tiles
from pipelines.report_statistics import general_ability, pairs
from pipelines.results import StageResult, StreamView
from pipelines.store import Store
from tests.pages import HOSTILE, Page
from tests.pipelines.committed import (
    Committer,
    commit_stream,
    heads_json,
    replay_bytes,
    score_of,
    target_bytes,
)


def matrix_of(page: str) -> list[list[str]]:
    """The cells of R's table as shown, row by row, without its margins."""
    table = re.search(r'<table class="matrix.*?</table>', page, re.S)
    assert table
    rows = re.findall(r"<tr><th title.*?</tr>", table[0], re.S)
    return [re.findall(r'<td class="(?:heat|blank)[^>]*>([^<]*)</td>', row) for row in rows]


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    page = Page(render_report(commit_stream(tmp_path)))

    assert page.open == [] and page.loads == []
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
    assert page.loads == [] and "b>sort" not in page.tags
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
