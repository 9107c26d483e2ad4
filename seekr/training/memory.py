"""The memory that a training will need, known before it is spent: per worker, in bytes, term by term.

Nothing is measured and no weight is read. `held` says what a strategy keeps of weights, gradients and
optimizer, `activations` what a pass adds, and here both are followed through a step: the losses' backward
where activations are all there, the last layer and the first one, the embedding, the update, the export.
The largest of these phases is the peak. A checkpoint in the making is a copy in host memory that lives
beside the steps that follow, so on the CPU it counts in all of them.

Terms are sums of tensor sizes with a reason each. Two constants are not: what a process takes before it
has a tensor, and what CUDA does. They say where they come from. `benchmarks.memory` compares the
estimate with what processes on the CPU take.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from seekr.training.activations import (
    Numbers,
    Pass,
    head_backward,
    kept_by_layer,
    kept_by_model,
    layer_backward,
    teacher_rows,
)
from seekr.training.export import SHARD_BYTES
from seekr.training.held import Device, Held, held_by
from seekr.training.model_sizes import ModelSizes
from seekr.training.settings import Execution, Recipe

MIB, GIB = 1 << 20, 1 << 30
# Resident after importing torch, transformers, peft and this package, and one small step: measured on
# 2026-11-21 with torch 2.13 for CPU and transformers 5.23 (537 MiB). DeepSpeed's import adds 113.
PROCESS_BYTES = 537 * MIB
DEEPSPEED_BYTES = 113 * MIB
# Not measured here: the CUDA context with its kernels and cuBLAS workspaces, and NCCL's buffers once
# there is another worker. Round figures, to be corrected where a GPU is at hand.
CUDA_BYTES = 1 * GIB
NCCL_BYTES = 1 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a worker computes in an optimizer step.

    Attributes:
        task, replay: the largest pass of each kind; None where there is no replay.
        task_passes, replay_passes: how many of each kind a step has.
        penalty: float32 numbers that a loss on the weights keeps, per trained number.
    """

    task: Pass
    replay: Pass | None = None
    task_passes: int = 1
    replay_passes: int = 0
    penalty: float = 0.0

    @property
    def passes(self) -> int:
        return self.task_passes + self.replay_passes


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Bytes in one memory at one time.

    Attributes:
        parameters: masters and working copies.
        gradients: as they are accumulated.
        optimizer: state.
        gathered: whole layers, casts, and the buffers gradients are reduced in.
        activations: what backward reads, logits, and what a backward step adds.
        teacher: targets of replayed rows, tiles of attention maps.
        penalty: what a loss on the weights compares them with.
        checkpoint: a copy of masters and state that is being written; an export's files.
        process: everything before the first tensor.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    activations: int = 0
    teacher: int = 0
    penalty: int = 0
    checkpoint: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Of one worker.

    Attributes:
        device: the device's memory in every phase; on the CPU all there is.
        host: host memory at the peak, on a GPU; 0 on the CPU, where it is the device's.
    """

    device: dict[str, Parts]
    host: int

    @property
    def phase(self) -> str:
        """The phase with the peak."""
        return max(self.device, key=lambda name: self.device[name].total)

    @property
    def parts(self) -> Parts:
        """What there is at the peak."""
        return self.device[self.phase]

    @property
    def peak(self) -> int:
        """Most bytes of the device."""
        return self.parts.total


def estimate(
    sizes: ModelSizes,
    recipe: Recipe,
    execution: Execution,
    work: Work,
    *,
    workers: int,
    device: Device,
    process: int = PROCESS_BYTES,
) -> MemoryEstimate:
    """Return what one worker will need.

    Args:
        workers: Of the training.
        process: Bytes of host memory that the worker's process has before it does anything.
    """
    held = held_by(sizes, recipe, execution, workers, device)
    if execution.strategy == "deepspeed":
        process += DEEPSPEED_BYTES
    phases = _phases(_Step(sizes, Numbers.of(recipe, execution), execution, held), work)
    share = 1 if execution.strategy == "ddp" else workers
    penalty = int(4 * work.penalty * sizes.trained / share)
    phases = {name: replace(parts, penalty=penalty) for name, parts in phases.items()}
    export = _exported(sizes, recipe, execution)
    if device == "cuda":
        base = CUDA_BYTES + (NCCL_BYTES if workers > 1 else 0)
        found = {name: replace(parts, process=base) for name, parts in phases.items()}
        return MemoryEstimate(device=found, host=process + held.host + max(held.saved, export))
    found = {
        name: replace(parts, process=process, checkpoint=held.saved)
        for name, parts in phases.items()
    }
    found["export"] = replace(_still(held), process=process, penalty=penalty, checkpoint=export)
    return MemoryEstimate(device=found, host=0)


@dataclass(frozen=True, slots=True)
class _Step:
    sizes: ModelSizes
    numbers: Numbers
    execution: Execution
    held: Held


def _phases(step: _Step, work: Work) -> dict[str, Parts]:
    """Return each phase of a step, for the kind of pass that needs most in it."""
    kinds = [(work.task, work.task_passes > 1)]
    if work.replay is not None:
        kinds.append((work.replay, True))  # task rows come first
    several = work.passes > 1
    found = [_of_pass(step, kind, later, several) for kind, later in kinds]
    phases = {
        name: max((phases[name] for phases in found), key=lambda parts: parts.total)
        for name in found[0]
    }
    held = step.held
    gradients = max(held.between, held.after) if several else held.after
    phases["update"] = replace(_still(held), gradients=gradients + held.step)
    return phases


def _of_pass(step: _Step, kind: Pass, later: bool, several: bool) -> dict[str, Parts]:
    """Return the phases of one pass.

    Args:
        later: Whether gradients of an earlier pass are there already.
        several: Whether a step has more passes than this one.
    """
    sizes, numbers, execution, held = step.sizes, step.numbers, step.execution, step.held
    still = replace(
        _still(held),
        gradients=held.between if later else held.before,
        gathered=held.gathered,
        teacher=teacher_rows(sizes, kind),
    )
    kept, layer = (
        kept_by_model(sizes, numbers, kind, execution),
        kept_by_layer(sizes, numbers, kind),
    )
    again = layer if execution.activation_checkpointing else 0  # a layer that is computed again
    backward = layer_backward(sizes, numbers, kind)
    after = max(held.between, held.after) if several else held.after
    head = held.apart  # the head's gradient, where it is not among the others
    if not (head or later or held.before or sizes.base_frozen):
        head = numbers.product * sizes.head
    return {
        "losses": replace(still, activations=kept + head_backward(sizes, numbers, kind)),
        "last layer": replace(
            still,
            gradients=still.gradients + head,
            gathered=held.gathered + held.begun,
            activations=kept + again + backward,
        ),
        "first layer": replace(
            still,
            gradients=max(after, still.gradients) + held.apart,
            gathered=held.gathered + held.reduced,
            activations=layer + backward,
        ),
        "embedding": replace(
            still,
            gradients=max(after, still.gradients) + held.largest * (2 if sizes.tied else 1),
            gathered=held.gathered + held.reduced,
        ),
    }


def _still(held: Held) -> Parts:
    """What is there between steps."""
    return Parts(parameters=held.parameters, optimizer=held.optimizer)


def _exported(sizes: ModelSizes, recipe: Recipe, execution: Execution) -> int:
    """Return the copies of weights that a worker's file of the model is written from.

    A whole float32 model that is exported in float32 is written from where it lies.
    """
    own = sizes.total - sizes.adapters
    if execution.strategy == "ddp" and recipe.dtype.itemsize == 4 and not sizes.base_frozen:
        return 0
    return min(SHARD_BYTES, recipe.dtype.itemsize * own) + 4 * sizes.head
