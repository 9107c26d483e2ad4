"""The schema of the YAML's `train` section, and what a worker makes of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.section import Section, execution
from seekr.training.settings import Execution, Offload, OptimizerName, StrategyName

WorkerCount = Annotated[int, Field(ge=1)]


class LoraConfig(Section):
    """Low-rank adapters W + (alpha / rank) B A, merged into the weights when the task is learnt."""

    rank: int = Field(default=16, ge=1)
    """Columns of B, rows of A."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: an adapter counts alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what goes into an adapter."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of linear layers, such as [q_proj, v_proj]; null takes all of the decoder."""


class GeneratorConfig(Section):
    """The base model under low-rank adapters, which learns to write a task's prompts."""

    epochs: int = Field(default=5, ge=1)
    """Passes over the prompts of a task's rows."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts per optimizer step, which is one forward pass."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Constant rate of AdamW."""
    lora: LoraConfig = LoraConfig()
    """The adapters."""
    temperature: float = Field(default=1.0, gt=0)
    """At which prompts are drawn, token by token."""


class WorkerRange(Section):
    """How few and how many workers a training may have; every change goes on from a checkpoint."""

    min: int = execution(..., ge=1)
    """It waits for so many."""
    max: int = execution(..., ge=1)
    """It never asks for more."""

    @model_validator(mode="after")
    def _ordered(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max {self.max}; min may not be above max")
        return self


class TrainConfig(Section):
    """Training of one task. The loss is normalised over the global batch."""

    epochs: int = Field(default=1, ge=1)
    """Passes over a task's rows."""
    batch_size: int = Field(default=32, ge=1)
    """New rows per optimizer step over all workers; replayed rows come on top."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after warm-up; linear and cosine end at 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the rate rises linearly."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled, as AdamW has it."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The whole gradient is clipped to this norm."""
    micro_batch_size: int = execution(8, ge=1)
    """Rows per forward pass of a worker. Does not change the result."""
    optimizer: OptimizerName = "adamw"
    """`adamw_8bit` keeps its state in 8 bits, with bitsandbytes and strategy ddp."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights; null trains all."""
    workers: WorkerCount | WorkerRange = execution(1)
    """Training processes; `{min: 2, max: 8}` starts with what the cluster has and follows it."""
    strategy: StrategyName = execution("ddp")
    """`ddp` has a whole model per worker, `fsdp` is FSDP2 (fully_shard), `deepspeed` is ZeRO."""
    zero_stage: Literal[1, 2, 3] = execution(3)
    """Of deepspeed: shards optimizer state (1), gradients too (2), parameters too (3)."""
    offload: Offload = execution("none")
    """What lives in host memory: nothing, the optimizer (deepspeed), or parameters too (fsdp, ZeRO-3)."""
    activation_checkpointing: bool = execution(False)
    """Forget activations inside layers and compute them again: less memory, a third more work."""
    compile: bool = execution(False)
    """torch.compile of every decoder layer."""
    pack_tokens: int | None = execution(None, ge=2)
    """Join task rows to sequences of this many tokens instead of padding them; null pads."""
    cpus_per_worker: int = execution(1, ge=1)
    """Cores, and torch threads, of each."""
    gpus_per_worker: float = execution(0, ge=0)
    """Devices of each; 0 trains on the CPU with gloo."""
    device_memory: float | None = execution(None, gt=0)
    """GiB of one device, what `plan` holds its estimate against; null asks the device, or on the CPU
    takes a worker's share of this machine."""
    checkpoint_every: int = execution(200, ge=1)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = execution(2, ge=1)
    """Newest checkpoints of a running stage that are kept."""
    profile_steps: tuple[int, int] | None = execution(None)
    """First and last step, from 0, of which a torch.profiler trace goes to profiles/ in the storage."""
    max_failures: int = execution(3, ge=0)
    """Worker failures survived per stage, each from the last checkpoint."""

    @model_validator(mode="after")
    def _steps_in_order(self) -> TrainConfig:
        steps = self.profile_steps
        if steps is not None and not 0 <= steps[0] <= steps[1]:
            raise ValueError(f"profile_steps is {list(steps)}; 0 <= first <= last is needed")
        return self

    @property
    def most_workers(self) -> int:
        """Workers at most."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def fewest_workers(self) -> int:
        """Workers it takes to begin."""
        return self.workers if isinstance(self.workers, int) else self.workers.min


def training_execution(train: TrainConfig) -> Execution:
    """Return what concerns a worker's loop of how a training is executed."""
    return Execution(
        strategy=train.strategy,
        zero_stage=train.zero_stage,
        offload=train.offload,
        micro_batch_size=train.micro_batch_size,
        pack_tokens=train.pack_tokens,
        activation_checkpointing=train.activation_checkpointing,
        compile=train.compile,
    )
