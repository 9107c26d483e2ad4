"""What a continual-learning method is here: its settings, what it needs, and its losses.

A method is a frozen pydantic model. It is given micro-batches of rows that already carry their
targets and returns loss terms as sums; the training loop owns everything else (batches, weights'
update, devices, files, normalisation over the global batch). So a method survives FSDP2,
accumulation and a restart without knowing of them, and fits on one screen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from seekr.addition import Addition, Seen
from seekr.answers import Answers
from seekr.batch_targets import BatchTargets
from seekr.collation import Batch
from seekr.distillation import DistillationProbe
from seekr.losses import AnswerNLL
from seekr.methods.penalty import Past, Penalty, Pull, Reader

# What a term's total is divided by: a count over the whole optimizer step, on all workers.
Unit = Literal["task_tokens", "task_rows", "replay_tokens", "replay_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the graph must provide before a method can train on a task.

    replay: rows of earlier tasks. on_policy: with the newest model's own answers. logits: the
    teacher's answer logits on them. heads: the scored and selected attention heads, and the
    teacher's rows of them. task_logits: the previous model's answer logits on the new task's own
    rows. fisher: the Fisher information of earlier tasks. adapters: those that earlier tasks have
    learnt; the stream trains adapters. start: the weights that a training starts from. weights: what
    replayed rows gave to the blocks of tasks. addition: something is trained beside a frozen model.
    reference: the base model's loss on every token of the rows that are learnt.
    all_tasks: no stream at all, but one training on every task's rows at once.
    """

    replay: bool = False
    on_policy: bool = False
    logits: bool = False
    heads: bool = False
    task_logits: bool = False
    fisher: bool = False
    adapters: bool = False
    start: bool = False
    weights: bool = False
    addition: bool = False
    reference: bool = False
    all_tasks: bool = False

    @property
    def teacher(self) -> bool:
        """Whether replayed rows have targets."""
        return self.logits or self.heads or self.weights

    @property
    def earlier(self) -> bool:
        """Whether a training with earlier tasks differs from one without."""
        return self.replay or self.task_logits or self.penalty or self.addition

    @property
    def penalty(self) -> bool:
        """Whether a loss on the weights is added, for which workers must hold them and their gradients."""
        return self.fisher or self.adapters or self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """One micro-batch after the forward pass: what losses are made from.

    `answers` gives sums of losses on logits, from whole logits or in chunks: a method cannot tell.
    `targets` is set on replay rows when the method needs a teacher, and on task rows when it needs
    the previous model's logits and there is such a model; `attention_kl[layer]` is [B, S, Q], the
    divergence of the student's attention on the heads and query rows that the targets name. `added`
    is what the addition to a frozen model knows of the batch.
    """

    answers: Answers
    batch: Batch
    targets: BatchTargets | None = None
    attention_kl: dict[int, torch.Tensor] | None = None
    added: Seen | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of the loss: `weight * total / (count of `per` in the optimizer step)`."""

    weight: float
    total: torch.Tensor
    per: Unit


Terms = dict[str, Term]


class Method(BaseModel):
    """Root of the methods: plain fine-tuning on a task's rows. `name` selects it in the YAML."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    needs: ClassVar[Needs] = Needs()
    # Fields that do not enter the loss: they bear on the stages that prepare its targets.
    preparation_fields: ClassVar[frozenset[str]] = frozenset()

    # Of replayed rows: the whole of them, or only their prompts, whose logits nobody asks for.
    replay_sees: ClassVar[Literal["rows", "prompts"]] = "rows"

    # A Literal of its own in every method; Any, because each narrows it.
    name: Any

    def task_terms(self, outputs: Outputs) -> Terms:
        """Losses on rows of the task being learnt: next-token NLL on the answers."""
        (nll_B,) = outputs.answers.sums(AnswerNLL.of(outputs.batch))
        return {"task": Term(weight=1.0, total=nll_B.sum(), per="task_tokens")}

    def replay_terms(self, outputs: Outputs) -> Terms:
        """Losses on replayed rows; only called for methods that need replay."""
        raise NotImplementedError(f"method {self.name} asks for replay and defines no replay loss")

    @property
    def addition(self) -> Addition | None:
        """What is trained instead of weights, without tasks yet; None trains the model."""
        return None

    @property
    def whole_logits(self) -> bool:
        """Whether the losses need the teacher's logits and not only its likeliest tokens."""
        return False

    def distillation(self, targets: BatchTargets) -> DistillationProbe | None:
        """Return the probe to run a replay micro-batch under; None for methods without heads."""
        return None

    def penalty(self, past: Past) -> Penalty | None:
        """Return the loss on the weights that earlier tasks ask for; None without one.

        Args:
            past: What their stages have left, empty for the first task.
        """
        return None

    def pull(self, start: Reader) -> Pull | None:
        """Return what moves the weights beside the optimizer; None without one.

        Args:
            start: Of the weights that this training started from.
        """
        return None

    def loss_settings(self) -> dict[str, Any]:
        """The fields that change what a training step with replay computes."""
        return self.model_dump(mode="json", exclude=set(self.preparation_fields))

    def first_task_settings(self) -> dict[str, Any]:
        """The same for a task with nothing to replay: plain fine-tuning, shared by all methods."""
        return {"name": "plain"}
