"""The retention benchmark's tasks, streams and table; running it takes an hour and is no test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.retention import suite, tasks
from benchmarks.retention.__main__ import CONFIGURATIONS
from benchmarks.retention.show import figure, markdown
from pipelines.load import load_config

GROUPS: dict[str, Any] = yaml.safe_load(CONFIGURATIONS.read_text(encoding="utf-8"))
ALL = {name: changes for group in GROUPS.values() for name, changes in group.items()}


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("reverse", "abcdef", "fedcba"),
        ("swap", "abcde", "badce"),
        ("rotate", "abcde", "cdeab"),
        ("fold", "abcde", "aebdc"),
        ("deal", "abcdefg", "acegbdf"),
        ("cut", "abcdefg", "defgabc"),
    ],
)
def test_a_task_is_what_its_docstring_says(task: str, text: str, answer: str) -> None:
    assert tasks.TASKS[task](text) == answer


def test_rows_are_distinct_reproducible_and_other_for_another_seed() -> None:
    rows = tasks.rows("fold", 300, seed=0)
    inputs = [row["input"] for row in rows]
    assert len(set(inputs)) == 300 and rows[:50] == tasks.rows("fold", 50, seed=0)
    assert inputs[:50] != [row["input"] for row in tasks.rows("fold", 50, seed=1)]
    assert all(row["output"] == tasks.fold(row["input"]) for row in rows)
    assert {len(text) for text in inputs} == set(tasks.LENGTHS)


def test_both_orders_have_all_tasks() -> None:
    assert all(sorted(order) == sorted(tasks.TASKS) for order in tasks.ORDERS.values())
    assert len(tasks.TASKS) >= 6


def test_every_configuration_opens_as_a_stream_of_its_own(tmp_path: Path) -> None:
    runs = suite.write_streams(tmp_path, ALL, ["1"], [7])
    runs += suite.write_streams(tmp_path, {"seqft": ALL["seqft"]}, ["2"], [7])
    assert len(runs) == len(ALL) + 1
    first = {run.stream.stages[-1].fingerprint for run in runs}
    assert len(first) == len(runs), "two configurations are the same stream"
    for run in runs:
        config = load_config(run.stream.path)
        assert tuple(task.name for task in config.tasks) == tasks.ORDERS[run.order]
        assert config.seed == run.seed == 7
    shared = {
        (run.configuration.startswith("sapt"), stage.fingerprint)
        for run in runs
        if run.order == "1"
        for stage in run.stream.stages
        if str(stage) == "train/reverse"
    }
    assert len(shared) == 2, "the first task is learnt once for all methods, and once in a block"


def raw(name: str, order: str, op: float) -> dict[str, Any]:
    figures = {"op": op, "bwt": op - 1, "bwt_t": op - 1, "tasks": ["a"], "matrix": [[1.0]]}
    costs = {"seconds": 10.0, "peak_memory_bytes": 2**20, "replay_bytes": 2048, "borrowed_bytes": 0}
    return {"configuration": name, "order": order} | figures | costs


def test_the_table_has_means_and_standard_errors_per_order(tmp_path: Path) -> None:
    rows = [raw("seqft", "1", op) for op in (0.2, 0.4)] + [raw("seqft", "2", 0.6)]
    line = markdown(rows).splitlines()[2]
    assert line.startswith("| seqft | 3 | 30.0 ± 10.0 | 60.0 | 40.0 ± 11.5 | -60.0 ± 11.5 |")
    figure(rows, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
