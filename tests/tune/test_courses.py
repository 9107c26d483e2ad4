"""What a trial computes: all that its figures are read off, and nothing for a task that it does not learn."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tune.searching import WEIGHT, make_search, opened
from tune.courses import Course

TASKS = 3


def course(folder: Path, **values: object) -> Course:
    search = opened(make_search(folder, tasks=TASKS, **values))
    return search.courses.open([{WEIGHT: 1.0}] * TASKS, 0)


@pytest.mark.parametrize("learnt", range(1, TASKS + 1))
def test_what_a_task_leaves_for_a_next_one_waits_until_there_is_one(
    tmp_path: Path, learnt: int
) -> None:
    own = course(tmp_path)
    (newest,) = {s.task for s in own.stages[learnt - 1] if s.name == "train"}
    begun = own.until(learnt)
    assert {s.name for s in begun if newest in s.task} == {"ingest", "train", "evaluate"}
    assert set(begun) < set(own.until(learnt + 1)) or learnt == TASKS
    # Nothing that is needed is missing, and everything comes after what it is made from.
    for place, stage in enumerate(begun):
        assert set(stage.inputs.values()) <= set(begun[:place])


def test_all_that_is_left_out_before_the_last_task_is_made_up_for_with_the_next_one(
    tmp_path: Path,
) -> None:
    own = course(tmp_path)
    for learnt in range(1, TASKS):
        whole = {stage for group in own.stages[:learnt] for stage in group}
        assert whole <= set(own.until(learnt + 1))


@pytest.mark.parametrize(
    "asked",
    [
        {"goal": {"pareto": ["op", "replay_bytes"]}},
        {"constraints": ["replay_bytes <= 1000000"]},
    ],
)
def test_a_search_about_the_replay_store_fills_it_after_every_task(
    tmp_path: Path, asked: dict[str, object]
) -> None:
    own = course(tmp_path / "whole", **asked)
    for learnt in range(1, TASKS + 1):
        assert own.until(learnt) == tuple(s for group in own.stages[:learnt] for s in group)
    search = opened(make_search(tmp_path / "asked", tasks=TASKS, **asked))
    other = opened(make_search(tmp_path / "other", tasks=TASKS))
    assert set(search.courses.measures) - set(other.courses.measures) == {"replay_bytes"}
