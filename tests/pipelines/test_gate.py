"""The gate against a float64 reference written from the definitions, and what it records, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.config import StreamConfig
from pipelines.continual_config import GateConfig
from pipelines.decisions import Check, DecisionLog, Score
from pipelines.gate import Ability, Evidence, decide, evidence_of, judge, scores_of
from pipelines.results import StreamView
from pipelines.store import Store
from seekr.metrics import AccuracyMatrix
from tests.pipelines.committed import commit_stream, score_of
from tests.pipelines.streams import stream_values

# Whole 64ths: their differences and sums are exact, so a bound that is met exactly must hold.
SCORES = st.integers(0, 64).map(lambda n: n / 64)
BOUNDS = st.none() | SCORES


def named(size: int) -> tuple[str, ...]:
    return tuple(f"task-{j}" for j in range(size))


def evidence(
    rows: Sequence[Sequence[float]], champion: Sequence[float] | None = None, **more: Any
) -> Evidence:
    """R as lists: row i has the scores of tasks 0..i, and perhaps that of task i+1 before it is learnt."""
    tasks = named(len(rows))
    cells = {(tasks[i], tasks[j]): s for i, row in enumerate(rows) for j, s in enumerate(row)}
    now = {task: Score(score=rows[-1][j], measure="m") for j, task in enumerate(tasks)}
    then = None
    if champion is not None:
        then = {tasks[j]: Score(score=s, measure="m") for j, s in enumerate(champion)}
    matrix = AccuracyMatrix(tasks=tasks, cells=cells)
    return Evidence(matrix=matrix, scores=now, champion=then, **more)


def failed(checks: Sequence[Check]) -> set[tuple[str, str]]:
    return {(check.bound, check.of) for check in checks if check.holds is False}


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[list[float]], list[float] | None]:
    """R with one more column than each row has learnt, and the champion's scores as they were."""
    size = draw(st.integers(1, 5))
    rows = [[draw(SCORES) for _ in range(min(i + 2, size))] for i in range(size)]
    known = draw(st.none() | st.integers(1, size))
    return rows, None if known is None else [draw(SCORES) for _ in range(known)]


def reference(
    gate: GateConfig, rows: list[list[float]], champion: list[float] | None
) -> tuple[set[tuple[str, str]], bool]:
    """What fails, by the definitions: bounds on scores, gains and losses of the last row of R."""
    tasks, last = named(len(rows)), rows[-1]
    new = range(0 if champion is None else len(champion), len(rows))
    found: set[tuple[str, str]] = set()
    for j in new:
        if gate.min_new_score is not None and last[j] < gate.min_new_score:
            found.add(("min_new_score", tasks[j]))
        gain = last[j] - rows[j - 1][j] if j > 0 else math.inf
        if gate.min_new_gain is not None and gain < gate.min_new_gain:
            found.add(("min_new_gain", tasks[j]))
    if gate.against == "best":
        losses = [
            max(rows[i][j] for i in range(j, len(rows) - 1)) - last[j] for j in range(len(rows) - 1)
        ]
    else:
        losses = [then - now for then, now in zip(champion or [], last, strict=False)]
    for task, loss in zip(tasks, losses, strict=False):
        if gate.max_forgetting is not None and loss > gate.max_forgetting:
            found.add(("max_forgetting", task))
    mean = gate.max_mean_forgetting
    if losses and mean is not None and sum(losses) / len(losses) > mean + 1e-12:
        found.add(("max_mean_forgetting", ""))
    return found, bool(losses)


@given(
    histories(),
    st.fixed_dictionaries(
        {
            name: BOUNDS
            for name in ("min_new_score", "min_new_gain", "max_forgetting", "max_mean_forgetting")
        }
    ),
    st.sampled_from(["best", "champion"]),
)
def test_the_gate_fails_what_the_definitions_fail(
    history: tuple[list[list[float]], list[float] | None], bounds: dict[str, Any], against: Any
) -> None:
    if all(bound is None for bound in bounds.values()):
        return
    rows, champion = history
    gate = GateConfig(**bounds, against=against)
    checks = judge(gate, evidence(rows, champion))
    wrong, looks_back = reference(gate, rows, champion)
    assert failed(checks) == wrong
    if not looks_back:
        skipped = {check.bound for check in checks if check.holds is None}
        wanted = {n for n in ("max_forgetting", "max_mean_forgetting") if bounds[n] is not None}
        assert wanted <= skipped
    assert all(check.why for check in checks)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_bound_holds_or_fails_but_for_rounding(best: float, now: float, limit: float) -> None:
    (check,) = judge(GateConfig(max_forgetting=limit), evidence([[best], [now, 0.0]]))
    assert check.figure is not None and math.isclose(check.figure, best - now, abs_tol=1e-12)
    if abs(best - now - limit) > 1e-8:
        assert check.holds is (best - now <= limit)
    (exact,) = judge(GateConfig(max_forgetting=0.05), evidence([[0.9], [0.85, 0.0]]))
    assert exact.holds, "0.9 - 0.85 is a little more than 0.05 in floating point"


def test_many_small_losses_pass_against_the_champion_and_not_against_the_best() -> None:
    rows = [[0.9], [0.87, 0.9], [0.84, 0.9, 0.9]]
    champion = rows[1][:2]
    drift = evidence(rows, champion)
    assert not failed(judge(GateConfig(max_forgetting=0.04, against="champion"), drift))
    assert failed(judge(GateConfig(max_forgetting=0.04), drift)) == {("max_forgetting", "task-0")}


def test_without_a_predecessor_bounds_that_need_one_are_not_applied_and_say_so() -> None:
    first = evidence([[0.7]])
    gate = GateConfig(min_new_score=0.5, max_forgetting=0.1, max_mean_forgetting=0.1)
    by_name = {check.bound: check for check in judge(gate, first)}
    assert by_name["min_new_score"].holds is True
    for bound in ("max_forgetting", "max_mean_forgetting"):
        assert by_name[bound].holds is None and "no task was learnt before" in by_name[bound].why
    gate = GateConfig(max_forgetting=0.1, against="champion")
    (check,) = judge(gate, evidence([[0.7], [0.1, 0.7]]))
    assert check.holds is None and "no champion" in check.why


def test_a_figure_that_ought_to_be_there_and_is_not_fails() -> None:
    tasks = named(2)
    holes = AccuracyMatrix(tasks=tasks, cells={(tasks[0], tasks[0]): 0.9})
    gate = GateConfig(min_new_score=0.0, max_forgetting=1.0, max_mean_forgetting=1.0)
    checks = judge(gate, Evidence(matrix=holes, scores={}))
    assert all(check.holds is False and "not known" in check.why for check in checks)


def test_a_champion_that_was_measured_otherwise_is_not_compared_with() -> None:
    seen = evidence([[0.9], [0.9, 0.9]], champion=[0.9])
    other = {"task-0": Score(score=0.9, measure="another metric")}
    gate = GateConfig(max_forgetting=0.1, against="champion")
    assert not failed(judge(gate, seen))
    (check,) = judge(gate, replace(seen, champion=other))
    assert check.holds is False and "measured on other rows or in another way" in check.why


@pytest.mark.parametrize(
    ("ability", "holds"),
    [
        (Ability(base=0.8, now=0.75), True),
        (Ability(base=0.8, now=0.6), False),
        (Ability(base=0.8, now=0.9), True),
        (Ability(base=10.0, now=10.05, less_is_better=True), True),
        (Ability(base=10.0, now=12.0, less_is_better=True), False),
        (Ability(base=0.8, now=None), False),
    ],
)
def test_general_ability_may_fall_so_far_and_no_further(ability: Ability, holds: bool) -> None:
    seen = evidence([[0.9]], general={"piqa": ability})
    (check,) = judge(GateConfig(max_general_loss=0.1), seen)
    assert (check.of, check.holds) == ("piqa", holds)
    assert failed(judge(GateConfig(max_general_loss=0.1), evidence([[0.9]]))), (
        "nothing was measured"
    )


TASKS = ("sort", "reverse", "copy")


def config_of(view: StreamView, **gate: Any) -> StreamConfig:
    values = stream_values(tasks=2) | {"name": view.name, "gate": gate}
    return StreamConfig.model_validate(values)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def grown(store: Store, *, forget: float = 0.05) -> list[StreamView]:
    """The same stream after its first, second and third task."""
    whole = commit_stream(Path(store.full_path("x")).parent, TASKS, method="seqft", forget=forget)
    ends = [n for n, r in enumerate(whole.stages, 1) if r.stage == "evaluate"]
    return [
        replace(whole, tasks=TASKS[: k + 1], stages=whole.stages[:end])
        for k, end in enumerate(ends)
    ]


def test_a_model_is_judged_once_and_moves_the_champion_if_all_bounds_hold(store: Store) -> None:
    views = grown(store)
    config = config_of(views[0], max_forgetting=0.05, min_new_score=0.5)
    first = decide(store, config, views[0])
    assert first is not None and first.champion == first.model and first.previous is None
    assert "it is the first champion" in first.reason and "could not be applied" in first.reason
    assert decide(store, config, views[0]) is None
    second = decide(store, config, views[1])
    assert second is not None and second.champion == second.model
    assert {task: s.score for task, s in second.scores.items()} == {
        "sort": pytest.approx(score_of(1, 0)), "reverse": pytest.approx(score_of(1, 1)),
    }  # fmt: skip
    third = decide(store, config, views[2])
    assert third is not None and third.held_back, "sort has lost 0.05 twice"
    assert third.champion == third.previous == second.model
    log = DecisionLog(store, config.name).read()
    assert log.entries == (first, second, third) and log.champion == second.model
    assert "max_forgetting of sort: FAILS (0.1000 against 0.05" in third.reason


def test_other_bounds_are_another_question(store: Store) -> None:
    views = grown(store, forget=0.3)
    strict, loose = (config_of(views[0], max_forgetting=limit) for limit in (0.1, 0.9))
    for view in views[:2]:
        decide(store, strict, view)
    assert decide(store, strict, views[1]) is None
    promoted = decide(store, loose, views[1])
    assert promoted is not None and not promoted.held_back
    assert DecisionLog(store, strict.name).read().champion == promoted.model


def test_after_a_change_of_settings_the_champion_is_still_compared_with(store: Store) -> None:
    """Its model is none of the stream's any more; its scores stand in its decision."""
    views = grown(store)
    config = config_of(views[0], max_forgetting=0.01, against="champion")
    decide(store, config, views[1])
    retrained = replace(views[1], stages=tuple(r for r in views[1].stages if r.task != "sort"))
    newest = DecisionLog(store, config.name).read()
    found = evidence_of(retrained, newest)
    assert found.champion is not None and set(found.champion) == {"sort", "reverse"}
    trained = list(views[2].of("train"))
    assert scores_of(views[2], trained[-1])["copy"].score == pytest.approx(score_of(2, 2))


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"gate": {}}, "no bound is set, so every model would pass"),
        ({"gate": {"min_new_score": 1.5}}, "less than or equal to 1"),
        ({"gate": {"min_new_gain": 0.1}}, "evaluate.forward_transfer is false"),
        ({"gate": {"max_general_loss": 0.1}}, "general.tasks is empty"),
        ({"gate": {"max_forgetting": 0.1}, "method": {"name": "mtl"}}, "gate.against is best and"),
        (
            {"gate": {"max_forgetting": 0.1}, "data": {"columns": {"text": "text"}},
             "tasks": [{"name": "a", "train": "a.jsonl"}], "method": {"name": "seqft"}},
            "gate is set and task a has no test",
        ),
    ],
)  # fmt: skip
def test_a_gate_that_could_not_judge_is_refused(changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValidationError, match=fragment.replace(".", r"\.")):
        StreamConfig.model_validate(stream_values() | changes)
