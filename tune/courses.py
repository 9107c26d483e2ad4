"""Courses: a stream under one trial's settings and one seed, opened and cut into its tasks.

Settings may change from one task to the next, as they do when a member of a population goes on from
another's model. Everything is opened before it runs, so settings that cannot be are known without compute;
what two courses have in common has the same fingerprints, so the store holds it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.artifact import Artifact
from pipelines.config import StreamConfig
from pipelines.data_config import TaskConfig
from pipelines.graph import graph_by_task
from pipelines.job import Job
from pipelines.results import StageResult, StreamView
from pipelines.stage import Stage, find
from pipelines.store import Store
from pipelines.stream import Stream, open_stream
from seekr.errors import ConfigError
from tune.measures import REPLAY_BYTES, Measure, known_measures
from tune.search_config import SearchConfig
from tune.spaces import Settings

# Stages that figures are read off.
_MEASURED = ("train", "evaluate", "general", "probe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One seed's way through the tasks.

    Attributes:
        configs: the stream's configuration while each task is learnt.
        stages: what each task makes necessary; one group for all tasks where they are learnt at once.
        figures_only: leave out what the newest task's end prepares for a next one (scores of heads,
            targets), until there is one.
    """

    configs: tuple[StreamConfig, ...]
    stages: tuple[tuple[Stage, ...], ...]
    figures_only: bool

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of its tasks in order."""
        return tuple(task.name for task in self.configs[0].tasks)

    def until(self, learnt: int) -> tuple[Stage, ...]:
        """Return the stages of the first tasks, each after its inputs."""
        return tuple(job.stage for job in self.jobs(learnt))

    def jobs(self, learnt: int) -> list[Job]:
        """Return what has to be done for the first tasks, each after its inputs."""
        pairs = zip(self.configs, self.stages[:learnt], strict=False)
        jobs = [Job(stage=stage, config=config) for config, group in pairs for stage in group]
        if not self.figures_only:
            return jobs
        needed = set[str]()
        for job in reversed(jobs):
            if job.stage.name in _MEASURED or job.stage.fingerprint in needed:
                needed |= {
                    job.stage.fingerprint,
                    *(s.fingerprint for s in job.stage.inputs.values()),
                }
        return [job for job in jobs if job.stage.fingerprint in needed]

    def view(self, store: Store, learnt: int) -> StreamView:
        """Return what the stages of the first tasks have produced, as if the stream ended with them."""
        found = [(stage, find(store, stage)) for stage in self.until(learnt)]
        results = [
            StageResult(artifact=Artifact(store=store, record=record))
            for _, record in found
            if record is not None
        ]
        # Learnt at once, all tasks are behind the one group of stages.
        last = len(self.tasks) if len(self.stages) == 1 else learnt
        config = self.configs[learnt - 1]
        cut = config.model_copy(update={"tasks": config.tasks[:last]})
        return StreamView.of_config(cut, results)


@dataclass(frozen=True, slots=True, kw_only=True)
class Courses:
    """Opens courses of a search's stream.

    Attributes:
        base: the stream with the search's changes, opened.
    """

    search: SearchConfig
    base: Stream
    _opened: dict[str, Stream] = field(default_factory=lambda: dict[str, Stream](), repr=False)

    @classmethod
    def of(cls, search: SearchConfig, *, writable: bool = False) -> Courses:
        """Open the stream of a search.

        Raises:
            ConfigError, DataError: what is wrong with it, or with the search's changes to it.
        """
        base = open_stream(search.stream, (), search.changes, writable=writable)
        return cls(search=search, base=base)

    @property
    def path(self) -> Path:
        """The stream's YAML file."""
        return self.search.stream

    @property
    def steps(self) -> int:
        """After how many tasks there is something to look at; 1 where all are learnt at once."""
        config = self.base.config
        return 1 if config.method.needs.all_tasks else len(config.tasks)

    @property
    def measures(self) -> dict[str, Measure]:
        """The figures that are taken after every task, by name."""
        known = known_measures(self.base.config)
        if self._figures_only:
            del known[REPLAY_BYTES]
        return known

    @property
    def _figures_only(self) -> bool:
        return REPLAY_BYTES not in self.search.asked

    def open(
        self,
        settings: Sequence[Settings],
        seed: int,
        order: Sequence[str] | None = None,
    ) -> Course:
        """Open one.

        Args:
            settings: what is laid over the stream while each task is learnt, one per task.
            order: the tasks' names in the order in which they are learnt; the stream's unless given.

        Raises:
            ConfigError, DataError: the stream cannot be run with these settings.
        """
        streams: list[Stream] = []
        for own in settings:
            name = repr((own, seed, order))
            if name not in self._opened:
                self._opened[name] = self._open(own, seed, order)
            streams.append(self._opened[name])
        configs = tuple(stream.config for stream in streams)
        return Course(
            configs=configs,
            stages=graph_by_task(configs, streams[-1].facts),
            figures_only=self._figures_only,
        )

    def _open(self, settings: Settings, seed: int, order: Sequence[str] | None) -> Stream:
        changes: dict[str, Any] = {**self.search.changes, **settings, "seed": seed}
        if order is not None:
            changes["tasks"] = [
                task.model_dump(mode="json", exclude_none=True) for task in self._ordered(order)
            ]
        return open_stream(self.path, (), changes)

    def _ordered(self, order: Sequence[str]) -> list[TaskConfig]:
        tasks = {task.name: task for task in self.base.config.tasks}
        if sorted(order) != sorted(tasks):
            raise ConfigError(
                f"confirm.order: {', '.join(order)} is not an order of the stream's tasks; these are "
                f"{', '.join(tasks)}"
            )
        return [tasks[name] for name in order]
