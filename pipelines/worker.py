"""One training worker under Ray Train: what stands between a stage and `seekr.training`.

It builds the model on its device, resumes where the stage was left, takes the steps, writes
checkpoints beside the training and tells what happens. Workers agree on everything that ends or
interrupts a step sequence by numbers they exchange with the loss, so none of them waits for one that
has left.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from pipelines import out_of_memory
from pipelines.artifact import Artifact
from pipelines.checkpoints import Checkpoints
from pipelines.meter import Meter
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource
from pipelines.probe import load_probes
from pipelines.profiling import StepProfiler
from pipelines.signals import Signals
from pipelines.store import Store
from pipelines.train_config import TrainConfig, training_execution
from pipelines.training_rows import load_training_rows
from pipelines.transfer import OutputFile
from seekr.methods import Method
from seekr.methods.penalty import Past
from seekr.models import load_tokenizer, model_shape
from seekr.prompts import pad_id_of
from seekr.training.build import Origin, addition_after, file_name
from seekr.training.checkpoint import check_masters, load_checkpoint
from seekr.training.export import export_adapters, export_model
from seekr.training.loop import Training, Workers
from seekr.training.microbatches import TrainingRows
from seekr.training.past import kept_numbers, learnt_adapters
from seekr.training.probing import Probing
from seekr.training.ranges import check_equal
from seekr.training.settings import Recipe
from seekr.training.strategy import create_strategy

MODEL, ADAPTER = "model", "adapter"
# Of a step, on the screen.
SHOWN = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes", "mfu")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """What a worker is given.

    Attributes:
        store, key: the stage's folder, where the model is exported to.
        task: what is learnt.
        settings: the stage's identity fields.
        execution: workers, micro-batch size and the like.
        data, replay, targets, task_targets: artifacts by task name.
        weights: numbers per token of rows, by task name. probes: sets of sentences that are scored.
        past: of what a penalty on the weights is made from: adapters by task name, or the newest
            Fisher information.
        attempt: the stage's.
    """

    store: Store
    key: str
    task: str
    settings: Mapping[str, Any]
    execution: TrainConfig
    method: Method
    model: ModelSource
    data: Mapping[str, Artifact]
    replay: Mapping[str, Artifact]
    targets: Mapping[str, Artifact]
    task_targets: Mapping[str, Artifact]
    past: Mapping[str, Artifact]
    weights: Mapping[str, Artifact]
    probes: Mapping[str, Artifact]
    report: Reporter
    attempt: int


def train_worker(spec: TrainSpec) -> dict[str, Any] | None:
    """Do a stage's training on every worker of a group; returns history and exported files on rank 0.

    Or, again on rank 0 only, why it ended early: `diverged`, `stopped` or `out_of_memory`.
    """
    found = out_of_memory.noted(spec.store, spec.key, spec.attempt)
    if found is not None:
        return {"out_of_memory": found}
    place = out_of_memory.Place()
    try:
        return _Worker(spec, place).run()
    except Exception as error:
        if out_of_memory.is_out_of_memory(error):
            rank = ray.train.get_context().get_world_rank()
            out_of_memory.note(spec.store, spec.key, spec.attempt, rank, place, error)
        raise


def _past(spec: TrainSpec) -> Past:
    if spec.method.needs.fisher:
        return {kind: kept_numbers(artifact.local(kind)) for kind, artifact in spec.past.items()}
    return {task: learnt_adapters(artifact.local(ADAPTER)) for task, artifact in spec.past.items()}


class _Worker:
    def __init__(self, spec: TrainSpec, place: out_of_memory.Place) -> None:
        context = ray.train.get_context()
        self._spec, self._place = spec, place
        self._workers = Workers(rank=context.get_world_rank(), world_size=context.get_world_size())
        torch.set_num_threads(spec.execution.cpus_per_worker)
        on_gpu = spec.execution.gpus_per_worker > 0
        device = (
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
        source = spec.model
        self._origin = Origin(folder=source.folder(), trust_remote_code=source.trust_remote_code)
        self._tokenizer = load_tokenizer(
            self._origin.folder, trust_remote_code=source.trust_remote_code
        )
        self._recipe = Recipe.of(spec.settings, spec.task, spec.method.addition)
        execution = training_execution(spec.execution)
        self._strategy = create_strategy(self._origin, self._recipe, execution, device)
        self._training = Training(
            self._recipe,
            execution,
            spec.method,
            self._rows(),
            self._strategy,
            device,
            pad_id_of(self._tokenizer),
            self._workers,
            spec.method.penalty(_past(spec)),
        )
        self._blocks = self._strategy.blocks()
        self._meter = Meter(self._training, device, self._workers.world_size)
        # One worker's trace is enough: all do the same.
        traced = spec.execution.profile_steps if self._workers.rank == 0 else None
        self._profiler = StepProfiler(spec.store, spec.key, traced)
        self._signals = Signals(spec.report, self._workers.rank)
        self._checkpoints = Checkpoints(
            spec.store,
            spec.key,
            self._workers,
            self._blocks,
            self._strategy.optimizer,
            spec.execution.keep_checkpoints,
        )
        self._history: list[dict[str, Any]] = []
        self._probing = Probing(
            {name: load_probes(artifact) for name, artifact in spec.probes.items()},
            self._strategy,
            self._workers,
            batch_size=execution.micro_batch_size,
            pad_id=pad_id_of(self._tokenizer),
            device=device,
        )

    def _rows(self) -> TrainingRows:
        spec, addition = self._spec, self._recipe.addition
        kind = "reference_nll" if spec.method.needs.reference else "weights"
        rows = load_training_rows(
            spec.data, spec.replay, spec.targets, spec.task_targets, spec.weights, kind
        )
        if addition is None:
            return rows
        addition = addition_after(self._origin, addition, spec.task)
        vocab_size = model_shape(self._strategy.model.config).vocab_size
        return replace(rows, task=addition.before(rows.task, vocab_size))

    def run(self) -> dict[str, Any] | None:
        """Take the steps that are left, then export; nothing of it goes on afterwards."""
        try:
            return self._run()
        finally:
            self._signals.close()

    def _run(self) -> dict[str, Any] | None:
        first = self._resume()
        num_steps, every = self._training.num_steps, self._spec.execution.checkpoint_every
        for step in range(first, num_steps):
            self._profiler.before(step)
            before = self._probing.scores("probes_before") if step == 0 else {}
            entry = self._step(step)
            heard = self._signals.heard(entry.pop("wishes"))
            entry = self._meter.measured(step, entry)
            self._profiler.after(step, num_steps)
            entry |= before
            if self._training.plan.ends_epoch(step):
                entry |= self._probing.scores("probes")
            self._history.append(entry)
            self._tell(step, entry)
            if not math.isfinite(entry["loss"]) or not math.isfinite(entry["grad_norm"]):
                return self._end({"diverged": self._where(step, entry)})
            done = step + 1
            if done == num_steps:
                break
            if heard.stop:
                self._save(done, wait=True)
                return self._end({"stopped": done, "steps": num_steps})
            if heard.preempted:
                self._save(done, wait=True)
            elif done % every == 0:
                self._save(done, wait=False)
        return self._finish()

    def _step(self, step: int) -> dict[str, Any]:
        place = self._place
        place.doing, place.step, place.steps = "taking step", step, self._training.num_steps
        place.checkpoint = self._checkpoints.kept
        try:
            return self._training.step(step, self._signals.wishes())
        except Exception:
            place.shape = self._training.shape
            raise

    def _tell(self, step: int, entry: Mapping[str, Any]) -> None:
        if self._workers.rank == 0:
            numbers = {name: entry[name] for name in SHOWN if name in entry}
            steps = self._training.num_steps
            self._spec.report.post(steps_done=step + 1, steps=steps, **numbers)
            self._spec.report.add_step(entry)

    def _resume(self) -> int:
        """Load the newest checkpoint, if any; returns the next step.

        Either way the optimizer's master weights are compared with the files, bit for bit.
        """
        with self._checkpoints.newest() as found:
            if found is None:
                for block in self._blocks:
                    check_equal(
                        self._strategy.source,
                        file_name(block.name),
                        block.start,
                        block.part(block.master),
                        "master weights",
                    )
                return 0
            load_checkpoint(found.folder, self._blocks, self._strategy.optimizer)
            self._strategy.refresh()
            check_masters(found.folder, self._blocks)
            self._history = found.history
            return found.steps_done

    def _save(self, steps_done: int, wait: bool) -> None:
        self._place.doing, self._place.step = "copying a checkpoint", None
        self._checkpoints.save(steps_done, self._history, wait=wait)

    def _where(self, step: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Say where a loss became no number. Not an exception: trying again would end the same."""
        found = {"step": step, "loss": entry["loss"], "grad_norm": entry["grad_norm"]}
        return found | {
            "row_ids": self._training.row_ids(step),
            "checkpoint": self._checkpoints.handed,
        }

    def _end(self, result: dict[str, Any]) -> dict[str, Any] | None:
        self._checkpoints.settle()
        return result if self._workers.rank == 0 else None

    def _finish(self) -> dict[str, Any] | None:
        # Before workers meet again below: the stage removes checkpoints when the first one is done.
        self._checkpoints.settle()
        self._place.doing, self._place.step = "writing the model", None
        with tempfile.TemporaryDirectory(prefix="seekr-model-") as path:
            folder = Path(path)
            (folder / MODEL).mkdir()
            export_model(
                self._strategy,
                self._recipe,
                self._origin,
                self._tokenizer,
                folder / MODEL,
                self._workers,
            )
            if (lora := self._recipe.lora) is not None:
                export_adapters(
                    self._strategy,
                    lora,
                    str(self._origin.folder),
                    folder / ADAPTER,
                    self._workers.rank,
                )
            outputs = self._spec.store.upload(folder, self._spec.key, "")
        outputs = self._gathered(outputs)
        return self._end({"outputs": outputs, "history": self._history})

    def _gathered(self, outputs: list[OutputFile]) -> list[OutputFile]:
        """Return what all workers have written."""
        if self._workers.world_size == 1:
            return outputs
        parts: list[Any] = [None] * self._workers.world_size
        dist.all_gather_object(parts, outputs)
        return [output for part in parts for output in part]
