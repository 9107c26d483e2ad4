"""The report of a search as a reader gets it: every number right, every part there or said to be missing.

Ledgers are made by hand over a real tiny stream; nothing is computed.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from tests.pages import HOSTILE, Page
from tests.pipelines.streams import make_stream
from tests.tune.ledgers import (
    THREE,
    confirm,
    rows,
    section,
    spread,
    tile,
    told_once,
    trial,
)
from tune.goals import Goal
from tune.importance import FEWEST, too_little
from tune.ledger import Copied, Entry
from tune.plan import Plan
from tune.report import render_search, write_search_report
from tune.report_confirmation import compared
from tune.search import open_search
from tune.sharing import Sharing
from tune.words import wanted_of

MINUS, PLUS_MINUS = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"
SPACE = {
    "train.learning_rate": {"log_uniform": [0.0001, 0.01]},
    "method.head_budget": {"choice": [1, 2, 4]},
    "method.query_budget": {"integers": [2, 16], "when": "method.head_budget > 1"},
}
Make = Callable[..., Plan]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("stream"), tasks=3)


@pytest.fixture
def make(stream: Path, tmp_path: Path) -> Make:
    """Return what makes the plan of a search, and puts entries and their stages' seconds in its ledger."""

    def make(
        entries: Sequence[Entry] = (), seconds: Mapping[str, float] | None = None, **fields: Any
    ) -> Plan:
        number = len(list(tmp_path.glob("search*.yaml")))
        values = {
            "name": f"{tmp_path.name}-{number}",
            "stream": str(stream),
            "space": SPACE,
            "search": {"by": "random"},
            "trials": 12,
        }
        path = tmp_path / f"search{number}.yaml"
        path.write_text(yaml.safe_dump(values | fields, sort_keys=False), encoding="utf-8")
        plan = open_search(path, begin=True).plan()
        for entry in entries:
            plan.ledger.put(entry)
        for key, took in (seconds or {}).items():
            plan.ledger.store.write_json(f"{key}/record.json", {"seconds": took})
        return plan

    return make


def test_the_page_is_well_formed_and_loads_nothing(make: Make) -> None:
    page = Page(render_search(make(THREE)))
    assert page.open == [] and page.loads == []


def test_the_same_ledger_gives_the_same_bytes(make: Make) -> None:
    plan = make(THREE)
    assert render_search(plan) == render_search(plan)
    again = make(list(reversed(THREE)), name=plan.search.name)
    assert render_search(again) == render_search(plan)


def test_a_written_report_leaves_nothing_else_behind(make: Make, tmp_path: Path) -> None:
    plan, path = make(THREE), tmp_path / "reports" / "search.html"
    assert write_search_report(plan, path) == path
    write_search_report(plan, path)
    assert [file.name for file in path.parent.iterdir()] == ["search.html"]
    assert path.read_text(encoding="utf-8") == render_search(plan)


def test_the_best_value_is_the_mean_over_seeds_with_its_standard_error(make: Make) -> None:
    page = render_search(make(THREE))
    best = [0.61, 0.67]
    shown = f"{100 * fmean(best):.1f} {PLUS_MINUS} {100 * spread(best):.1f} %"
    assert tile(page, "Best OP") == f"{shown} trial 1, mean of 2 seeds"
    assert rows(page, "All trials")[0][:4] == ["1", "finished", "3 of 3", shown]


def test_every_trial_is_counted_by_its_state(make: Make) -> None:
    others = [
        trial(3, [], reason="out of memory"),
        trial(4, [], state="refused", reason="no such budget"),
        trial(5, [[0.3, 0.3]], state="open"),
    ]
    page = render_search(make([*THREE, *others]))
    text = Page(page).text
    assert "6 of 12 trials begun: " in text
    assert "2 finished, 1 stopped, 1 failed, 1 refused, 1 still open" in text
    table = rows(page, "All trials")
    assert [row[0] for row in table] == ["1", "0", "2", "3", "4", "5"]
    assert table[2][1:3] == ["stopped", "2 of 3"] and table[2][-1] == "not among the best of 3"
    assert table[3][-1] == "out of memory" and table[3][3] == "\N{EN DASH}"
    assert page.count('class="cross"') == 2
    assert "failed or refused" in section(page, "Search history")


def test_a_search_that_has_not_begun_says_so(make: Make) -> None:
    page = render_search(make())
    assert Page(page).open == []
    assert "so there is no best one" in section(page, "Best settings")
    assert "No trial has begun yet" in section(page, "All trials")
    assert "No value is known yet" in section(page, "Search history")
    assert "No trial has learnt all tasks yet" in section(page, "Settings side by side")
    assert "there are 0" in section(page, "Which settings matter")
    assert "Nothing has been computed yet" in section(page, "Sharing")
    assert "<svg" not in page


def test_hostile_text_is_shown_and_never_becomes_markup(make: Make) -> None:
    own = {"name": HOSTILE, "train.learning_rate": 0.001, "method.head_budget": 1}
    entries = [
        trial(0, [[0.1]] * 3, settings=own, learnt=(own,) * 3),
        trial(1, [], reason=HOSTILE, settings=own),
    ]
    text = render_search(make(entries))
    page = Page(text)
    assert page.open == [] and page.loads == []
    assert HOSTILE in page.text and html.escape("<script>") in text


def test_best_settings_stand_beside_the_streams_and_can_be_given_to_it(make: Make) -> None:
    page = render_search(make(THREE, changes={"train.epochs": 2}))
    table = rows(page, "Best settings")
    assert table[0][2:] == ["0.001", "0.001", "0.0001 to 0.01, logarithmic"]
    assert table[1][0] == "head budget" and table[1][2:4] == ["2", "2"]
    assert table[2][-1] == "2 to 16; if method.head_budget > 1"
    assert "--set train.epochs=2 --set train.learning_rate=0.001" in section(page, "Best settings")


def test_confirmation_compares_seed_by_seed_and_says_who_is_better(make: Make) -> None:
    ours, plain = [0.60, 0.70, 0.66], [0.50, 0.58, 0.57]
    entries = [*THREE, confirm(1, ours), confirm(-1, plain)]
    page = render_search(make(entries, confirm={"seeds": [7, 8, 9]}))
    gaps = [a - b for a, b in zip(ours, plain, strict=True)]
    by = f"+{100 * fmean(gaps):.1f} {PLUS_MINUS} {100 * spread(gaps):.1f} points"
    text = section(page, "Confirmation")
    assert (
        f"Trial 1 beats the stream as it is: OP {by}, more than twice its standard error." in text
    )
    assert "Order: first, reverse, upper. On 3 seeds (7, 8, 9)." in text
    stream_row, trial_row = rows(page, "Confirmation")
    assert stream_row[2] == f"{100 * fmean(plain):.1f} {PLUS_MINUS} {100 * spread(plain):.1f} %"
    assert stream_row[0] == "the stream as it is" and trial_row[3] == by
    assert tile(page, "Stream as it is").startswith(stream_row[2])
    assert tile(page, "Best, confirmed").startswith(trial_row[2])


def test_a_best_trial_that_loses_when_confirmed_is_said_to_lose(make: Make) -> None:
    entries = [*THREE, confirm(1, [0.5, 0.5, 0.5]), confirm(-1, [0.6, 0.6, 0.6])]
    text = section(render_search(make(entries, confirm={"seeds": [7, 8, 9]})), "Confirmation")
    assert f"does not beat the stream as it is: OP {MINUS}10.0" in text


def test_a_gain_within_twice_its_error_may_be_chance(make: Make) -> None:
    entries = [*THREE, confirm(1, [0.5, 0.7, 0.6]), confirm(-1, [0.55, 0.6, 0.6])]
    text = section(render_search(make(entries, confirm={"seeds": [7, 8, 9]})), "Confirmation")
    assert "may be chance" in text
    one = [*THREE, confirm(1, [0.5]), confirm(-1, [0.4])]
    text = section(render_search(make(one, confirm={"seeds": [7]})), "Confirmation")
    assert "on a single seed" in text


def test_confirmation_says_what_is_missing(make: Make) -> None:
    assert "Nothing is confirmed" in section(render_search(make(THREE)), "Confirmation")
    asked = {"seeds": [7, 8, 9]}
    assert "has not begun" in section(render_search(make(THREE, confirm=asked)), "Confirmation")
    half = [*THREE, confirm(1, [0.5, 0.5, 0.5], state="open"), confirm(-1, [0.4, 0.4, 0.4])]
    text = section(render_search(make(half, confirm=asked)), "Confirmation")
    assert "Trial 1, the best, has not been confirmed here." in text
    other = [*THREE, confirm(0, [0.5, 0.5, 0.5]), confirm(-1, [0.4, 0.4, 0.4])]
    page = render_search(make(other, confirm=asked))
    assert "Trial 1, the best, has not been confirmed here." in section(page, "Confirmation")


def test_less_is_better_of_forgetting_when_confirmed(make: Make) -> None:
    goal = Goal(metric="forgetting")
    (wanted,) = wanted_of(goal, ("min",))
    ours = confirm(1, [0.5], others={"forgetting": [0.1]})
    plain = confirm(-1, [0.5], others={"forgetting": [0.2]})
    value, _ = compared(wanted, ours, plain) or (math.nan, None)
    assert value == pytest.approx(-0.1)
    before = trial(1, [[0.5]] * 3, others={"forgetting": [0.1]})
    plan = make([before, ours, plain], goal={"metric": "forgetting"}, confirm={"seeds": [7]})
    assert (
        f"beats the stream as it is: forgetting {MINUS}10.0 points"
        in Page(render_search(plan)).text
    )


def test_trials_that_miss_a_constraint_are_not_the_best_and_say_by_how_much(make: Make) -> None:
    kept = {"new_task_score": [0.9]}
    entries = [
        trial(0, [[0.7]] * 3, others={"new_task_score": [0.6]}),
        trial(1, [[0.6]] * 3, others=kept),
        trial(-1, [[0.3]] * 3, key="reference-plain", kind="reference", others=kept),
    ]
    plan = make(
        entries,
        constraints=["new_task_score >= 0.95 * plain"],
        references={"plain": {"method": {"name": "seqft"}}},
    )
    page = render_search(plan)
    first, second = rows(page, "All trials")
    assert (first[0], first[4]) == ("1", "met")
    assert (second[0], second[4]) == ("0", f"missed by {100 * (0.95 * 0.9 - 0.6):.1f} points")
    assert rows(page, "References")[0][:4] == ["plain", "finished", "30.0 %", "90.0 %"]
    assert "new_task_score >= 0.95 * plain" in Page(page).text
    assert page.count('class="mark missed"') == 1


def test_when_every_trial_misses_a_constraint_none_is_called_the_best(make: Make) -> None:
    page = render_search(make(THREE, constraints=["op >= 0.99"]))
    assert "none may be chosen" in section(page, "Best settings")
    assert "References" not in page
    assert 'class="running"' not in page


def test_a_pareto_goal_shows_all_figures_and_its_front(make: Make) -> None:
    entries = [
        trial(0, [[0.6]] * 3, others={"seconds": [30.0]}),
        trial(1, [[0.8]] * 3, others={"seconds": [90.0]}),
        trial(2, [[0.5]] * 3, others={"seconds": [40.0]}),
    ]
    page = render_search(make(entries, goal={"pareto": ["op", "seconds"]}))
    assert "trials 0, 1" in section(page, "Pareto front")
    assert rows(page, "All trials")[0][3:5] == ["80.0 %", "1 min 30 s"]
    assert "more OP (overall performance, mean over tasks), and less compute time" in page
    assert len(re.findall(r'class="mark chosen front"', page)) == 2
    assert len(re.findall(r'class="axisline goal"', page)) > 2


def test_a_goal_that_is_compute_time_is_drawn_against_op(make: Make) -> None:
    entries = [trial(n, [[0.6 + n / 10]] * 3, others={"seconds": [30.0 + 9 * n]}) for n in range(2)]
    page = render_search(make(entries, goal={"metric": "seconds"}))
    assert rows(page, "All trials")[0][:4] == ["0", "finished", "3 of 3", "30 s"]
    assert "OP against compute time" in section(page, "What it costs")
    assert "less is better" in section(page, "Search history")


def test_tasks_that_are_learnt_at_once_have_nothing_in_between(make: Make) -> None:
    own = {"train.learning_rate": 0.001}
    entry = trial(0, [[0.6]], state="finished", settings=own, learnt=(own,))
    space = {"train.learning_rate": SPACE["train.learning_rate"]}
    page = render_search(make([entry], space=space, changes={"method": {"name": "mtl"}}))
    assert "nothing between the tasks" in section(page, "After each task")
    assert rows(page, "All trials")[0][:4] == ["0", "finished", "1 of 1", "60.0 %"]


def test_a_weighted_goal_is_summed_up_seed_by_seed(make: Make) -> None:
    weights = {"op": 1.0, "forgetting": -0.5}
    ops, lost = [0.6, 0.7], [0.1, 0.3]
    entry = trial(0, [ops] * 3, others={"forgetting": lost})
    page = render_search(make([entry], goal={"weights": weights}))
    sums = [a - 0.5 * b for a, b in zip(ops, lost, strict=True)]
    shown = f"{fmean(sums):.4g} {PLUS_MINUS} {spread(sums):.4g}"
    assert rows(page, "All trials")[0][3] == shown


def test_a_copy_in_a_population_is_a_jump_with_a_mark(make: Make) -> None:
    entries = [
        trial(0, [[0.9], [0.8], [0.7]]),
        trial(1, [[0.4], [0.75], [0.72]], copied=(Copied(tasks=1, source=0),)),
    ]
    plan = make(entries, scheduler={"by": "pbt"}, trials=2)
    page = render_search(plan)
    assert page.count('class="copied chosen"') == 1 and page.count('class="jump chosen"') == 1
    assert "went on from another" in section(page, "After each task")
    assert rows(page, "All trials")[0][-1] == "from trial 0 after 1 task"
    assert "It went on from trial 0 after 1 task" in section(page, "Best settings")
    assert "PBT" in Page(page).text
    jump = re.search(r'class="jump chosen" x1="(\S+)" y1="(\S+)" x2="(\S+)" y2="(\S+)"', page)
    assert jump and jump[1] == jump[3] and float(jump[4]) < float(jump[2])


def test_without_copies_nothing_speaks_of_them(make: Make) -> None:
    page = render_search(make(THREE))
    assert 'class="copied' not in page and "diamond:" not in page


def test_lines_of_stopped_trials_end_early(make: Make) -> None:
    page = render_search(make(THREE))
    found = re.search(r"<h2>After each task</h2>(.*?)</section>", page, re.S)
    assert found
    lines = re.findall(r'<polyline class="trial (\w+)" points="([^"]*)"', found[1])
    assert sorted((css, len(points.split())) for css, points in lines) == [
        ("chosen", 3),
        ("r0", 3),
        ("stopped", 2),
    ]


def test_sharing_counts_what_each_would_have_cost_alone(make: Make) -> None:
    seconds = {"a/x": 10.0, "b/x": 20.0, "c/x": 30.0, "d/x": 40.0}
    entries = [
        trial(0, [[0.5]] * 3, stages=("a/x", "b/x"), ran=("b/x",)),
        trial(1, [[0.6]] * 3, stages=("a/x", "c/x"), ran=("c/x",)),
        confirm(-1, [0.5], stages=("a/x", "d/x"), ran=("d/x",)),
    ]
    # What ran is told once, by the first result.
    entries = [told_once(entry) for entry in entries]
    plan = make(entries, seconds)
    found = Sharing.of(list(plan.ledger.entries.values()), plan.ledger.seconds())
    assert sum(found.alone.values()) == 30 + 40 + 50 and sum(found.spent.values()) == 100
    assert (found.asked, found.stages, found.computed, found.again) == (6, 4, 3, 0)
    assert found.saved == pytest.approx(1 - 100 / 120)
    page = render_search(plan)
    assert f"{100 * (1 - 100 / 120):.1f} % was saved" in section(page, "Sharing")
    assert "1 of them was in the store before" in section(page, "Sharing")
    assert "No stage was computed twice" in section(page, "Sharing")


def test_a_stage_that_was_computed_twice_is_told(make: Make) -> None:
    entries = [trial(n, [[0.5]], stages=("a/x",), ran=("a/x",)) for n in range(2)]
    text = section(render_search(make(entries, {"a/x": 10.0})), "Sharing")
    assert "1 stage was computed a second time." in text


def test_importance_is_not_shown_without_enough_different_trials(make: Make) -> None:
    assert "there are 3" in too_little([0.1, 0.2, 0.3])
    assert "same value" in too_little([0.1] * FEWEST)
    assert too_little([0.1] * FEWEST + [0.2]) == ""
    page = render_search(make(THREE))
    assert f"It takes {FEWEST} trials" in section(page, "Which settings matter")
    many = [trial(n, [[0.3 + 0.05 * n]] * 3, lr=0.0001 * (n + 1)) for n in range(FEWEST)]
    text = section(render_search(make(many)), "Which settings matter")
    assert f"best quarter of the {FEWEST} trials" in text
    assert "learning rate" in text and "100.0 %" in text
