"""Fisher: after a task, how firmly each weight is to be held while the next ones are learnt.

One actor with one model in float32 goes over rows of the task, drawn by hash and in the order of their
ids, so the result does not depend on the cluster. It writes two numbers per weight, this task's and the
earlier ones' together, as sharded safetensors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from huggingface_hub import save_torch_state_dict
from pyarrow.dataset import field as column
from torch import Tensor

from pipelines.artifact import Artifact
from pipelines.config import PoolConfig, StreamConfig
from pipelines.hosts import model_pool
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, ray_tables, rows_in_blocks
from pipelines.rowsets import TRAIN, kind_folder, load_rows_table, rows_of
from pipelines.stage import StageOutcome
from pipelines.store import Store
from pipelines.workspace import Workspace
from seekr.fisher import fisher_diagonal, merge_parabolas
from seekr.methods.ewc import ANCHOR, FISHER, PRECISION
from seekr.sampling import draw
from seekr.training.build import WeightFiles


def fisher(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes fisher/."""
    settings = workspace.config
    table = load_rows_table(workspace.inputs["data"], kind_folder(TRAIN))
    drawn_from = table.num_rows
    if settings["rows"] is not None and settings["rows"] < drawn_from:
        kept = draw(table["row_id"].to_pylist(), settings["rows"], settings["seed"])
        table = table.filter(column("row_id").isin(kept))
    report.post(force=True, rows_done=0, rows=table.num_rows)
    arguments = {
        "model": ModelSource.of(workspace, config, "after"),
        "earlier": workspace.inputs.get("earlier"),
        "store": workspace.store,
        "key": workspace.key,
        "report": report,
    }
    # All rows are one batch of one actor: its sums are the result.
    pool = config.score.model_copy(update={"actors": 1, "batch_size": table.num_rows})
    with model_pool("score", _FisherEstimator, arguments, workspace.key, pool, config) as through:
        (found,) = ray_tables(through(rows_in_blocks(table, pool)))
    mean = found["mean"][0].as_py()
    return StageOutcome(
        rows=table.num_rows,
        stats={"drawn_from": drawn_from, "mean": mean},
        seeds={"fisher_rows": settings["seed"]},
    )


class _FisherEstimator:
    """An actor with one model and the sums over its weights."""

    def __init__(
        self,
        *,
        model: ModelSource,
        earlier: Artifact | None,
        store: Store,
        key: str,
        report: Reporter,
        pool: PoolConfig,
    ) -> None:
        device = prepare_device(pool)
        loaded: Any = model.load("sdpa", torch.float32)
        self._model = loaded.to(device)
        self._earlier = None if earlier is None else WeightFiles(earlier.local(FISHER))
        self._store, self._key = store, key
        self._report = report.named("estimator")

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = rows_of(table)

        def counted() -> Any:
            for row in rows:
                yield row
                self._report.add_rows(1)

        diagonal = fisher_diagonal(self._model, counted())
        numbers = sum(values.numel() for values in diagonal.values())
        total = sum(float(values.double().sum()) for values in diagonal.values())
        kept: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            precision, anchor = self._merged(name, diagonal.pop(name), parameter.detach())
            kept[name + PRECISION], kept[name + ANCHOR] = precision.cpu(), anchor.cpu()
        with tempfile.TemporaryDirectory(prefix="seekr-fisher-") as path:
            save_torch_state_dict(kept, Path(path))
            self._store.upload(path, self._key, FISHER)
        return pa.table({"mean": [total / numbers]})

    def _merged(self, name: str, fisher: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        if self._earlier is None:
            return fisher, theta.clone()
        precision, anchor = (
            self._earlier.read(name + kind, 0, theta.numel()).view(theta.shape).to(theta)
            for kind in (PRECISION, ANCHOR)
        )
        return merge_parabolas(precision, anchor, fisher, theta)
