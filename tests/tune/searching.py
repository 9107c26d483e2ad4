"""Searches for tests: a small stream and a YAML over it, and steps that are carried out without computing.

`carry_out` commits what is missing of a step's stages, in their order, with what a formula says of the
settings in the place of a training: a task scores the better the nearer the attention weight is to 10, and
half a point less with every later task. So what must come out of a search is known, and it can be killed,
reordered and repeated many times in a minute. Records are written as they are, without lease and fsync,
which only matter where several processes and power cuts do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pipelines.artifact import RECORD, StageRecord, StageRef
from pipelines.config import StreamConfig
from pipelines.stage import Stage
from pipelines.store import Store
from pipelines.transfer import OutputFile
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
START = "2026-11-20T09:00:00+00:00"


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
            if not is_finished(store, job.stage):
                _commit(job.stage, store, _content(job.stage, list(course.tasks), scores))
                ran.append(job.stage.key)
    return ran


def is_finished(store: Store, stage: Stage) -> bool:
    """Whether a stage has its record."""
    return store.stat(f"{stage.key}/{RECORD}") is not None


def _content(stage: Stage, tasks: Sequence[str], scores: dict[str, float]) -> dict[str, bytes]:
    """Return the files of a stage that is judged by, by name."""
    if stage.name != "evaluate":
        return {}
    known = tasks[: tasks.index(stage.task) + 1]
    cells = [
        {
            "model_after": stage.task,
            "task": task,
            "metric": "exact_match",
            "score": scores[task] - FORGET * (len(known) - 1 - index),
        }
        for index, task in enumerate(known)
    ]
    return {"scores.json": json.dumps({"cells": cells}).encode()}


def _commit(stage: Stage, store: Store, files: dict[str, bytes]) -> None:
    missing = [str(one) for one in stage.inputs.values() if not is_finished(store, one)]
    assert not missing, f"{stage} is to be computed before {missing}"
    outputs = [
        OutputFile(path=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    ]
    record = StageRecord(
        stage=stage.name, version=stage.version, task=stage.task, fingerprint=stage.fingerprint,
        payload=stage.payload,
        inputs={name: StageRef(stage=one.name, task=one.task, fingerprint=one.fingerprint)
                for name, one in stage.inputs.items()},
        outputs=tuple(outputs), rows=1, stats={}, seeds={}, started_at=START, finished_at=START,
        seconds=1.0, peak_memory_bytes=None, attempts=1, host="node-1", user="ada",
        argv=("seekr", "tune"), git_commit=None, versions={},
    )  # fmt: skip
    for name, content in files.items():
        store.write_bytes(f"{stage.key}/{name}", content, durable=False)
    text = json.dumps(asdict(record)).encode()
    store.write_bytes(f"{stage.key}/{RECORD}", text, durable=False)


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
