"""Budgets to heads, against equation (11) by brute force."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekr.errors import ConfigError, DataError, StoreError
from seekr.selection import HeadSelection, random_heads, select_heads


@settings(max_examples=60, deadline=None)
@given(data=st.data(), layers=st.integers(1, 4), heads=st.integers(1, 3))
def test_no_other_choice_within_the_budgets_is_more_important(
    data: st.DataObject, layers: int, heads: int
) -> None:
    size = layers * heads
    values = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    importance = np.array(values, dtype=np.float64).reshape(layers, heads)
    layer_budget = data.draw(st.integers(1, layers))
    head_budget = data.draw(st.integers(1, layer_budget * heads))
    found = select_heads(importance, layer_budget, head_budget)

    # itertools yields the lowest indices first and max keeps the first of equals.
    best_layers = max(
        itertools.combinations(range(layers), layer_budget),
        key=lambda chosen: sum(importance[layer].sum() for layer in chosen),
    )
    pairs = list(itertools.product(best_layers, range(heads)))
    best_heads = max(
        itertools.combinations(pairs, head_budget),
        key=lambda chosen: sum(importance[pair] for pair in chosen),
    )
    assert found.heads == best_heads


def test_ties_go_to_the_lowest_layer_and_head() -> None:
    found = select_heads(np.ones((4, 3)), layer_budget=2, head_budget=4)
    assert found.heads == ((0, 0), (0, 1), (0, 2), (1, 0))


def test_heads_outside_the_chosen_layers_are_never_taken() -> None:
    importance = np.array([[9.0, 0.0, 0.0], [4.0, 4.0, 4.0], [5.0, 5.0, 5.0]])
    assert select_heads(importance, 2, 3).by_layer() == {2: (0, 1, 2)}


def test_by_layer_lists_ascending_heads_of_chosen_layers_only() -> None:
    selection = HeadSelection(num_layers=4, num_heads=3, heads=((0, 1), (3, 0), (3, 2)))
    assert selection.by_layer() == {0: (1,), 3: (0, 2)}


@pytest.mark.parametrize(
    ("layer_budget", "head_budget", "message"),
    [
        (0, 1, r"layer_budget is 0; 1\.\.4 is allowed"),
        (5, 1, r"layer_budget is 5; 1\.\.4 is allowed because the model has 4 layers"),
        (2, 0, r"head_budget is 0; 1\.\.6 is allowed"),
        (2, 7, r"head_budget is 7; 1\.\.6 is allowed because 2 layers of 3 heads"),
    ],
)
def test_budgets_the_model_cannot_fill_are_refused(
    layer_budget: int, head_budget: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        select_heads(np.ones((4, 3)), layer_budget, head_budget)
    with pytest.raises(ConfigError, match=message):
        random_heads(0, 4, 3, layer_budget, head_budget)


def test_broken_importance_is_refused_naming_the_head() -> None:
    importance = np.ones((2, 2))
    importance[1, 0] = math.nan
    with pytest.raises(DataError, match="layer 1, head 0 is nan"):
        select_heads(importance, 1, 1)


@pytest.mark.parametrize("heads", [(), ((1, 0), (0, 0)), ((0, 0), (0, 0)), ((4, 0),), ((0, -1),)])
def test_selections_that_are_empty_unsorted_or_outside_the_model_are_refused(heads) -> None:
    with pytest.raises(ConfigError, match="head selection"):
        HeadSelection(num_layers=4, num_heads=3, heads=heads)


def test_selection_survives_json() -> None:
    selection = select_heads(np.arange(12.0).reshape(4, 3), 3, 5)
    assert HeadSelection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_layers": 4, "num_heads": 3, "heads": [[0]]},
        {"num_layers": 4, "num_heads": 3, "heads": [[7, 0]]},
        {"num_layers": 4, "num_heads": 3, "heads": None},
    ],
)
def test_damaged_selections_are_store_errors(values: dict[str, object]) -> None:
    with pytest.raises(StoreError, match="head selection is damaged"):
        HeadSelection.from_dict(values)


def test_random_heads_keep_the_budgets_and_depend_on_the_seed_alone() -> None:
    drawn = [random_heads(seed, 8, 4, 3, 6) for seed in range(200)]
    assert drawn == [random_heads(seed, 8, 4, 3, 6) for seed in range(200)]
    assert all(len(set(one.heads)) == 6 and len(one.by_layer()) <= 3 for one in drawn)
    counts = np.zeros((8, 4))
    for one in drawn:
        for pair in one.heads:
            counts[pair] += 1
    # 200 * 6 / 32 = 37.5 draws expected per head; sd about 5.5 plus the sharing of layers.
    assert counts.min() > 12 and counts.max() < 70
