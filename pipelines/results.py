"""What a stream has produced, read from its records: the one input of the report and of lineage.

A `StreamView` is a list of stage results in graph order plus the stream's name and configuration.
All it shows (accuracy cells, head selections, loss histories, sizes, digests) is read on demand
from the files that the records name, so a view of a finished stream, of a stream that is half done
and of one that was deleted down to its records are the same object with more or fewer parts.
Nothing is written here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.parquet as pq

from pipelines.artifact import Artifact, StageRecord
from pipelines.decisions import Decision, Decisions
from pipelines.labels import ALL_TASKS, BASE, about, borrowed, is_before, learnt
from seekr.metrics import AccuracyMatrix

if TYPE_CHECKING:
    from pipelines.arrivals import Arrival
    from pipelines.config import StreamConfig

PREDICTIONS = "predictions.parquet"
GENERAL = "general.json"
EXAMPLES = "examples.json"
State = Literal["ran", "reused"]
_UNDECIDED = Decisions()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One committed stage and how this run got it."""

    artifact: Artifact
    state: State = "reused"

    @property
    def record(self) -> StageRecord:
        return self.artifact.record

    @property
    def stage(self) -> str:
        return self.record.stage

    @property
    def task(self) -> str:
        return self.record.task

    @property
    def fingerprint(self) -> str:
        return self.record.fingerprint

    @property
    def num_bytes(self) -> int:
        return sum(output.size for output in self.record.outputs)

    @property
    def learnt(self) -> str:
        """The task whose arrival made this stage necessary, for sums per task."""
        return learnt(self.task)

    def read_json(self, path: str) -> Any:
        """The content of a JSON output, or None when the record does not list the file."""
        if not any(output.path == path for output in self.record.outputs):
            return None
        return self.artifact.read_json(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The heads chosen after a task, and the importance [L][H] they were chosen by."""

    task: str
    importance: Sequence[Sequence[float]]
    heads: frozenset[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The per-step log of one train stage, in step order."""

    task: str
    steps: Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySize:
    """What a task costs in the replay store; `stale_bytes`: targets that re-teaching replaced."""

    task: str
    rows: int | None
    row_bytes: int
    target_bytes: int
    stale_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamView:
    """A stream's stages in graph order and its tasks; `config` is the YAML as a mapping.

    `arrivals` are what came through its inbox, `decisions` those about its champion, and `decided` is what
    the gate said when the stages were run just now.
    """

    name: str
    method: str
    model: str
    tasks: tuple[str, ...]
    config: Mapping[str, Any]
    stages: tuple[StageResult, ...]
    arrivals: tuple[Arrival, ...] = ()
    decisions: Decisions = _UNDECIDED
    decided: Decision | None = None

    @classmethod
    def of_config(
        cls,
        config: StreamConfig,
        stages: Sequence[StageResult],
        arrivals: Sequence[Arrival] = (),
        decisions: Decisions = _UNDECIDED,
    ) -> StreamView:
        """The view of a stream that is described by its configuration."""
        return cls(
            name=config.name,
            method=_method_name(config),
            model=config.model.path.name,
            tasks=tuple(task.name for task in config.tasks),
            config=config.model_dump(mode="json"),
            stages=tuple(stages),
            arrivals=tuple(arrivals),
            decisions=decisions,
        )

    def of(self, stage: str) -> Iterator[StageResult]:
        """The results of one kind of stage, in graph order."""
        return (result for result in self.stages if result.stage == stage)

    def measured(self) -> dict[tuple[str, str], tuple[float, StageResult]]:
        """Cells of R with the stage that measured them; tasks the stream lacks are left out.

        A model trained on all tasks at once counts as the one after the last task. When a cell was
        measured by several metrics, the first one listed is the task's own.
        """
        found: dict[tuple[str, str], tuple[float, StageResult]] = {}
        for result, cell in self._cells():
            after = self.tasks[-1] if cell["model_after"] == ALL_TASKS else cell["model_after"]
            if (after == BASE or after in self.tasks) and cell["task"] in self.tasks:
                found.setdefault((after, cell["task"]), (float(cell["score"]), result))
        return found

    def matrix(self) -> AccuracyMatrix:
        """R[i][j] from every evaluate stage."""
        cells = {where: score for where, (score, _) in self.measured().items()}
        return AccuracyMatrix(tasks=self.tasks, cells=cells)

    def learnt(self, matrix: AccuracyMatrix) -> int | None:
        """Index (from 0) of the last task that was evaluated by its own model, or None."""
        rows = [i for i, task in enumerate(self.tasks) if (task, task) in matrix.cells]
        return max(rows, default=None)

    def final_scores(self) -> dict[str, dict[str, float]]:
        """Scores of the newest model's test rows by task and row id; empty before any evaluation."""
        results = [result for result in self.of("evaluate") if not is_before(result.task)]
        if not results or not any(o.path == PREDICTIONS for o in results[-1].record.outputs):
            return {}
        artifact = results[-1].artifact
        table = pq.read_table(
            artifact.full_path(PREDICTIONS),
            filesystem=artifact.store.filesystem,
            columns=["task", "row_id", "score"],
        )
        found: dict[str, dict[str, float]] = {}
        columns = (table[name].to_pylist() for name in ("task", "row_id", "score"))
        for task, row_id, score in zip(*columns, strict=True):
            found.setdefault(task, {})[row_id] = score
        return found

    def general(self) -> dict[str, dict[str, Mapping[str, Any]]]:
        """General ability by model ("base", or the task it has learnt) and the harness's task."""
        return {
            result.task: content["tasks"]
            for result in self.of("general")
            if (content := result.read_json(GENERAL))
        }

    def metrics_of_tasks(self) -> dict[str, str]:
        """The name of the metric each task is scored by."""
        named: dict[str, str] = {}
        for _, cell in self._cells():
            named.setdefault(cell["task"], cell["metric"])
        return named

    def selection_accuracy(self) -> dict[tuple[str, str], float]:
        """Share of rows that give most to their own task's block, by (model after, task)."""
        return {
            (cell["model_after"], cell["task"]): float(cell["selection_accuracy"])
            for _, cell in self._cells()
            if "selection_accuracy" in cell and cell["task"] in self.tasks
        }

    def selections(self) -> list[Selection]:
        """One per select stage, in task order; empty for methods without heads."""
        return [
            Selection(
                task=result.task, importance=_floats(content["importance"]), heads=_pairs(content)
            )
            for result in self.of("select")
            if (content := result.read_json("heads.json")) is not None
        ]

    def histories(self) -> list[History]:
        """One per train stage that logged any step."""
        return [
            History(task=result.task, steps=content["steps"])
            for result in self.of("train")
            if (content := result.read_json("history.json")) and content["steps"]
        ]

    def replay(self) -> list[ReplaySize]:
        """Replay store per task: its rows, sampled or generated, and its last teach stage's targets."""
        sizes = []
        for sample in (*self.of("sample"), *self.of("generate")):
            taught = [r for r in self.of("teach") if about(r.task) == sample.task]
            bytes_each = [result.num_bytes for result in taught]
            sizes.append(
                ReplaySize(
                    task=sample.task,
                    rows=sample.record.rows,
                    row_bytes=sample.num_bytes,
                    target_bytes=bytes_each[-1] if bytes_each else 0,
                    stale_bytes=sum(bytes_each[:-1]),
                )
            )
        return sizes

    def replay_bytes(self) -> int:
        """Bytes that the next training would read from the replay store."""
        return sum(size.row_bytes + size.target_bytes for size in self.replay())

    def borrowed_bytes(self) -> int:
        """Largest size of what one task's inputs gave for replay, with targets; used once, not kept."""
        sizes: dict[str, int] = {}
        for result in self.of("borrow"):
            sizes[result.task] = sizes.get(result.task, 0) + result.num_bytes
        for result in self.of("teach"):
            if result.task == borrowed(result.learnt):
                sizes[result.learnt] = sizes.get(result.learnt, 0) + result.num_bytes
        return max(sizes.values(), default=0)

    def sources(self) -> list[tuple[str, str, str]]:
        """(task, source name, content digest) of everything that entered from outside."""
        return [
            (result.task, name, digest)
            for result in self.stages
            for name, digest in result.record.payload["sources"].items()
        ]

    def versions(self) -> dict[str, list[str]]:
        """Library -> the distinct versions the stages ran with; more than one is worth a look."""
        found: dict[str, dict[str, None]] = {}
        for result in self.stages:
            for library, version in result.record.versions.items():
                found.setdefault(library, {})[str(version)] = None
        return {library: list(found[library]) for library in sorted(found)}

    def seconds(self, *, ran_only: bool = False) -> float:
        """Wall seconds of all stages, wherever and whenever they ran, or of this run's alone."""
        return sum(r.record.seconds for r in self.stages if r.state == "ran" or not ran_only)

    def _cells(self) -> Iterator[tuple[StageResult, Mapping[str, Any]]]:
        for result in self.of("evaluate"):
            for cell in (result.read_json("scores.json") or {}).get("cells", ()):
                yield result, cell


def _method_name(config: StreamConfig) -> str:
    """Return what people call it: the method, and whatever else decides what a token counts."""
    weights = config.token_weights
    if weights is None:
        return config.method.name
    by = {"train_attention": "taalm", "focus": "oracle"}[weights.by]
    return by if config.method.name == "seqft" else f"{config.method.name} + {by}"


def _floats(rows: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[math.nan if value is None else float(value) for value in row] for row in rows]


def _pairs(content: Mapping[str, Any]) -> frozenset[tuple[int, int]]:
    return frozenset((int(layer), int(head)) for layer, head in content["heads"])
