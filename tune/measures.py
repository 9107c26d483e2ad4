"""What a search can aim at: figures that are read off the stages of a stream, after any of its tasks.

Which figures there are depends on the stream: forward transfer takes evaluations before learning, general
ability a harness's tasks, knowledge figures two sets of probes. A search over a figure that no stage
yields is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.config import StreamConfig
from pipelines.knowledge import knowledge_figures
from pipelines.results import StreamView
from seekr.statistics import mean_and_error

REPLAY_BYTES = "replay_bytes"
Direction = Literal["max", "min"]
Read = Callable[[StreamView], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A figure of a stream.

    Attributes:
        better: whether more or less of it is wanted.
        read: takes it from a view that ends with the task just learnt; None before it can be known.
        says: what it is, in a few words with its unit.
    """

    name: str
    better: Direction
    read: Read
    says: str

    @property
    def sign(self) -> int:
        """1 if more is better, -1 if less is."""
        return 1 if self.better == "max" else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A measure over seeds: the values one by one, their mean, and the standard error from 2 on."""

    values: tuple[float, ...]
    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Value:
        """Summarise the seeds' values."""
        mean, error = mean_and_error(values)
        return cls(values=tuple(values), mean=mean, error=error)


Figures = Mapping[str, Value]


def known_measures(config: StreamConfig) -> dict[str, Measure]:
    """Return the figures that a stream's stages yield, by name."""
    found: list[Measure] = []

    def add(name: str, better: Direction, read: Read, says: str) -> None:
        found.append(Measure(name=name, better=better, read=read, says=says))

    if config.is_tested(config.tasks[0]):
        add("op", "max", lambda view: view.matrix().op(), "overall performance, mean over tasks")
        add("new_task_score", "max", _new_task_score, "mean score of each task when just learnt")
        for task in config.tasks:
            says = f"score on {task.name} by the newest model"
            add(f"score.{task.name}", "max", _task_score(task.name), says)
        if len(config.tasks) > 1 and not config.method.needs.all_tasks:
            add("bwt", "max", lambda view: view.matrix().bwt(), "backward transfer")
            add("forgetting", "min", _forgetting, "mean loss since each task's best")
            if config.evaluate.forward_transfer:
                add("fwt", "max", lambda view: view.matrix().fwt(), "forward transfer")
    if {"to_learn", "not_to_forget"} <= {probes.role for probes in config.probes}:
        for name in ("top_accuracy", "nf_accuracy", "total_knowledge", "final_total"):
            add(name, "max", _knowledge(name), f"LAMA-ckl's {name}, of probes")
    for task in config.general.tasks if config.general.after == "every" else ():
        says = f"general ability on {task}, by its own metric"
        add(f"general.{task}", "max", _general(task), says)
    add("seconds", "min", lambda view: view.seconds(), "seconds of all stages")
    add(REPLAY_BYTES, "min", lambda view: float(view.replay_bytes()), "bytes of the replay store")
    add("peak_memory_bytes", "min", _peak_memory, "largest growth of memory in a stage")
    return {measure.name: measure for measure in found}


def figures_of(measures: Mapping[str, Measure], views: Sequence[StreamView]) -> dict[str, Value]:
    """Return all figures that are known by now, over the views of one configuration's seeds."""
    found: dict[str, Value] = {}
    for name, measure in measures.items():
        values = [measure.read(view) for view in views]
        if all(value is not None for value in values):
            found[name] = Value.of([value for value in values if value is not None])
    return found


def _new_task_score(view: StreamView) -> float | None:
    matrix = view.matrix()
    scores = [matrix.score(i, i) for i in range(len(view.tasks))]
    known = [score for score in scores if score is not None]
    # Learnt at once there are no models in between: the last one's scores stand for them.
    return sum(known) / len(known) if len(known) == len(scores) else matrix.op()


def _task_score(task: str) -> Read:
    def read(view: StreamView) -> float | None:
        if task not in view.tasks:
            return None
        return view.matrix().score(len(view.tasks) - 1, view.tasks.index(task))

    return read


def _forgetting(view: StreamView) -> float | None:
    lost = list(view.matrix().forgetting().values())
    known = [value for value in lost if value is not None]
    return sum(known) / len(known) if known and len(known) == len(lost) else None


def _knowledge(name: str) -> Read:
    def read(view: StreamView) -> float | None:
        figures = knowledge_figures(view)
        return None if figures is None else float(figures[name])

    return read


def _general(task: str) -> Read:
    def read(view: StreamView) -> float | None:
        measured: Mapping[str, Any] | None = view.general().get(view.tasks[-1], {}).get(task)
        return None if measured is None else float(measured["value"])

    return read


def _peak_memory(view: StreamView) -> float | None:
    return float(max((r.record.peak_memory_bytes or 0 for r in view.stages), default=0))
