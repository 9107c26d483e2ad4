"""Rows through models: what scoring, teaching and evaluation have in common.

Where a model comes from, what device an actor uses, and how rows are cut so that every actor of a pool
has work. `hosts` has the actors themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray.data
import torch
from ray.data import Dataset
from transformers import PreTrainedModel

from pipelines.artifact import Artifact
from pipelines.config import PoolConfig, StreamConfig
from pipelines.pool_config import ActorConfig
from pipelines.workspace import Workspace
from seekr.models import AttentionName, load_model

MODEL_FOLDER = "model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model comes from: a train stage's artifact, or the base model's folder."""

    artifact: Artifact | None
    base: Path
    trust_remote_code: bool
    dtype: str

    @classmethod
    def of(cls, workspace: Workspace, config: StreamConfig, name: str) -> ModelSource:
        """Return the model behind a stage's input, the base model where there is no such input."""
        return cls(
            artifact=workspace.inputs.get(name),
            base=Path(config.model.path),
            trust_remote_code=config.model.trust_remote_code,
            dtype=config.model.dtype,
        )

    def folder(self) -> Path:
        """Return a local folder with the model, fetched if it lies in an object store."""
        return self.base if self.artifact is None else self.artifact.local(MODEL_FOLDER)

    def load(self, attention: AttentionName, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Load it on the CPU, in the stream's dtype unless another is given."""
        return load_model(
            self.folder(),
            dtype=dtype or DTYPES[self.dtype],
            attention=attention,
            trust_remote_code=self.trust_remote_code,
        )


def prepare_device(pool: ActorConfig) -> torch.device:
    """Set this process's threads to its share of cores and return its device."""
    torch.set_num_threads(max(1, int(pool.cpus)))
    return torch.device("cuda" if pool.gpus else "cpu")


def rows_in_blocks(table: pa.Table, pool: PoolConfig) -> Dataset:
    """Return rows as a dataset whose blocks keep every actor of a pool busy."""
    blocks = max(1, min(4 * pool.actors, -(-table.num_rows // pool.batch_size)))
    if pool.actors == 1:
        blocks = 1
    size = -(-table.num_rows // blocks)
    pieces = [table.slice(start, size) for start in range(0, table.num_rows, size)]
    return ray.data.from_arrow(pieces)


def ray_tables(dataset: Dataset) -> list[pa.Table]:
    """Return a small dataset's blocks as Arrow tables in this process."""
    return [batch for batch in dataset.iter_batches(batch_format="pyarrow", batch_size=None)]
