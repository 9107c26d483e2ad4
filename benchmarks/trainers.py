"""Hugging Face's Trainer and TRL's SFTTrainer, set up as our loop is, taking turns with it.

A turn is a call of `train`, which goes on with the model and the optimizer of the last one. The clock
runs from the start of its first epoch, when data loader and optimizer are there, to the end of its
last optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from benchmarks.train_problem import Problem, Turn
from seekr.models import byte_tokenizer, load_model
from seekr.training.flops import linear_layers


class Clock(TrainerCallback):
    """Times a Trainer's steps."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle, self._started, self.seconds = settle, 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._settle()
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == state.max_steps:
            self._settle()
            self.seconds = time.perf_counter() - self._started


class Counted:
    """A Trainer's collator, and a count of what it made."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self._collator = collator
        self.columns = self.tokens = 0

    def __call__(self, rows: list[Any]) -> Any:
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        batch = self._collator(rows)
        self.columns += batch["input_ids"].numel()
        return batch


class Theirs:
    """One of the two; the name says which, and what it does besides."""

    def __init__(self, name: str, problem: Problem, folder: Path) -> None:
        self._problem, self._sorted = problem, name.endswith("_sorted")
        make = make_trl if name.startswith("trl") else make_hf
        self._trainer = make(name, load(problem), problem, folder)
        self._rows: Any = self._trainer.train_dataset
        self._clock = Clock(problem.settle)
        self._trainer.add_callback(self._clock)
        self._trainer.remove_callback(PrinterCallback)
        self._count = Counted(self._trainer.data_collator)
        self._trainer.data_collator = self._count

    def take(self, turn: int) -> Turn:
        trainer, count, tokens, columns = (
            *(self._trainer, self._count),
            *(self._count.tokens, self._count.columns),
        )
        trainer.train_dataset = self._rows.select(self._order(turn)).flatten_indices()
        # The first turn is for comparing and not for the clock.
        trainer.args.logging_strategy = IntervalStrategy.NO if turn else IntervalStrategy.STEPS
        output = trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        return Turn(
            seconds=self._clock.seconds,
            tokens=count.tokens - tokens,
            columns=count.columns - columns,
            loss=output.training_loss,
            losses=[entry["loss"] for entry in log],
            norms=[entry["grad_norm"] for entry in log],
        )

    def _order(self, turn: int) -> list[int]:
        """Return the rows of a turn: those of our loop's steps, one step after the other."""
        problem, order = self._problem, list[int]()
        for step in range(turn * problem.steps, (turn + 1) * problem.steps):
            batch = problem.plan.step(step).task.tolist()
            if self._sorted:
                batch.sort(key=lambda row: -len(problem.rows[row].input_ids))
            order += batch
        return order


def load(problem: Problem) -> Any:
    """Load the model with float32 masters, or with adapters and frozen weights of the recipe's dtype."""
    recipe = problem.recipe
    dtype = torch.float32 if recipe.lora is None else recipe.dtype
    model: Any = load_model(problem.folder, dtype=dtype, attention="sdpa")
    if recipe.lora is None:
        return model
    targets = list(linear_layers(model.config))
    alpha = int(recipe.lora.alpha)
    return get_peft_model(
        model,
        LoraConfig(
            r=recipe.lora.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"
        ),
    )


def arguments_of(name: str, problem: Problem, folder: Path) -> dict[str, Any]:
    """Return the settings that both Trainers have, equal to ours."""
    recipe = problem.recipe
    checkpointing = name.endswith("_checkpointing")
    return {
        "output_dir": str(folder / name),
        "max_steps": problem.steps,
        "per_device_train_batch_size": problem.micro_batch_size,
        "gradient_accumulation_steps": recipe.batch_size // problem.micro_batch_size,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": recipe.beta1,
        "adam_beta2": recipe.beta2,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.dtype == torch.bfloat16,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "train_sampling_strategy": "sequential",
        "use_cpu": problem.device.type == "cpu",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": recipe.seed,
    }


def make_hf(name: str, model: Any, problem: Problem, folder: Path) -> Trainer:
    """Return the plain Trainer: labels -100 at prompts, batches padded to their longest row."""
    rows: list[dict[str, list[int]]] = []
    for row in problem.rows:
        ids: list[int] = row.input_ids.tolist()
        labels = [-100] * row.prompt_length + ids[row.prompt_length :]
        rows.append({"input_ids": ids, "labels": labels})
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments_of(name, problem, folder)),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(byte_tokenizer(), label_pad_token_id=-100),
    )


def make_trl(name: str, model: Any, problem: Problem, folder: Path) -> Trainer:
    """Return TRL's trainer with its own collator, on rows that are tokenised already."""
    rows: list[dict[str, list[int]]] = []
    for row in problem.rows:
        ids: list[int] = row.input_ids.tolist()
        mask = [int(place >= row.prompt_length) for place in range(len(ids))]
        rows.append({"input_ids": ids, "completion_mask": mask})
    settings = SFTConfig(
        **arguments_of(name, problem, folder),
        completion_only_loss=True,
        max_length=None,
        padding_free=name == "trl_padding_free",
    )
    return SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
