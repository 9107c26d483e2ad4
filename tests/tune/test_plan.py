"""What a search does: the same whoever is faster, however often it is killed, and nothing twice."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.stream import open_stream
from seekr.errors import ConfigError
from tests.tune.searching import (
    FIRST,
    FORGET,
    SPACE,
    WEIGHT,
    carry_out,
    computed,
    is_finished,
    make_search,
    opened,
    run_plan,
    score,
    table,
)
from tune.plan import Plan
from tune.write import best_stream

ASHA = {"by": "asha", "reduction": 2, "first": 2}
MEDIAN: dict[str, Any] = {"by": "median", "at_least": 2}
PBT = {"by": "pbt", "quantile": 0.25}


def finished(path: Path, *changes: str, slots: int = 1, lag: int = 2) -> Plan:
    plan = opened(path, *changes).plan(lag)
    run_plan(plan, slots=slots)
    return plan


def test_every_trial_learns_all_tasks_without_a_scheduler(tmp_path: Path) -> None:
    plan = finished(make_search(tmp_path))
    trials = plan.ledger.of("trial")
    assert [trial.state for trial in trials] == ["finished"] * 8
    assert [trial.tasks for trial in trials] == [3] * 8
    for trial in trials:
        course = plan.courses.open([trial.settings] * 3, 0)
        later = score(course.configs[0])
        # Two tasks were learnt after the first one, one after the second, none after the third.
        assert trial.figures["op"].mean == pytest.approx((FIRST + 2 * later) / 3 - FORGET)
        assert trial.figures["bwt"].mean == pytest.approx(-1.5 * FORGET)
        assert [result.figures["op"].mean for result in trial.results[:2]] == [
            pytest.approx(FIRST),
            pytest.approx((FIRST + later - FORGET) / 2),
        ]
    values = [trial.figures["op"].mean for trial in trials]
    assert plan.best()[0] is trials[values.index(max(values))]


def test_no_stage_is_computed_twice_and_the_first_task_only_once(tmp_path: Path) -> None:
    plan = finished(make_search(tmp_path), slots=4)
    keys = computed(plan)
    assert len(keys) == len(set(keys))
    assert set(keys) == {key for trial in plan.ledger.of("trial") for key in trial.stages}
    assert len([key for key in keys if key.startswith("train/upper/")]) == 1
    assert len([key for key in keys if key.startswith("ingest/")]) == 3


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("by", "scheduler", "cuts"),
    [
        ("tpe", ASHA, 1),
        ("random", PBT, 1),
        pytest.param("tpe", ASHA, 4, marks=slow),
        pytest.param("tpe", MEDIAN, 4, marks=slow),
        pytest.param("tpe", None, 4, marks=slow),
        pytest.param("random", PBT, 4, marks=slow),
    ],
)
def test_neither_speed_nor_order_nor_kills_change_what_comes_out(
    tmp_path: Path, by: str, scheduler: Any, cuts: int
) -> None:
    values = {"scheduler": scheduler, "search": {"by": by, "startup": 3}, "trials": 7}
    values["confirm"] = {"seeds": [5], "best": 1}
    whole = finished(make_search(tmp_path / "whole", **values))
    for seed in range(cuts):
        source = random.Random(seed)
        path = make_search(tmp_path / f"cut-{seed}", **values)
        for _ in range(200):
            plan = opened(path).plan(2)
            run_plan(
                plan,
                slots=source.randint(1, 4),
                choose=lambda steps, source=source: source.randrange(len(steps)),
                at_most=source.randint(0, 4),
            )
            if plan.ended():
                break
        assert plan.ended() and table(plan) == table(whole)
        keys = computed(plan)
        assert len(keys) == len(set(keys))


def test_what_was_finished_when_it_was_killed_is_not_run_again(tmp_path: Path) -> None:
    path = make_search(tmp_path, scheduler=ASHA)
    run_plan(opened(path).plan(), slots=2, at_most=9)
    plan = opened(path).plan()
    before = {
        entry.key: entry for entry in plan.ledger.entries.values() if entry.state == "finished"
    }
    assert before
    run_plan(plan)
    assert all(plan.ledger.entries[key] is entry for key, entry in before.items())


def among_the_best_half(own: float, earlier: list[float]) -> tuple[bool, str]:
    kept = sum(value > own for value in earlier) < math.ceil((len(earlier) + 1) / 2)
    return kept, f"not among the best of {len(earlier) + 1} after 2 tasks (asha)"


def not_below_the_median(own: float, earlier: list[float]) -> tuple[bool, str]:
    kept = len(earlier) < MEDIAN["at_least"] or own >= statistics.median(earlier)
    return kept, f"below the median of {len(earlier)} earlier trials after 2 tasks (median)"


@pytest.mark.parametrize(
    ("rule", "judge"), [(ASHA, among_the_best_half), (MEDIAN, not_below_the_median)]
)
def test_after_two_tasks_those_that_the_rule_keeps_go_on_and_no_others(
    tmp_path: Path, rule: Any, judge: Callable[[float, list[float]], tuple[bool, str]]
) -> None:
    plan = finished(make_search(tmp_path, scheduler=rule, trials=12), slots=3)
    trials, values = plan.ledger.of("trial"), list[float]()
    for trial in trials:
        own = trial.results[1].figures["op"].mean
        kept, why = judge(own, values)
        assert (trial.state, trial.tasks, trial.reason) == (
            ("finished", 3, "") if kept else ("stopped", 2, why)
        )
        values.append(own)
    assert {trial.state for trial in trials} == {"finished", "stopped"}
    assert plan.best()[0].state == "finished"


def test_a_member_of_a_population_goes_on_from_another_ones_stages(tmp_path: Path) -> None:
    plan = finished(make_search(tmp_path, scheduler=PBT, trials=8), slots=3)
    members = plan.ledger.of("trial")
    copiers = [member for member in members if member.copied]
    assert copiers and all(member.state == "finished" for member in members)
    for member in copiers:
        copied = member.copied[-1]
        mine = plan.courses.open(list(member.learnt), 0)
        inherited = {stage.key for stage in mine.until(copied.tasks)}
        result = members[copied.source].after(copied.tasks)
        assert result is not None and inherited == set(result.stages)
        if copied.tasks < 3:
            (train,) = [stage for stage in mine.stages[copied.tasks] if stage.name == "train"]
            assert train.inputs["model"].key in inherited and train.key in member.stages
            assert train.key not in members[copied.source].stages
    first = {member.number: member.results[0].figures["op"].mean for member in members}
    copied_once = [m for m in copiers if m.copied[0].tasks == 1]
    assert all(first[m.number] <= first[m.copied[0].source] for m in copied_once)


def test_each_trial_runs_with_every_seed_and_shows_their_spread(tmp_path: Path) -> None:
    plan = finished(make_search(tmp_path, seeds=[0, 1, 2], trials=2))
    for trial in plan.ledger.of("trial"):
        value = trial.figures["op"]
        assert len(value.values) == 3 and value.error is not None
        assert value.mean == pytest.approx(sum(value.values) / 3)
        trains = [key for key in trial.stages if key.startswith("train/upper/")]
        assert len(trains) == 3


def test_the_best_and_the_stream_as_it_is_are_run_on_another_order(tmp_path: Path) -> None:
    confirm = {"best": 2, "seeds": [7, 8]}
    plan = finished(make_search(tmp_path, confirm=confirm))
    found = plan.ledger.of("confirm")
    assert [entry.number for entry in found] == [
        -1,
        *sorted(entry.number for entry in plan.best()[:2]),
    ]
    for entry in found:
        assert entry.order == ("first", "reverse", "upper") and entry.seeds == (7, 8)
        assert entry.state == "finished" and len(entry.figures["op"].values) == 2
    as_it_is = found[0].figures["op"].mean
    assert as_it_is == pytest.approx((FIRST + 2 * score(plan.courses.base.config)) / 3 - FORGET)


def test_a_trial_that_is_written_as_a_stream_is_the_stream_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_search(tmp_path / "search", trials=2, changes={"model.path": "other"})
    (tmp_path / "search" / "model").rename(tmp_path / "other")
    monkeypatch.chdir(tmp_path)  # paths that are given as changes begin here
    plan = opened(path).plan()
    run_plan(plan)
    best = plan.best()[0]
    target = tmp_path / "elsewhere" / "best.yaml"
    target.parent.mkdir()
    target.write_text(best_stream(plan, best, target), encoding="utf-8")
    monkeypatch.chdir(target.parent)
    written = open_stream(target)
    done = {stage for stage in written.stages if is_finished(written.store, stage)}
    assert {stage.key for stage in done} == best.stages
    # What the last task leaves for a next one is still to be done.
    open_ = {stage.name for stage in set(written.stages) - done}
    assert open_ == {"sample", "score", "select", "teach"}


def test_constraints_compare_with_a_reference_that_is_run_first(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "references": {"plain": {"method": {"name": "seqft"}}},
        "constraints": ["new_task_score >= 1.05 * plain"],
    }
    plan = finished(make_search(tmp_path, **values))
    plain = plan.ledger.entries["reference-plain"].figures["new_task_score"].mean
    assert plain == pytest.approx((FIRST + 2 * 0.7) / 3)
    best = plan.best()
    assert best and len(best) < 8
    for trial in plan.ledger.of("trial"):
        able = trial.figures["new_task_score"].mean >= 1.05 * plain
        assert able == (trial in best) == (plan.missed(trial)[0] <= 0)


def test_of_several_figures_the_front_comes_first(tmp_path: Path) -> None:
    plan = finished(make_search(tmp_path, goal={"pareto": ["op", "forgetting"]}))
    best = plan.best()
    assert len(best) == 8  # forgetting is the same for all, so the best OP alone is on the front
    assert best[0].figures["op"].mean == max(trial.figures["op"].mean for trial in best)


def test_settings_that_cannot_be_are_refused_and_the_others_go_on(tmp_path: Path) -> None:
    space = {
        "replay": {"choice": [{"ratio": 0.1}, {"rows": 4}]},
        "replay.ratio": {"choice": [0.1, 0.2]},
    }
    plan = finished(make_search(tmp_path, space=space, search={"by": "grid"}, trials=None))
    trials = plan.ledger.of("trial")
    assert len(trials) == 4
    for trial in trials:
        both = "rows" in trial.settings["replay"]
        assert trial.state == ("refused" if both else "finished")
        assert not both or "ratio and rows are both set" in trial.reason


def test_a_step_that_fails_ends_its_trial_alone_and_is_tried_again_when_resumed(
    tmp_path: Path,
) -> None:
    path = make_search(tmp_path)
    plan = opened(path).plan()
    plan.begin()
    step = plan.next()
    assert step is not None
    plan.record(step, (), "DataError: row 7")
    run_plan_without_begin(plan)
    first, *others = plan.ledger.of("trial")
    assert (first.state, first.reason) == ("failed", "DataError: row 7")
    assert {trial.state for trial in others} == {"finished"}
    again = finished(path)
    assert {trial.state for trial in again.ledger.of("trial")} == {"finished"}
    assert table(again) == table(finished(make_search(tmp_path / "undisturbed")))


def test_a_member_that_failed_catches_up_with_its_population(tmp_path: Path) -> None:
    path = make_search(tmp_path, scheduler=PBT, trials=4)
    plan = opened(path).plan()
    run_plan(plan, at_most=5)
    step = plan.next()
    assert step is not None and step.tasks == 2
    plan.record(step, (), "OutOfMemory")
    run_plan_without_begin(plan)
    assert sorted(trial.state for trial in plan.ledger.of("trial")) == ["failed", *["finished"] * 3]
    again = finished(path)
    assert {trial.state for trial in again.ledger.of("trial")} == {"finished"}


def run_plan_without_begin(plan: Plan) -> None:
    while (step := plan.next()) is not None:
        plan.record(step, carry_out(step, plan.ledger.store), None)


def test_more_trials_later_begin_with_those_there_were(tmp_path: Path) -> None:
    path = make_search(tmp_path, scheduler=ASHA, trials=5)
    few = table(finished(path))
    many = table(finished(path, "trials=9"))
    assert many[:5] == few and len(many) == 9


def test_a_folder_of_another_search_is_refused_by_name(tmp_path: Path) -> None:
    path = make_search(tmp_path)
    finished(path)
    with pytest.raises(ConfigError, match=r"belongs to another search, with another goal, seed;"):
        opened(path, "seed=3", "goal={metric: bwt}")
    make_search(tmp_path, space=SPACE | {"replay.ratio": {"choice": [0.1, 0.2]}})
    with pytest.raises(ConfigError, match=r"search weights: .*searches/weights .*another space"):
        opened(path)
    make_search(tmp_path, changes={"train.epochs": 2})
    with pytest.raises(ConfigError, match="another changes, stream"):
        opened(path)


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.lists(st.integers(0, 7), min_size=10, max_size=40), slots=st.integers(1, 6))
def test_decisions_do_not_depend_on_who_ends_first(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], slots: int
) -> None:
    folder = tmp_path_factory.mktemp("order")
    source = iter(order * 100)
    plan = opened(make_search(folder, scheduler=ASHA, trials=5)).plan(2)
    run_plan(plan, slots=slots, choose=lambda _: next(source))
    again = finished(make_search(folder / "again", scheduler=ASHA, trials=5))
    assert table(plan) == table(again)
    assert WEIGHT in plan.ledger.of("trial")[0].settings
