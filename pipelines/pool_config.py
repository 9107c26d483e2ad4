"""The schema of the YAML's sections about actors that hold models, and of what they are to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from pipelines.section import Section, execution


class ActorConfig(Section):
    """A process that holds the models it needs."""

    batch_size: int = execution(8, ge=1)
    """Rows per forward pass."""
    cpus: float = execution(1, ge=0)
    """Cores of each process."""
    gpus: float = execution(0, ge=0)
    """Devices of each process; 0 runs on the CPU."""


class PoolConfig(ActorConfig):
    """A pool of such processes."""

    actors: int = execution(1, ge=1)
    """Processes that hold models."""


class TeachConfig(PoolConfig):
    """How targets are written."""

    logits_kept: int | None = Field(default=64, ge=1)
    """Probabilities kept per answer token, on average over a row, beside one mass for the others;
    null keeps whole logits."""
    attention_kept: int | None = Field(default=24, ge=1)
    """Entries kept per query row of a map, on average over a row, beside one mass for the others;
    null keeps all."""
    bits: Literal[16, 32] = 16
    """Of a stored number."""


class EvaluateConfig(PoolConfig):
    """Greedy generation on the test rows."""

    batch_size: int = execution(32, ge=1)
    """Rows generated together."""
    split: Literal["test", "validation"] = "test"
    """What rows: those of the tasks' test files, or the held-out ones, for choosing settings."""
    forward_transfer: bool = False
    """Also score each task before it is learnt, and the base model on it (FWT)."""


class GeneralConfig(ActorConfig):
    """General ability by EleutherAI's lm-eval, of the base model and after learning."""

    tasks: tuple[str, ...] = ()
    """Names of the harness's tasks; none measures nothing."""
    folder: Path | None = execution(None)
    """Of task definitions of your own, in its YAML format."""
    after: Literal["last", "every"] = "last"
    """Which models beside the base: the one after the last task, or after every task."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in a prompt; null leaves it to the task."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first rows of each task, for a quick look; null takes all."""
    max_length: int = Field(default=2048, ge=16)
    """Tokens of a prompt with its answer; a longer prompt loses its beginning."""

    @property
    def asked(self) -> bool:
        """Whether anything is measured."""
        return bool(self.tasks)
