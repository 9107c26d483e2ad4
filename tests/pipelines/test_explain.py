"""Every stage that would run has a reason a person can act on."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.explain import explain
from pipelines.fingerprint import ABSENT, Change
from pipelines.stage import Stage, StageOutcome, Workspace, run_stage
from pipelines.store import Store

TASK_COUNT = 15
TASKS = ("reverse", "sort", "count")


def stream(
    budget: int = 24, lr: float = 0.1, tasks: int = 2, version: int = 1, data: str = "d"
) -> dict[str, Stage]:
    """A small stream: per task ingest, train (from the task before and its teacher) and teach."""
    stages: dict[str, Stage] = {}
    for i, task in enumerate(TASKS[:tasks]):
        inputs = {"data": Stage(name="ingest", task=task, sources={"rows": f"{data}{i}"})}
        stages[f"ingest/{task}"] = inputs["data"]
        if i:
            inputs |= {"model": stages[f"train/{TASKS[i - 1]}"]}
            inputs |= {"replay": stages[f"teach/{TASKS[i - 1]}"]}
        train = Stage(name="train", task=task, config={"train": {"lr": lr}}, inputs=inputs)
        teach = Stage(
            name="teach",
            task=task,
            version=version,
            config={"method": {"layer_budget": budget}},
            inputs={"model": train},
        )
        stages |= {f"train/{task}": train, f"teach/{task}": teach}
    return stages


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "root")


def run(store: Store, stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        run_stage(store, stage, lambda workspace: StageOutcome())


def texts(store: Store, stages: dict[str, Stage]) -> dict[str, str]:
    return {str(e.stage): str(e) for e in explain(store, stages.values())}


def test_an_empty_store_has_nothing_of_the_kind(store: Store) -> None:
    assert texts(store, stream(tasks=1)) == {
        name: f"{name} would run: nothing of this kind and task is in the store"
        for name in ("ingest/reverse", "train/reverse", "teach/reverse")
    }


def test_finished_stages_are_reused_and_say_when_and_where(store: Store) -> None:
    stages = stream()
    run(store, stages)
    for explanation in explain(store, stages.values()):
        assert explanation.record is not None and explanation.causes == ()
        assert str(explanation) == (
            f"{explanation.stage}: reused, computed at {explanation.record.finished_at} "
            f"on host {explanation.record.host}"
        )


def test_a_changed_field_is_followed_to_the_stage_it_belongs_to(store: Store) -> None:
    run(store, stream(budget=24))
    changed = texts(store, stream(budget=16))
    assert changed["train/reverse"].startswith("train/reverse: reused")
    assert changed["teach/reverse"] == (
        "teach/reverse would run: because method.layer_budget 24 -> 16"
    )
    assert changed["train/sort"] == (
        "train/sort would run: because teach/reverse changed: method.layer_budget 24 -> 16"
    )
    assert changed["teach/sort"] == (
        "teach/sort would run: because method.layer_budget 24 -> 16; "
        "teach/reverse changed: method.layer_budget 24 -> 16"
    )


def test_data_versions_and_several_roots_are_told_apart(store: Store) -> None:
    run(store, stream())
    changed = texts(store, stream(data="e", version=2))
    assert (
        changed["ingest/reverse"] == 'ingest/reverse would run: because sources.rows "d0" -> "e0"'
    )
    assert changed["train/reverse"] == (
        'train/reverse would run: because ingest/reverse changed: sources.rows "d0" -> "e0"'
    )
    assert changed["teach/reverse"] == (
        "teach/reverse would run: because version 1 -> 2; "
        'ingest/reverse changed: sources.rows "d0" -> "e0"'
    )


def test_the_nearest_of_several_earlier_results_is_compared(store: Store) -> None:
    for lr in (0.1, 0.2, 0.3):
        run(store, stream(lr=lr, budget=24))
    run(store, stream(lr=0.3, budget=16))
    explanations = {str(e.stage): e for e in explain(store, stream(lr=0.1, budget=16).values())}
    (cause,) = explanations["teach/reverse"].causes
    # 0.1 with 24 and 0.3 with 16 both differ in one field; the later result is taken.
    assert cause.stage == "train/reverse"
    assert cause.change == Change(path="train.lr", old=0.3, new=0.1)


def test_an_added_and_an_exchanged_input_are_named(store: Store) -> None:
    old, other = stream(tasks=1), Stage(name="prompts", task="reverse")
    run(store, old)
    train = old["train/reverse"]
    added = Stage(
        name="train", task="reverse", config=train.config, inputs={**train.inputs, "extra": other}
    )
    (explanation,) = explain(store, [added])
    shown = f"prompts/reverse@{other.fingerprint[:8]}"
    assert explanation.causes[0].change == Change(path="inputs.extra", old=ABSENT, new=shown)
    exchanged = Stage(name="train", task="reverse", config=train.config, inputs={"data": other})
    before = f"ingest/reverse@{train.inputs['data'].fingerprint[:8]}"
    assert str(explain(store, [exchanged])[0]) == (
        f'train/reverse would run: because inputs.data "{before}" -> "{shown}"'
    )


def test_a_failed_attempt_is_part_of_the_answer(store: Store) -> None:
    def fail(workspace: Workspace) -> StageOutcome:
        raise MemoryError("too large")

    stage = stream(tasks=1)["ingest/reverse"]
    with pytest.raises(MemoryError):
        run_stage(store, stage, fail)
    assert "(attempt 1 failed at " in str(explain(store, [stage])[0])
    assert str(explain(store, [stage])[0]).endswith("MemoryError: too large)")


def test_a_damaged_record_of_another_result_is_no_obstacle(store: Store) -> None:
    old = stream(tasks=1)
    run(store, old)
    store.write_bytes(f"{old['ingest/reverse'].key}/record.json", b"{")
    changed = texts(store, {k: s for k, s in stream(tasks=1, data="e").items()})
    assert "nothing of this kind" in changed["ingest/reverse"]
    assert "inputs.data" in changed["train/reverse"]


def test_a_long_stream_is_explained_quickly_and_each_root_once(store: Store) -> None:
    # Two ways lead from each task to the one before: 2^15 paths if every one were walked.
    def chain(lr: float) -> dict[str, Stage]:
        stages: dict[str, Stage] = {}
        before: dict[str, Stage] = {}
        for i in range(TASK_COUNT):
            train = Stage(name="train", task=f"t{i:02}", config={"lr": lr}, inputs=before)
            teach = Stage(name="teach", task=f"t{i:02}", inputs={"model": train})
            stages |= {f"train{i}": train, f"teach{i}": teach}
            before = {"model": train, "replay": teach}
        return stages

    run(store, chain(0.1))
    (explanation,) = explain(store, [chain(0.2)[f"teach{TASK_COUNT - 1}"]])
    roots = [cause.stage for cause in explanation.causes]
    assert roots == [f"train/t{i:02}" for i in reversed(range(TASK_COUNT))]
