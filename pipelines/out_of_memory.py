"""Out of memory in a training: told from other errors, noted for the next group of workers, explained.

A worker that asked torch for more than there is would ask for as much again, so it must not be tried
`train.max_failures` times. It leaves a note in the stage's scratch folder; the workers that Ray Train
starts next find it and end at once. A worker that Ray killed because its node ran low is another case:
others may have used the memory, so it is tried again, and explained when no try is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.store import Store
from pipelines.train_config import TrainConfig
from pipelines.workspace import SCRATCH

_NOTE = f"{SCRATCH}/out_of_memory.json"
# Of messages of errors that have no class of their own.
_SAID_BY_TORCH = (
    *("DefaultCPUAllocator: ", "out of memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    *("std::bad_alloc", "Cannot allocate memory"),
)
_SAID_BY_RAY = ("running low on memory", "OutOfMemoryError")


@dataclass(slots=True, kw_only=True)
class Place:
    """Where a worker is.

    Attributes:
        step: from 0; None outside of steps. steps: how many there are.
        shape: sequences and tokens of the pass under way; None between passes.
        checkpoint: steps that the newest checkpoint holds.
    """

    doing: str = "building the model"
    step: int | None = None
    steps: int | None = None
    shape: tuple[int, int] | None = None
    checkpoint: int = 0


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is that memory could not be had."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID_BY_TORCH):
            return True
        error = error.__cause__
    return False


def note(store: Store, key: str, attempt: int, rank: int, place: Place, error: Exception) -> None:
    """Leave word of it in a stage's folder, for this attempt of the stage."""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    found = {"attempt": attempt, "rank": rank, "error": store.location.redact(said)}
    found |= {name: getattr(place, name) for name in Place.__slots__}
    store.write_json(f"{key}/{_NOTE}", found)


def noted(store: Store, key: str, attempt: int) -> dict[str, Any] | None:
    """Return what a worker of this attempt has left, None if there was no such thing."""
    path = f"{key}/{_NOTE}"
    found = store.read_json(path) if store.stat(path) is not None else {}
    return found if found.get("attempt") == attempt else None


def explain(task: str, found: Mapping[str, Any], train: TrainConfig, adapted: bool) -> str:
    """Return the message: where, for how large a pass, what is kept, what to lower.

    Args:
        found: the note.
        adapted: whether adapters are trained.
    """
    where = found["doing"]
    if found["step"] is not None:
        where = f"{where} {found['step']} of 0..{found['steps'] - 1}"
    if found["shape"] is not None:
        sequences, tokens = found["shape"]
        where += f", in a pass of {sequences} x {tokens} tokens (sequences x length)"
    saved = found["checkpoint"]
    kept = (
        f"the checkpoint after step {saved}" if saved else "no checkpoint, the task is at its start"
    )
    return (
        f"training of {task}: worker {found['rank']} ran out of memory while {where}: "
        f"{found['error']}. Kept is {kept}; trying the same again would end the same. "
        f"{_advice(train, found['step'] is not None, adapted)}"
    )


def explain_kill(
    task: str, failures: Iterable[str], train: TrainConfig, adapted: bool
) -> str | None:
    """Return the message if Ray killed a worker for its node's memory, None if it did not."""
    lines = (line for text in failures for line in text.splitlines())
    told = next((line for line in lines if any(said in line for said in _SAID_BY_RAY)), None)
    if told is None:
        return None
    return (
        f"training of {task}: Ray killed a worker because its node ran low on memory, after all of "
        f"train.max_failures ({train.max_failures}): {told}. The last checkpoint is kept. "
        f"{_advice(train, True, adapted)}; or run fewer actors and workers beside it "
        "(ray.parallel_stages), or on nodes with more memory"
    )


def _advice(train: TrainConfig, in_step: bool, adapted: bool) -> str:
    lower: list[str] = []
    if in_step and train.micro_batch_size > 1:
        lower.append(f"train.micro_batch_size (now {train.micro_batch_size})")
    if in_step and train.pack_tokens is not None:
        lower.append(f"train.pack_tokens (now {train.pack_tokens})")
    choose: list[str] = []
    if in_step and not train.activation_checkpointing:
        choose.append("train.activation_checkpointing true")
    if train.strategy == "ddp":
        choose.append("train.strategy fsdp or deepspeed with more train.workers")
    elif train.offload != "all":
        choose.append("more train.workers")
    if train.strategy == "fsdp" and train.offload == "none":
        choose.append("train.offload all")
    if train.strategy == "deepspeed" and train.offload != "all":
        choose.append("train.offload optimizer, or all with zero_stage 3")
    if not adapted:
        choose.append("train.lora")
    parts = [f"Lower {' or '.join(lower)}"] if lower else []
    parts += [f"{'or set' if lower else 'Set'} {', '.join(choose)}"] if choose else []
    return ", ".join(parts) or "Shorten the rows (data.max_length), or use devices with more memory"
