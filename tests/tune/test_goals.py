"""Goals and constraints against numbers worked by hand; rules and populations against their definitions."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tune.goals import Constraint, Goal, on_front, weighted
from tune.measures import Value
from tune.population import Population, copies, vary
from tune.proposals import Outcome, Proposals
from tune.rules import Halving, Median, decide
from tune.spaces import Range

FIGURES = {
    "op": Value.of([0.5, 0.7]),
    "bwt": Value.of([-0.2, -0.1]),
    "seconds": Value.of([10.0, 30.0]),
}
SPACE = {
    "a": Range(uniform=(0.0, 1.0)),
    "b": Range(integers=(1, 8)),
    "c": Range(choice=("x", "y"), when="b > 4"),
}


def test_a_goal_s_value_and_error_over_seeds() -> None:
    assert Goal(metric="op").values(FIGURES) == (pytest.approx(0.6),)
    assert Goal(metric="op").error(FIGURES) == pytest.approx(0.1)
    both = Goal(weights={"op": 2.0, "bwt": 1.0})
    assert both.values(FIGURES) == (pytest.approx(1.05),)
    # Per seed 0.8 and 1.3: the standard error is half their distance.
    assert both.error(FIGURES) == pytest.approx(0.25)
    assert both.title == "2 op + 1 bwt"
    assert weighted({"op": 2.0, "bwt": 1.0}, FIGURES) == Value.of([2 * 0.5 - 0.2, 2 * 0.7 - 0.1])
    for goal in (Goal(weights={"op": 1.0, "fwt": 1.0}), Goal(pareto=("op", "fwt"))):
        assert (goal.values(FIGURES), goal.error(FIGURES)) == (None, None)
    assert Goal(pareto=("op", "seconds")).values(FIGURES) == (pytest.approx(0.6), 20.0)
    assert Goal(metric="fwt").values(FIGURES) is None
    for wrong in ({}, {"metric": "op", "pareto": ["op", "bwt"]}, {"pareto": ["op", "op"]}):
        with pytest.raises(ValidationError):
            Goal.model_validate(wrong)


@pytest.mark.parametrize(
    ("text", "missed"),
    [
        ("op >= 0.5", -0.1),
        ("op >= 0.75", 0.15),
        ("seconds <= 15", 5.0),
        ("op >= 0.5 * plain", 0.5 * 0.9 - 0.6),
        ("op >= plain", 0.3),
        ("bwt >= -1e-1", 0.05),
        ("fwt >= 0", math.inf),
        ("op >= 0.9 * unknown", math.inf),
    ],
)
def test_by_how_much_a_constraint_is_missed(text: str, missed: float) -> None:
    references = {"plain": {"op": Value.of([0.9])}}
    constraint = Constraint.model_validate(text)
    assert constraint.missed_by(FIGURES, references) == pytest.approx(missed)


@pytest.mark.parametrize("text", ["op", "op > 1", "op >= ", "op == 3", "0.5 <= op", "op >= 2 *"])
def test_a_constraint_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="a constraint is a figure"):
        Constraint.model_validate(text)


@given(points=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_on_the_front_is_who_nobody_beats(points: list[tuple[int, int]]) -> None:
    for ways in product(("max", "min"), repeat=2):
        signs = [1 if way == "max" else -1 for way in ways]

        def beats(p: tuple[int, int], q: tuple[int, int], signs: list[int] = signs) -> bool:
            gains = [s * (a - b) for s, a, b in zip(signs, p, q, strict=True)]
            return min(gains) >= 0 and max(gains) > 0

        expected = [not any(beats(other, point) for other in points) for point in points]
        assert on_front(points, ways) == expected


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    reduction=st.sampled_from([1.5, 2.0, 3.0, 4.0]),
)
def test_halving_keeps_the_best_share_of_those_so_far(
    values: list[float], reduction: float
) -> None:
    rule = Halving(reduction=reduction, first=1)
    for index, own in enumerate(values):
        so_far = sorted(values[: index + 1], reverse=True)
        place = so_far.index(own)  # of equals the first
        kept = place < math.ceil((index + 1) / reduction)
        assert decide(rule, 1, own, values[:index]) == ("go on" if kept else "stop")


def test_a_trial_waits_for_those_with_lower_numbers_and_not_for_the_ended() -> None:
    rule = Halving(first=2)
    assert decide(rule, 1, 0.0, [None, 0.9]) == "go on"  # nobody is stopped before
    assert decide(rule, 2, 0.1, [None, 0.9]) == "wait"
    assert decide(rule, 2, 0.1, [math.nan, 0.9]) == "stop"
    assert decide(rule, 2, 0.1, [math.nan, math.nan]) == "go on"


def test_below_the_median_of_enough_others_a_trial_is_stopped() -> None:
    rule = Median(first=1, at_least=3)
    assert decide(rule, 1, 0.0, [0.5, 0.6]) == "go on"
    assert decide(rule, 1, 0.55, [0.5, 0.6, 0.7]) == "stop"
    assert decide(rule, 1, 0.6, [0.5, 0.6, 0.7]) == "go on"


def test_each_rule_says_in_its_own_words_why_it_stops_a_trial() -> None:
    assert Halving().reason(3) == "not among the best of 4"
    assert Median().reason(4) == "below the median of 4 earlier trials"
    assert Median().reason(1) == "below the median of 1 earlier trial"


def test_the_worst_quarter_copies_the_best_and_nobody_who_has_ended() -> None:
    rule = Population(quantile=0.25)
    values = [0.5, 0.9, 0.1, math.nan, 0.4, 0.8, 0.2, 0.3, 0.6]
    settings = [{"a": index / 10, "b": 1 + index % 8} for index in range(9)]
    found = copies(rule, SPACE, values, settings, seed=3, tasks=1)
    assert set(found) == {2, 6}
    assert {copy.source for copy in found.values()} <= {1, 5}
    assert found == copies(rule, SPACE, values, settings, seed=3, tasks=1)
    assert copies(rule, SPACE, [0.5, 0.5], settings[:2], seed=3, tasks=1) == {}
    assert copies(Population(first=2), SPACE, values, settings, seed=3, tasks=1) == {}


@given(seed=st.integers(0, 1000), start=st.integers(1, 8))
def test_varied_settings_are_in_the_space(seed: int, start: int) -> None:
    found = vary(Population(), SPACE, {"a": 0.5, "b": start}, random.Random(seed))
    assert 0 <= found["a"] <= 1 and 1 <= found["b"] <= 8
    assert ("c" in found) == (found["b"] > 4)


def proposals(by: str, lag: int = 2) -> Proposals:
    return Proposals(SPACE, by, ("max",), seed=1, startup=3, lag=lag, constrained=False)  # type: ignore[arg-type]


def outcome(settings: dict[str, float]) -> Outcome:
    return Outcome(values=(1 - abs(settings["a"] - 0.7),), tasks=2, whole=True)


def test_random_settings_do_not_wait_for_anybody() -> None:
    ask = proposals("random")
    found = [ask.settings(number, {}) for number in range(5)]
    assert None not in found and found == [proposals("random").settings(n, {}) for n in range(5)]


def test_parzen_estimators_learn_from_those_that_must_have_ended_and_no_others() -> None:
    ask, outcomes = proposals("tpe"), dict[int, Outcome]()
    settings: list[dict[str, float]] = []
    for number in range(30):
        found = ask.settings(number, outcomes)
        assert found is not None
        settings.append(found)
        if number >= 1:
            assert ask.settings(number + 1, outcomes) is None or number + 1 - 2 in outcomes
            outcomes[number - 1] = outcome(settings[number - 1])
    # Told more than it needs, or all at once, it proposes the same.
    everything = {number: outcome(found) for number, found in enumerate(settings)}
    again = proposals("tpe")
    assert [again.settings(number, everything) for number in range(30)] == settings
    early = sum(abs(found["a"] - 0.7) for found in settings[:8]) / 8
    late = sum(abs(found["a"] - 0.7) for found in settings[-8:]) / 8
    assert late < early


def test_trials_that_are_there_keep_their_settings_whatever_the_lag() -> None:
    first, outcomes = proposals("tpe", lag=1), dict[int, Outcome]()
    begun: dict[int, dict[str, float]] = {}
    for number in range(12):
        found = first.settings(number, outcomes)
        assert found is not None
        begun[number], outcomes[number] = found, outcome(found)
    # Another lag would have proposed others from the fourth on, and is told of those there are.
    later = proposals("tpe", lag=4)
    assert later.settings(12, outcomes, begun) is not None
    known = [trial for trial in later._study.get_trials() if trial.state.is_finished()]
    told = [trial for trial in known if trial.values is not None]
    assert len(told) == 9  # 12 - lag + 1
    assert {trial.params["a"] for trial in told} == {begun[number]["a"] for number in range(9)}
    alone = proposals("tpe", lag=4)
    assert [alone.settings(n, outcomes) for n in range(12)] != [begun[n] for n in range(12)]
