"""Spaces: what can be drawn from them, in what order, and under which condition."""

from __future__ import annotations

import json
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tune.spaces import Range, draw, grid, grid_size, satisfying

CONDITIONAL = {
    "heads": Range(integers=(0, 4)),
    "weight": Range(log_uniform=(0.1, 100), when="heads > 0"),
    "shift": Range(choice=(True, False), when="weight >= 10"),
}


def drawn(space: dict[str, Range], seed: int) -> dict[str, Any]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return draw(space, study.ask())


@given(seed=st.integers(0, 2**31 - 1))
def test_what_is_drawn_is_in_range_and_meets_its_conditions(seed: int) -> None:
    found = drawn(CONDITIONAL, seed)
    assert 0 <= found["heads"] <= 4
    assert ("weight" in found) == (found["heads"] > 0)
    assert 0.1 <= found.get("weight", 1.0) <= 100
    assert ("shift" in found) == (found.get("weight", 0.0) >= 10)
    assert found == drawn(CONDITIONAL, seed)


def test_a_choice_may_hold_null_and_whole_sections() -> None:
    space = {"method": Range(choice=({"name": "replay"}, {"name": "seekr", "head_budget": 2})),
             "method.query_budget": Range(choice=(None, 8))}  # fmt: skip
    found = [drawn(space, seed) for seed in range(20)]
    assert {item["method"]["name"] for item in found} == {"replay", "seekr"}
    assert {item["method.query_budget"] for item in found} == {None, 8}


def test_a_grid_holds_everything_once_and_no_field_whose_condition_fails() -> None:
    space = {
        "heads": Range(integers=(0, 4), step=2),
        "weight": Range(choice=(1, 10), when="heads > 0"),
    }
    assert list(grid(space)) == [
        {"heads": 0},
        *({"heads": heads, "weight": weight} for heads in (2, 4) for weight in (1, 10)),
    ]
    assert grid_size(space) == 6


def test_a_field_is_tried_where_the_fields_above_let_it_be() -> None:
    assert satisfying(CONDITIONAL, "heads") == {}
    assert satisfying(CONDITIONAL, "weight") == {"heads": 1}
    assert satisfying(CONDITIONAL, "shift") == {"weight": 100.0, "heads": 1}
    never = CONDITIONAL | {"never": Range(uniform=(0, 1), when="heads > 4")}
    assert satisfying(never, "never") is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "allowed",
    [
        Range(choice=(1, True, 1.0, "1", None)),
        Range(choice=({"a": [1, 2]}, {"a": [1, True]}, [0, 1], [False, 1])),
        Range(integers=(1, 10), step=4),
        Range(uniform=(0, 2)),
        Range(log_uniform=(0.1, 100)),
    ],
)
def test_what_was_drawn_is_known_again_when_a_ledger_has_held_it(allowed: Range) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        held = json.loads(json.dumps(allowed.draw("x", trial)))
        assert allowed.coded(held) == trial.params["x"]
        assert trial.distributions["x"] == allowed.distribution()


def test_true_and_one_are_different_choices_with_neighbours_of_their_own() -> None:
    allowed = Range(choice=(1, "between", True, "last"))
    assert [allowed.coded(value) for value in (1, True)] == [0, 2]
    assert allowed.moved(True, 2.0, up=True) == "last"
    assert allowed.moved(1, 2.0, up=True) == "between"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"uniform": [1, 1]}, "the range is empty"),
        ({"uniform": [2, 1]}, "the range is reversed"),
        ({"integers": [4, 2]}, "the range is reversed"),
        ({"log_uniform": [0, 1]}, "begins above 0"),
        ({"choice": []}, "the choice is empty"),
        ({"choice": [1, 2, 1]}, "the choice has 1 twice"),
        ({}, "one of uniform, log_uniform, integers, choice is needed; found none"),
        ({"uniform": [0, 1], "choice": [1]}, "found uniform and choice"),
        ({"uniform": [0, 1], "step": 2}, "step is only for integers"),
        ({"uniform": [0, 1], "when": "heads"}, "a condition is a field above"),
        ({"uniform": [0, 1], "values": [1]}, "Extra inputs are not permitted"),
    ],
)
def test_a_range_that_cannot_be_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Range.model_validate(values)


@given(
    value=st.floats(0.1, 100),
    up=st.booleans(),
    factor=st.floats(1.01, 10),
    number=st.integers(2, 20),
)
def test_a_moved_value_is_another_one_in_range_unless_at_an_end(
    value: float, up: bool, factor: float, number: int
) -> None:
    moved = Range(log_uniform=(0.1, 100)).moved(value, factor, up)
    assert 0.1 <= moved <= 100
    assert moved == pytest.approx(min(max(value * factor if up else value / factor, 0.1), 100))
    step = Range(integers=(2, 20), step=3)
    start = 2 + 3 * (number % 7)
    found = step.moved(start, factor, up)
    assert found in (step.listed() or ())
    assert (found > start) == (up and start < 20) and (found < start) == (not up and start > 2)
    uneven = Range(integers=(1, 10), step=4)
    assert uneven.moved(9, factor, True) == 9 and uneven.listed() == (1, 5, 9)
    letters = Range(choice=("a", "b", "c"))
    assert letters.moved("b", factor, up) == ("c" if up else "a")
    assert letters.moved("c" if up else "a", factor, up) == ("c" if up else "a")
