"""The loop of one training worker.

It takes rows that carry their targets, asks the method for loss terms, and steps the optimizer. All
it does is a function of the stage's settings and the step number: which rows, what learning rate,
which counts the loss is divided by. So a restart, another world size or another micro-batch gives the
same sequence of updates.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode

from pipelines.artifact import Artifact
from pipelines.checkpoint import PROGRESS, load_training_state, save_shards, training_state
from pipelines.config import TrainConfig
from pipelines.microbatches import MicroBatch, TrainingRows
from pipelines.monitor import Reporter
from pipelines.parallel import Strategy, create_strategy
from pipelines.pool import DTYPES, ModelSource
from pipelines.store import Store
from seekr.attention import probing
from seekr.batches import BatchPlan
from seekr.methods import Method, Outputs, Terms
from seekr.models import load_tokenizer
from seekr.prompts import pad_id_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """What a worker is given.

    Attributes:
        store, key: the stage's folder, where rank 0 exports the model to.
        settings: the stage's identity fields.
        execution: workers, micro-batch size and the like.
        data, replay, targets: artifacts by task name.
    """

    store: Store
    key: str
    settings: Mapping[str, Any]
    execution: TrainConfig
    method: Method
    model: ModelSource
    data: Mapping[str, Artifact]
    replay: Mapping[str, Artifact]
    targets: Mapping[str, Artifact]
    report: Reporter


def train_worker(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Entry point of `TorchTrainer`; returns history and exported files on rank 0."""
    return _Worker(config["spec"]).run()


def learning_rate(settings: Mapping[str, Any], step: int, num_steps: int) -> float:
    """Return the rate of step `step` (from 0): warm-up, then constant, linear or cosine to 0."""
    peak, warmup = settings["learning_rate"], settings["warmup_steps"]
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    shapes = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return peak * shapes[settings["schedule"]]


class _Worker:
    def __init__(self, spec: TrainSpec) -> None:
        context = ray.train.get_context()
        self._rank, self._world = context.get_world_rank(), context.get_world_size()
        self._spec, self._settings = spec, spec.settings
        torch.set_num_threads(spec.execution.cpus_per_worker)
        gpu = spec.execution.gpus_per_worker > 0
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        )
        self._tokenizer = load_tokenizer(
            spec.model.folder(), trust_remote_code=spec.model.trust_remote_code
        )
        self._rows = TrainingRows.load(spec.data, spec.replay, spec.targets)
        self._plan = BatchPlan(
            row_ids=self._rows.task_ids,
            replay_ids=self._rows.replay_ids,
            epochs=self._settings["epochs"],
            batch_size=self._settings["batch_size"],
            batch_ratio=self._settings.get("batch_ratio", 1.0),
            seed=self._settings["seed"],
        )
        self._strategy = self._open_model()
        self._parameters = self._strategy.parameters()
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=self._settings["learning_rate"],
            betas=(self._settings["beta1"], self._settings["beta2"]),
            weight_decay=self._settings["weight_decay"],
            fused=gpu,
        )
        self._history: list[dict[str, Any]] = []

    def _open_model(self) -> Strategy:
        dtype = DTYPES[self._settings["dtype"]]
        model = self._spec.model.load("seekr", dtype=torch.float32).to(self._device)  # pyright: ignore
        model.train()
        return create_strategy(self._spec.execution.strategy, model, dtype)

    def run(self) -> dict[str, Any] | None:
        first = self._resume()
        for step in range(first, self._plan.num_steps):
            entry = self._step(step)
            self._history.append(entry)
            self._tell(step, entry)
            if not math.isfinite(entry["loss"]) or not math.isfinite(entry["grad_norm"]):
                return self._diverged(step, entry)
            done = step + 1
            if done % self._spec.execution.checkpoint_every == 0 and done < self._plan.num_steps:
                self._save(done)
        return self._finish()

    def _step(self, step: int) -> dict[str, Any]:
        started = time.monotonic()
        rows = self._plan.step(step)
        rate = learning_rate(self._settings, step, self._plan.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        # Dropout draws from the step's own seed, so a resumed training draws what it would have.
        torch.manual_seed(zlib.crc32(f"{self._settings['seed']}/{step}/{self._rank}".encode()))
        counts = self._rows.counts(rows)
        micro_batches = self._rows.micro_batches(
            rows, self._rank, self._world, self._spec.execution.micro_batch_size
        )
        sums: dict[str, torch.Tensor] = {}
        for index, micro_batch in enumerate(micro_batches):
            with self._strategy.micro_batch(last=index == len(micro_batches) - 1):
                terms = self._pass(micro_batch, counts)
            for name, term in terms.items():
                value = (term.total / counts[term.per]).detach() * float(micro_batch.counts)
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
                sums["loss"] = sums.get("loss", torch.zeros_like(value)) + term.weight * value
        norm = self._strategy.clip(self._settings["max_grad_norm"])
        self._optimizer.step()
        entry = {"step": step, "epoch": rows.epoch, "learning_rate": rate}
        entry |= self._totals(sums) | {"grad_norm": norm, "tokens": counts["tokens"]}
        return entry | {"seconds": round(time.monotonic() - started, 6)}

    def _pass(self, micro_batch: MicroBatch, counts: Mapping[str, int]) -> Terms:
        """Forward and backward on one micro-batch; returns its loss terms."""
        batch, targets = micro_batch.tensors(pad_id_of(self._tokenizer), self._device)
        model, method = self._strategy.module, self._spec.method
        probe = None if targets is None else method.distillation(targets)
        # The backward pass lies inside: activation checkpointing runs the forward pass again in it.
        with nullcontext() if probe is None else probing(model, probe):
            outputs = Outputs(
                logits_BTV=model(
                    input_ids=batch.input_ids_BT,
                    attention_mask=batch.attention_mask_BT,
                    use_cache=False,
                ).logits,
                batch=batch,
                targets=targets,
                attention_kl=None if probe is None else probe.kl_by_layer,
            )
            terms = (
                method.replay_terms(outputs) if micro_batch.replay else method.task_terms(outputs)
            )
            parts = [term.weight * term.total / counts[term.per] for term in terms.values()]
            # Gradients are averaged over workers; a pass that only keeps step weighs nothing.
            weight = float(self._world) if micro_batch.counts else 0.0
            (weight * torch.stack(parts).sum()).backward()
        return terms

    def _totals(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Add the workers' parts of every loss term."""
        names = sorted(sums)
        values = torch.stack([sums[name].float() for name in names])
        if self._world > 1:
            dist.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    def _tell(self, step: int, entry: Mapping[str, Any]) -> None:
        if self._rank == 0:
            speed = entry["tokens"] / max(entry["seconds"], 1e-9)
            self._spec.report.post(
                steps_done=step + 1,
                steps=self._plan.num_steps,
                loss=entry["loss"],
                tokens_per_second=speed,
            )

    def _resume(self) -> int:
        """Load the newest checkpoint, if any; returns the next step."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            load_training_state(Path(folder), self._parameters, self._optimizer)
            progress = json.loads((Path(folder) / PROGRESS).read_text())
        self._history = progress["history"]
        return progress["steps_done"]

    def _save(self, steps_done: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix="seekr-checkpoint-"))
        state = training_state(self._parameters, self._optimizer)
        mine = save_shards(folder, state, self._rank)
        if self._rank == 0:
            progress = {"steps_done": steps_done, "history": self._history}
            (folder / PROGRESS).write_text(json.dumps(progress))
        ray.train.report(
            {"steps_done": steps_done},
            checkpoint=Checkpoint.from_directory(folder) if mine else None,
            checkpoint_dir_name=f"step-{steps_done:08d}",
            checkpoint_upload_mode=CheckpointUploadMode.SYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def _diverged(self, step: int, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        """Report a loss that is no number. Not an exception: trying again would end the same."""
        rows = self._plan.step(step)
        ids = [self._rows.task_ids[i] for i in rows.task]
        ids += [self._rows.replay_ids[i] for i in rows.replay]
        found = {"step": step, "loss": entry["loss"], "grad_norm": entry["grad_norm"]}
        return {"diverged": found | {"row_ids": ids}} if self._rank == 0 else None

    def _finish(self) -> dict[str, Any] | None:
        with tempfile.TemporaryDirectory(prefix="seekr-model-") as folder:
            dtype = DTYPES[self._settings["dtype"]]
            self._strategy.export(Path(folder), self._tokenizer, dtype)
            if self._rank != 0:
                return None
            outputs = self._spec.store.upload(folder, self._spec.key, "model")
        return {"outputs": outputs, "history": self._history}
