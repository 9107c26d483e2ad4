"""One optimizer step after the other: rows to passes, passes to loss terms, terms to an update.

All that a step does is a function of the recipe and the step's number: which rows, what learning rate,
which counts the loss is divided by. The loss is normalised over the tokens of the global batch, so a
restart, another number of workers, another cut into passes give the same sequence of updates. Loss
terms are formed inside the model's forward pass, where the output layer's weights are at hand however
they are sharded, and logits exist for a few positions at a time.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seekr.addition import seeing
from seekr.answers import Answers, HiddenStates, WholeLogits, has_plain_head, reading_head
from seekr.attention import probing
from seekr.batches import BatchPlan
from seekr.forward import check_packable
from seekr.methods import Method, Outputs, Terms
from seekr.methods.penalty import Penalty, Shard
from seekr.training.flops import training_flops
from seekr.training.microbatches import MicroBatch, TrainingRows
from seekr.training.past import starting_weights
from seekr.training.schedule import learning_rate
from seekr.training.settings import Execution, Recipe
from seekr.training.strategy import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """This worker among all."""

    rank: int = 0
    world_size: int = 1


class Training:
    """The steps of one training on one worker.

    Attributes:
        strategy: Holds the model and the optimizer.
        plan: Which rows each step sees.
        shape: Sequences and tokens of the pass under way, for messages; None between passes.
    """

    def __init__(
        self,
        recipe: Recipe,
        execution: Execution,
        method: Method,
        rows: TrainingRows,
        strategy: Strategy,
        device: torch.device,
        pad_id: int,
        workers: Workers,
        penalty: Penalty | None = None,
    ) -> None:
        self.strategy = strategy
        self.shape: tuple[int, int] | None = None
        self.plan = BatchPlan(
            row_ids=rows.task_ids,
            replay_ids=rows.replay_ids,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            batch_ratio=recipe.batch_ratio,
            seed=recipe.seed,
        )
        self._recipe, self._execution, self._method = recipe, execution, method
        self._rows, self._device, self._pad_id = rows, device, pad_id
        self._workers, self._penalty = workers, penalty
        self._pull = method.pull(starting_weights(strategy.source))
        self._plain_head = has_plain_head(strategy.model)
        if execution.pack_tokens is not None:
            check_packable(strategy.module)

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    def row_ids(self, index: int) -> list[str]:
        """Return the ids of a step's rows, `task/row_id`."""
        rows = self.plan.step(index)
        task_ids, replay_ids = self._rows.task_ids, self._rows.replay_ids
        task = [str(task_ids[i]) for i in rows.task]
        return task + [str(replay_ids[i]) for i in rows.replay]

    def flops(self, index: int) -> int:
        """Return the model FLOPs of a step over all workers.

        Raises:
            UnsupportedModel: the model's family is not known to `training_flops`.
        """
        rows = self.plan.step(index)
        seen = [self._rows.task[i] for i in rows.task]
        if self._method.replay_sees == "rows":
            seen += [self._rows.replay[i] for i in rows.replay]
        return training_flops(
            self.strategy.model.config,
            [len(row.input_ids) for row in seen],
            sum(len(row.input_ids) - row.prompt_length for row in seen),
            self._recipe.lora,
        )

    def step(self, index: int, wishes: Iterable[bool] = ()) -> dict[str, Any]:
        """Take one optimizer step; called on all workers.

        Args:
            index: From 0.
            wishes: What this worker wants all to know after the step; as many on every worker. Read
                when the passes are done.

        Returns:
            Loss terms over all workers, `loss`, `grad_norm` before clipping, `learning_rate`,
            `tokens` of the global batch, `seconds`, and `wishes`, each True where any worker's was.
        """
        started = time.monotonic()
        rows = self.plan.step(index)
        rank, world_size = self._workers.rank, self._workers.world_size
        # Dropout draws from the step's own seed, so a resumed training draws what it would have.
        torch.manual_seed(zlib.crc32(f"{self._recipe.seed}/{index}/{rank}".encode()))
        counts = self._rows.counts(rows)
        passes = self._rows.micro_batches(
            rows,
            rank,
            world_size,
            self._execution.micro_batch_size,
            self._execution.pack_tokens,
        )
        sums: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(passes):
            with self.strategy.micro_batch(last=number == len(passes) - 1):
                terms = self._pass(micro_batch, counts)
            for name, term in terms.items():
                value = (term.total.detach() / counts[term.per]) * float(micro_batch.counts)
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
                sums["loss"] = sums.get("loss", torch.zeros_like(value)) + term.weight * value
        self._add_penalty(sums)
        rate = learning_rate(self._recipe, index, self.num_steps)
        left = self._pull_weights(index, rate, sums)
        norm = self.strategy.step(left, self._recipe.max_grad_norm)
        entry = {"step": index, "epoch": rows.epoch, "learning_rate": rate}
        entry |= self._totals(sums, wishes) | {"grad_norm": norm, "tokens": counts["tokens"]}
        return entry | {"seconds": round(time.monotonic() - started, 6)}

    def _add_penalty(self, sums: dict[str, Tensor]) -> None:
        """Add the gradient of the loss on weights, and this worker's part of its value."""
        if self._penalty is None:
            return
        value = self._over_shards(self._penalty.add)
        sums["penalty"] = value
        sums["loss"] = sums["loss"] + self._penalty.weight * value

    def _pull_weights(self, index: int, rate: float, sums: dict[str, Tensor]) -> float:
        """Let the pull move the weights; returns the rate that is left for the optimizer's update."""
        pull = self._pull
        if pull is None:
            return rate
        value = self._over_shards(lambda shard: pull.move(shard, index, rate))
        share = pull.share(index)
        sums["penalty"] = value
        sums["loss"] = share * sums["loss"] + pull.weight(index) * value
        return share * rate

    def _over_shards(self, function: Callable[[Shard], Tensor]) -> Tensor:
        """Call a function on all that this worker holds; returns the sum that it has to report."""
        value = torch.zeros((), device=self._device)
        for shard in self.strategy.shards():
            own = function(shard)
            if shard.counts:
                value += own.to(value)
        return value

    def _pass(self, micro_batch: MicroBatch, counts: Mapping[str, int]) -> Terms:
        """Forward and backward on one micro-batch; returns its loss terms."""
        batch, targets = micro_batch.tensors(self._pad_id, self._device)
        sequences, length = batch.input_ids_BT.shape
        self.shape = sequences, length
        method, module = self._method, self.strategy.module
        probe = None if targets is None else method.distillation(targets)
        terms: Terms = {}

        def measure(answers: Answers) -> Tensor:
            outputs = Outputs(
                answers=answers,
                batch=batch,
                targets=targets,
                attention_kl=None if probe is None else probe.kl_by_layer,
                added=added,
            )
            found = method.replay_terms if micro_batch.replay else method.task_terms
            terms.update(found(outputs))
            parts = [term.weight * term.total / counts[term.per] for term in terms.values()]
            return torch.stack(parts).sum()

        prompts_alone = micro_batch.replay and method.replay_sees == "prompts"
        # The backward pass lies inside: activation checkpointing runs the forward pass again in it.
        with (
            nullcontext() if probe is None else probing(module, probe),
            seeing(module, batch) as added,
        ):
            if prompts_alone:
                # What is asked for comes from the embedding. A token goes through all layers, so
                # that every parameter has a gradient in every pass, which DDP counts on.
                logits = module(input_ids=batch.input_ids_BT[:, :1], use_cache=False).logits
                loss = measure(WholeLogits(logits)) + 0.0 * logits.sum()
            elif self._plain_head:
                with reading_head(module, lambda *head: measure(HiddenStates(*head))):
                    loss = module(**batch.inputs(), use_cache=False).logits
            else:
                loss = measure(WholeLogits(module(**batch.inputs(), use_cache=False).logits))
            # Gradients are averaged over workers; a pass that only keeps step weighs nothing.
            weight = float(self._workers.world_size) if micro_batch.counts else 0.0
            self.strategy.backward(weight * loss)
        self.shape = None
        return terms

    def _totals(self, sums: Mapping[str, Tensor], wishes: Iterable[bool]) -> dict[str, Any]:
        """Add the workers' parts of every loss term, and their wishes."""
        names = sorted(sums)
        values = torch.stack([sums[name].float() for name in names])
        values = torch.cat([values, values.new_tensor([float(wish) for wish in wishes])])
        if self._workers.world_size > 1:
            dist.all_reduce(values)
        totals = values.tolist()
        heard = [number > 0 for number in totals[len(names) :]]
        return dict(zip(names, totals, strict=False)) | {"wishes": heard}
