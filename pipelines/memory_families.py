"""What to change where a training does not fit: kinds of settings, and steps of each.

Which of them fits is for the estimate to say (`memory_plan`); the order here is that of what they cost
in speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.train_config import LoraConfig, TrainConfig
from seekr.training.held import Device

_MOST_WORKERS = 64


def families(train: TrainConfig, device: Device, addition: bool) -> Iterator[list[dict[str, Any]]]:
    """Yield changes of one kind, mildest first; kinds in the order of what they cost in speed.

    Args:
        addition: Whether something is trained beside the model, with which there are no adapters.
    """
    again = {} if train.activation_checkpointing else {"activation_checkpointing": True}
    sizes = [train.micro_batch_size >> n for n in range(1, train.micro_batch_size.bit_length())]
    smaller: list[dict[str, Any]] = [{"micro_batch_size": size} for size in sizes]
    least = smaller[-1] if smaller else {}
    workers = train.fewest_workers
    yield [again] if again else []
    yield smaller
    yield [again | change for change in smaller] if again else []
    sharded = list(_sharded(train)) if workers > 1 else []
    milder = [{}, again, again | least]
    yield [change | more for change in sharded for more in milder]
    if device == "cuda":
        yield [change | more for change in _offloaded(train) for more in milder]
    counts = [workers << n for n in range(1, 7) if workers << n <= _MOST_WORKERS]
    kept = {} if train.strategy != "ddp" else {"strategy": "fsdp"}
    yield [kept | {"workers": count} | more for count in counts for more in milder]
    if train.lora is None and not addition:
        yield [{"lora": LoraConfig()} | more for more in milder]
        if train.strategy == "ddp" and train.optimizer == "adamw":
            yield [{"optimizer": "adamw_8bit"} | more for more in milder]


def _sharded(train: TrainConfig) -> Iterator[dict[str, Any]]:
    """Yield strategies that hold less with as many workers."""
    if train.optimizer != "adamw":
        return
    zero = train.strategy == "deepspeed"
    if train.strategy == "ddp":
        yield {"strategy": "fsdp"}
    for stage in (2, 3):
        if not zero or train.zero_stage < stage:
            yield {"strategy": "deepspeed", "zero_stage": stage}


def _offloaded(train: TrainConfig) -> Iterator[dict[str, Any]]:
    """Yield what moves something to the host."""
    if train.strategy == "fsdp" and train.offload == "none":
        yield {"offload": "all"}
    if train.strategy == "deepspeed" and train.offload == "none":
        yield {"offload": "optimizer"}
    if train.strategy == "ddp" and train.optimizer == "adamw":
        yield {"strategy": "deepspeed", "zero_stage": 2, "offload": "optimizer"}
    if train.optimizer == "adamw" and train.offload != "all":
        yield {"strategy": "deepspeed", "zero_stage": 3, "offload": "all"}
