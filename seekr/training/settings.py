"""What one training is told: the recipe, which bears on the result, and the execution, which does not.

`Recipe` is what enters a fingerprint: the same recipe on the same rows gives the same model, within
the rounding of sums. `Execution` says on how many devices and by which means: how parameters are
sharded, how rows are cut into passes, what is recomputed to save memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from seekr.addition import Addition

StrategyName = Literal["ddp", "fsdp", "deepspeed"]
Schedule = Literal["constant", "linear", "cosine"]
OptimizerName = Literal["adamw", "adamw_8bit"]
Offload = Literal["none", "optimizer", "all"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters: W + (alpha / rank) B A, of which only A and B are trained.

    Attributes:
        targets: Names of the linear layers that get one; None is every linear layer of the decoder.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a training computes.

    Attributes:
        batch_size: Task rows per optimizer step, over all workers.
        addition: Trained instead of the model, if any: the kind, to which the task is added.
        batch_ratio: Replayed rows per task row.
        dtype: Of the forward pass and of frozen weights; what is trained has float32 masters.
        seed: Of row order, dropout and adapters' start.
        task: What is learnt. Adapters start from a draw of its own: those of two tasks that began
            equal would not be independent.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    optimizer: OptimizerName = "adamw"
    lora: Lora | None = None
    addition: Addition | None = None
    batch_ratio: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0
    task: str = ""

    @property
    def frozen(self) -> bool:
        """Whether the model's own weights stay as they are."""
        return self.lora is not None or self.addition is not None

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], task: str = "", addition: Addition | None = None
    ) -> Recipe:
        """Read it from a stage's settings, plain JSON values, of which the others are not ours."""
        values = {f.name: settings[f.name] for f in fields(cls) if f.name in settings}
        values |= {"task": task, "addition": addition}
        values["dtype"] = DTYPES[settings.get("dtype", "float32")]
        if (lora := values.get("lora")) is not None:
            targets = lora.get("targets")
            values["lora"] = Lora(**lora | {"targets": tuple(targets) if targets else None})
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How it is computed.

    Attributes:
        zero_stage: Of DeepSpeed: 1 shards optimizer state, 2 gradients too, 3 parameters too.
        offload: What is kept in host memory.
        micro_batch_size: Rows per pass of a worker.
        pack_tokens: Task rows are joined to sequences of this many tokens; None pads them.
        activation_checkpointing: Forget activations inside decoder layers, compute them again.
        compile: torch.compile of each decoder layer.
    """

    strategy: StrategyName = "ddp"
    zero_stage: Literal[1, 2, 3] = 3
    offload: Offload = "none"
    micro_batch_size: int = 8
    pack_tokens: int | None = None
    activation_checkpointing: bool = False
    compile: bool = False
