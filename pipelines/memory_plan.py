"""Whether a stream's trainings will fit their devices, said before anything starts, and what would.

The estimate itself is `seekr.training.memory`. Here the stream's settings become the largest passes that
a worker will see, the device's size is found, and where they do not fit the same estimate is asked
about other settings, in the order of what they cost in speed. Nothing is measured and no weight is
read; rows that are ingested are looked at, for their longest one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil
import pyarrow.compute as pc

from pipelines.artifact import Artifact
from pipelines.config import StreamConfig
from pipelines.data_config import TaskConfig
from pipelines.memory_families import families
from pipelines.rowsets import TRAIN, kind_folder, load_table
from pipelines.section import identity
from pipelines.stream import Stream, records_of
from pipelines.train_config import LoraConfig, TrainConfig, training_execution
from seekr.methods.seekr import SEEKR
from seekr.training.activations import Distillation, Pass
from seekr.training.build import Origin
from seekr.training.held import Device
from seekr.training.memory import GIB, MIB, PROCESS_BYTES, MemoryEstimate, Work, estimate
from seekr.training.model_sizes import ModelSizes, read_sizes
from seekr.training.settings import Recipe

Verdict = Literal["fits", "close", "does not fit", "unknown"]
# How far the estimate may be off; `benchmarks.memory` holds it on the CPU.
TOLERANCE = 0.15
# What Ray and pyarrow add to a training worker's process: measured on 2026-11-21 with Ray 2.60.
_RAY_BYTES = 120 * MIB
# A local file of more than this is not read for the sake of its longest row.
_MOST_ROWS = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The longest row and the longest answer of a stream's trainings, in tokens.

    `known` tells ingested rows from what data.max_length allows.
    """

    tokens: int
    answers: int
    known: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Settings under which the training would fit. `changes` are fields of the YAML."""

    changes: dict[str, Any]
    peak: int
    same_result: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What one training worker needs, and whether it is there.

    Attributes:
        memory: bytes of the device, None where it is not known.
        alternatives: cheapest first; none where it fits.
    """

    train: TrainConfig
    dtype: str
    device: Device
    rows: Rows
    work: Work
    estimate: MemoryEstimate
    memory: int | None
    alternatives: tuple[Alternative, ...]

    @property
    def verdict(self) -> Verdict:
        return _verdict(self.estimate.peak, self.memory)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; memory in bytes."""
        return {
            "workers": self.train.fewest_workers,
            "device": self.device,
            "longest_row": asdict(self.rows),
            "parts": asdict(self.estimate.parts),
            "peak_bytes": self.estimate.peak,
            "peak_phase": self.estimate.phase,
            "host_bytes": self.estimate.host,
            "device_memory_bytes": self.memory,
            "verdict": self.verdict,
            "would_fit": [asdict(item) for item in self.alternatives],
        }


def plan_memory(stream: Stream) -> MemoryPlan:
    """Estimate the largest training of a stream, and search for what fits if it does not.

    Raises:
        ConfigError: the model cannot be built from its configuration.
    """
    config, train = stream.config, stream.config.train
    device: Device = "cuda" if train.gpus_per_worker > 0 else "cpu"
    rows, memory = _longest(stream), device_memory(train)
    ask = _Asked(stream, rows, device)
    found = ask.of(train)
    fits = _verdict(found.peak, memory) in ("fits", "unknown")
    return MemoryPlan(
        train=train,
        dtype=config.model.dtype,
        device=device,
        rows=rows,
        work=work_of(config, train, rows, stream.facts.shape.num_layers),
        estimate=found,
        memory=memory,
        alternatives=() if fits or memory is None else tuple(_search(ask, train, device, memory)),
    )


def device_memory(train: TrainConfig) -> int | None:
    """Return the bytes that one worker may take, None where nobody says and no device is here.

    On the CPU that is a share of this machine among the workers that begin on it.
    """
    share = min(1.0, train.gpus_per_worker) if train.gpus_per_worker else 1.0
    if train.device_memory is not None:
        return int(train.device_memory * share * GIB)
    if not train.gpus_per_worker:
        return psutil.virtual_memory().total // train.fewest_workers
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory * share)


def work_of(config: StreamConfig, train: TrainConfig, rows: Rows, layers: int) -> Work:
    """Return the largest passes of a worker: the longest row in every place.

    Elastic training is looked at with its fewest workers, which have most to hold.
    """
    workers, size = train.fewest_workers, train.micro_batch_size
    share = math.ceil(train.batch_size / workers)
    replay = config.method.needs.replay and len(config.tasks) > 1
    replayed = math.ceil(math.ceil(config.replay.batch_ratio * train.batch_size) / workers)
    later = len(config.tasks) > 1
    if train.pack_tokens is None:
        own = config.method.needs.task_logits and later
        targets = Distillation(logits_kept=config.teach.logits_kept) if own else None
        task = _padded(min(size, share), rows, targets)
        passes = math.ceil(share / size)
    else:
        tokens = max(train.pack_tokens, rows.tokens)
        task = Pass(rows=1, tokens=tokens, answers=tokens, masked=share > 1)
        passes = share  # as many at most: a row each
    return Work(
        task=task,
        replay=_padded(min(size, replayed), rows, _targets(config, layers)) if replay else None,
        task_passes=passes,
        replay_passes=math.ceil(replayed / size) if replay else 0,
        penalty=_penalty(config) if later or config.method.needs.start else 0,
    )


def _padded(count: int, rows: Rows, distillation: Distillation | None = None) -> Pass:
    return Pass(
        rows=count,
        tokens=rows.tokens,
        answers=count * rows.answers,
        masked=count > 1,
        distillation=distillation,
    )


def _targets(config: StreamConfig, layers: int) -> Distillation | None:
    method, teach = config.method, config.teach
    if not method.needs.teacher:
        return None
    if not isinstance(method, SEEKR):
        return Distillation(logits_kept=teach.logits_kept)
    return Distillation(
        layers=min(layers, method.layer_budget),
        heads=method.head_budget,
        queries=method.query_budget or max(task.max_length for task in _options(config)),
        attention_kept=teach.attention_kept,
        logits_kept=teach.logits_kept,
    )


def _penalty(config: StreamConfig) -> float:
    """Return the numbers that a penalty keeps per trained number."""
    needs = config.method.needs
    if needs.fisher:
        return 2  # precision and anchor of all earlier tasks together
    if needs.start:
        return 1
    # A of every earlier task's adapters, which are A and B: about half of their numbers.
    return 0.5 * (len(config.tasks) - 1) if needs.adapters else 0


def _options(config: StreamConfig) -> Iterator[Any]:
    return (config.options(task) for task in config.tasks)


def _longest(stream: Stream) -> Rows:
    """Return the longest of all tasks' rows, as ingested where all of them are and lie here."""
    known = [_ingested(stream, task) for task in stream.config.tasks]
    virtual = stream.config.virtual_tokens
    if all(known):
        tokens, answers = (max(pair[index] for pair in known if pair) for index in (0, 1))
        return Rows(tokens=tokens + virtual, answers=answers, known=True)
    options = list(_options(stream.config))
    tokens = max(option.max_length for option in options)
    answers = max(min(option.max_answer_length, option.max_length) for option in options)
    return Rows(tokens=tokens + virtual, answers=answers, known=False)


def _ingested(stream: Stream, task: TaskConfig) -> tuple[int, int] | None:
    """Return (longest row, longest answer) of a task's training rows, None where not to be had."""
    records = {s.task: r for s, r in records_of(stream).items() if s.name == "ingest"}
    record = records.get(task.name)
    if record is None or not stream.store.is_local or (record.rows or 0) > _MOST_ROWS:
        return None
    artifact = Artifact(store=stream.store, record=record)
    table = load_table(artifact, kind_folder(TRAIN))
    lengths = pc.list_value_length(table["input_ids"])  # pyright: ignore[reportAttributeAccessIssue]
    answers = pc.subtract(lengths, table["prompt_length"])  # pyright: ignore[reportAttributeAccessIssue]
    return max(lengths.to_pylist()), max(answers.to_pylist())


class _Asked:
    """The estimate as a function of the `train` section."""

    def __init__(self, stream: Stream, rows: Rows, device: Device) -> None:
        self._config, self._rows = stream.config, rows
        self._device: Device = device
        self._layers = stream.facts.shape.num_layers
        self._known: dict[str, ModelSizes] = {}
        self.addition = self._config.method.needs.addition

    def _sizes(self, train: TrainConfig) -> ModelSizes:
        """Build the empty model once with each kind of adapters."""
        key = repr(train.lora)
        if key not in self._known:
            model = self._config.model
            origin = Origin(folder=model.path, trust_remote_code=model.trust_remote_code)
            self._known[key] = read_sizes(origin, self._recipe(train))
        return self._known[key]

    def _recipe(self, train: TrainConfig) -> Recipe:
        settings = identity(train) | {"dtype": self._config.model.dtype}
        addition = self._config.method.addition
        for task in self._config.tasks[:-1]:
            addition = addition and addition.with_task(task.name)
        return Recipe.of(settings, self._config.tasks[-1].name, addition)

    def of(self, train: TrainConfig) -> MemoryEstimate:
        """Return what one of its workers needs."""
        return estimate(
            self._sizes(train),
            self._recipe(train),
            training_execution(train),
            work_of(self._config, train, self._rows, self._layers),
            workers=train.fewest_workers,
            device=self._device,
            process=PROCESS_BYTES + _RAY_BYTES,
        )


def _search(ask: _Asked, train: TrainConfig, device: Device, memory: int) -> Iterator[Alternative]:
    """Yield of each kind of change the mildest one that fits with the estimate's error."""
    for family in families(train, device, ask.addition):
        for changes in family:
            changed = train.model_copy(update=changes)
            share = memory
            if train.device_memory is None and device == "cpu":
                share = memory * train.fewest_workers // changed.fewest_workers
            peak = ask.of(changed).peak
            if _verdict(peak, share) == "fits":
                yield _alternative(changes, peak)
                break


def _alternative(changes: Mapping[str, Any], peak: int) -> Alternative:
    shown = {
        f"train.{name}": {"rank": value.rank, "alpha": value.alpha}
        if isinstance(value, LoraConfig)
        else value
        for name, value in changes.items()
    }
    return Alternative(
        changes=shown, peak=peak, same_result=not {"lora", "optimizer"} & set(changes)
    )


def _verdict(peak: int, memory: int | None) -> Verdict:
    if memory is None:
        return "unknown"
    if peak > memory:
        return "does not fit"
    return "fits" if peak * (1 + TOLERANCE) <= memory else "close"
