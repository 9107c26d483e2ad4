"""A search that cannot be run is refused before anything runs: by the field, what was found, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seekr.errors import ConfigError
from tests.tune.searching import SPACE, make_search, opened
from tune.search import load_search, open_search

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a field that does not exist": (
        {"space": {"method.attention_wait": {"uniform": [0, 1]}}},
        ["space.method.attention_wait:", "unknown field", "attention_weight"],
    ),
    "a section that does not exist": (
        {"space": {"metod.attention_weight": {"uniform": [0, 1]}}},
        ["space.metod.attention_weight:", "unknown field", "method"],
    ),
    "a value that the field cannot have": (
        {"space": {"method.attention_weight": {"uniform": [-1, 1]}}},
        ["space.method.attention_weight:", "greater than 0", "found -1"],
    ),
    "more of the model than it has": (
        {"space": {"data.max_length": {"choice": [48, 4096]}}},
        ["space.data.max_length:", "4096"],
    ),
    "where something runs": (
        {"space": {"train.workers": {"choice": [1, 2]}}},
        ["space.train.workers: no stage of the stream depends on it"],
    ),
    "an empty range": (
        {"space": {"replay.ratio": {"uniform": [0.1, 0.1]}}},
        ["space.replay.ratio.uniform: the range is empty", "found [0.1, 0.1]"],
    ),
    "a reversed range": (
        {"space": {"replay.ratio": {"log_uniform": [0.2, 0.1]}}},
        ["space.replay.ratio.log_uniform: the range is reversed", "smaller number first"],
    ),
    "a figure that no stage yields": (
        {"goal": {"metric": "fwt"}},
        ["goal: no stage of the stream yields 'fwt'; there are op,"],
    ),
    "a constraint on such a figure": (
        {"constraints": ["rouge >= 0.5"]},
        ["constraints: no stage of the stream yields 'rouge'"],
    ),
    "a constraint with an unknown reference": (
        {"constraints": ["op >= 0.9 * seqft"]},
        ["speaks of seqft, which is not among the references (none)", "method: {name: seqft}"],
    ),
    "a condition on a field below": (
        {"space": {"replay.ratio": {"uniform": [0.1, 0.2], "when": "train.epochs > 1"},
                   "train.epochs": {"integers": [1, 3]}}},
        ["space.replay.ratio: its condition speaks of train.epochs", "not a field above it"],
    ),
    "a condition that never holds": (
        {"space": {"train.epochs": {"integers": [1, 3]},
                   "replay.ratio": {"uniform": [0.1, 0.2], "when": "train.epochs > 3"}}},
        ["space.replay.ratio: train.epochs > 3 never holds"],
    ),
    "no number of trials": ({"trials": None}, ["trials: missing; how many settings are tried?"]),
    "a grid of endless ranges": (
        {"search": {"by": "grid"}},
        ["search by grid needs lists and method.attention_weight is a range of numbers"],
    ),
    "a population that does not begin at random": (
        {"search": {"by": "tpe"}, "scheduler": {"by": "pbt"}},
        ["scheduler pbt begins with members drawn at random"],
    ),
    "several figures and one ranking": (
        {"goal": {"pareto": ["op", "seconds"]}, "scheduler": {"by": "asha"}},
        ["scheduler asha ranks trials by one number and goal.pareto has several"],
    ),
    "an unknown scheduler": ({"scheduler": {"by": "hyperband"}}, ["scheduler", "asha"]),
    "a rung beyond the last task": (
        {"scheduler": {"by": "asha", "first": 9}},
        ["scheduler.first: after 9 tasks, and the stream has 3"],
    ),
    "another stream's tasks": (
        {"confirm": {"seeds": [1], "order": ["upper", "lower", "first"]}},
        ["confirm.order: upper, lower, first; the stream's tasks are first, reverse, upper"],
    ),
    "a field twice": (
        {"changes": {"method.attention_weight": 3}},
        ["method.attention_weight: in space and in changes"],
    ),
    "an unknown field of the search": ({"trails": 3}, ["trails: unknown field"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name(tmp_path: Path, name: str) -> None:
    values, told = CASES[name]
    path = make_search(tmp_path, **values)
    with pytest.raises(ConfigError) as refused:
        opened(path)
    for text in told:
        assert text in str(refused.value)
    assert not list((tmp_path / "store").rglob("*.json")), "something was written"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("trials", "--set 'trials' is not understood; write --set field.name=value, such as"),
        ("=4", "--set '=4' is not understood; .* --set concurrent=4"),
        ("seeds=[1", r"--set 'seeds=\[1': the value is not valid YAML at line 1"),
        ("goal={metric: op, metric: bwt}", "the value is not valid YAML .*'metric' occurs twice"),
        ("trials.most=4", "there is nothing below 8, so no 'most' .* `seekr tune schema`"),
        ("goal.metrik=op", "goal.metrik: unknown field"),
        ("seeds.3=1", "'3' is not an item of a list of 1; allowed: 0..0"),
        ("changes.train.epochs=2", r"changes is changed as a whole.*--set 'changes=\{\.\.\.\}'"),
        ("space.train.epochs.choice=[1, 2]", "space is changed as a whole"),
        ("references.plain.train.epochs=2", "references is changed as a whole"),
    ],
)
def test_a_change_on_the_command_line_that_cannot_be_is_refused(
    tmp_path: Path, change: str, told: str
) -> None:
    path = make_search(tmp_path, seeds=[0], goal={"metric": "op"})
    with pytest.raises(ConfigError, match=told):
        load_search(path, [change])


def test_a_change_on_the_command_line_reaches_into_a_section(tmp_path: Path) -> None:
    path = make_search(tmp_path, seeds=[0, 1])
    changes = ["search.by=tpe", "search.startup=3", "goal.metric=bwt", "seeds.1=7"]
    found = load_search(path, changes)
    assert (found.search.by, found.search.startup) == ("tpe", 3)
    assert (found.goal.metric, found.seeds) == ("bwt", (0, 7))
    whole = load_search(path, ["changes={train.epochs: 2}", "trials=3"])
    assert (whole.changes, whole.trials) == ({"train.epochs": 2}, 3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\ntrials: 3\nname: b\n", "line 3, column 1: the key 'name' occurs twice"),
        ("space:\n  train.epochs: {choice: [1]}\n  train.epochs: {choice: [2]}\n",
         "line 3, column 3: the key 'train.epochs' occurs twice"),
        ("name: [", "is not valid YAML at line 1"),
        ("", "is empty; a mapping with name, stream, space and trials is needed"),
        ("- name", r"holds \['name'\]; a mapping with name, stream"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_search_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"^search .*search\.yaml .*{told}"):
        load_search(path)
    with pytest.raises(ConfigError, match=r"^search .*no\.yaml does not exist"):
        load_search(tmp_path / "no.yaml")


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    space = {name: {"uniform": [0, 1]} for name in ("method.a", "method.b")}
    with pytest.raises(ConfigError) as refused:
        opened(make_search(tmp_path, space=space, goal={"metric": "fwt"}))
    for text in ("space.method.a:", "space.method.b:", "goal: no stage"):
        assert text in str(refused.value)


def test_a_search_that_was_never_begun_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search weights: there is nothing in .*begin it first"):
        open_search(make_search(tmp_path, space=SPACE))


def test_a_stream_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = make_search(tmp_path, stream="elsewhere.yaml")
    with pytest.raises(ConfigError, match=r"stream .*elsewhere\.yaml does not exist"):
        opened(path)
