"""Searches for tests: a small stream and a YAML over it, and steps that are carried out without computing.

`carry_out` commits every stage of a step through `run_stage`, as a driver does, but writes what a formula
says of the settings instead of training: a task scores the better the nearer the attention weight is to
10, and half a point less with every later task. So what must come out of a search is known, and it can be
killed, reordered and repeated hundreds of times in a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.config import StreamConfig
from pipelines.provenance import Provenance
from pipelines.runner import Job
from pipelines.stage import StageOutcome, run_stage
from pipelines.store import Store
from pipelines.workspace import Workspace
from tests.pipelines.streams import make_stream
from tune.plan import Plan, Step
from tune.search import Search, open_search
from tune.sharing import KINDS

FIRST = 0.8
FORGET = 0.005
WEIGHT = "method.attention_weight"
SPACE: dict[str, Any] = {
    WEIGHT: {"log_uniform": [0.1, 1000]},
    "method.head_budget": {"integers": [1, 4]},
}
PROVENANCE = Provenance.capture()


def make_search(folder: Path, *, tasks: int = 3, **values: Any) -> Path:
    """Write a stream of some tasks and a search over it; `values` are laid over the search's YAML."""
    make_stream(folder, tasks=tasks, data={"metric": "exact_match"})
    search = {
        "name": "weights",
        "stream": "stream.yaml",
        "space": SPACE,
        "search": {"by": "random"},
        "trials": 8,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(search | values, sort_keys=False))
    return path


def opened(path: Path, *changes: str) -> Search:
    """Open a search as one that is to run."""
    return open_search(path, changes, begin=True, writable=True)


def score(config: StreamConfig) -> float:
    """Return what a later task scores when just learnt."""
    weight = getattr(config.method, "attention_weight", 0.1)
    return max(0.0, 0.9 - 0.1 * abs(math.log10(weight) - 1))


def carry_out(step: Step, store: Store) -> list[str]:
    """Commit what is missing of a step; returns the keys of the stages that were."""
    ran: list[str] = []
    for course in step.courses:
        scores: dict[str, float] = {}
        for job in course.jobs(step.tasks):
            # The first task is learnt before any of the settings matters.
            own = FIRST if job.stage.task == course.tasks[0] else score(job.config)
            scores.setdefault(job.stage.task, own)
            _commit(job, store, list(course.tasks), scores, ran)
    return ran


def _commit(
    job: Job, store: Store, tasks: Sequence[str], scores: dict[str, float], ran: list[str]
) -> None:
    def compute(workspace: Workspace) -> StageOutcome:
        content: dict[str, Any] = {"cells": []}
        if job.stage.name == "evaluate":
            known = tasks[: tasks.index(job.stage.task) + 1]
            content["cells"] = [
                {
                    "model_after": job.stage.task,
                    "task": task,
                    "metric": "exact_match",
                    "score": scores[task] - FORGET * (len(known) - 1 - index),
                }
                for index, task in enumerate(known)
            ]
        workspace.write_json("scores.json", content)
        return StageOutcome(rows=1)

    run_stage(
        store,
        job.stage,
        compute,
        provenance=PROVENANCE,
        on_event=lambda event: ran.append(event.stage.key) if event.kind == "finished" else None,
    )


Choose = Callable[[list[Step]], int]


def run_plan(
    plan: Plan, *, slots: int = 1, choose: Choose = lambda steps: 0, at_most: int = 10_000
) -> int:
    """Carry out a plan's steps; returns how many were.

    Args:
        slots: how many are on their way at a time.
        choose: which of those on their way ends next.
        at_most: after so many it is left as it is, as if its process had been killed.
    """
    plan.begin()
    running: list[Step] = []
    done = 0
    while done < at_most:
        while len(running) < slots and (step := plan.next()) is not None:
            running.append(step)
        if not running:
            assert plan.ended(), "nothing runs, and it has not ended"
            break
        step = running.pop(choose(running) % len(running))
        plan.record(step, carry_out(step, plan.ledger.store), None)
        done += 1
    return done


def table(plan: Plan) -> list[tuple[Any, ...]]:
    """Return what a search came to, without who computed what."""
    return [
        (
            entry.key, entry.state, entry.settings, entry.learnt, entry.copied,
            tuple((r.tasks, {n: v.mean for n, v in r.figures.items() if n in ("op", "bwt")}, r.stages)
                  for r in entry.results),
        )
        for kind in KINDS
        for entry in plan.ledger.of(kind)
    ]  # fmt: skip


def computed(plan: Plan) -> list[str]:
    """Return the key of a stage every time that an entry computed it."""
    return [
        key
        for entry in plan.ledger.entries.values()
        for result in entry.results
        for key in result.ran
    ]
