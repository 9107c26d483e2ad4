"""Weights: what each token of a task's training rows counts, found by row id in every later training.

A document's weights depend on the document and the network that looks at it, and on no training, so they
are computed once, on a pool of actors. In the same form lies what a token was worth to a reference
model: its loss there, for methods that compare with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.artifact import Artifact
from pipelines.config import PoolConfig, StreamConfig
from pipelines.hosts import model_pool
from pipelines.meta import NETWORK
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, ray_tables, rows_in_blocks
from pipelines.results import EXAMPLES
from pipelines.rowsets import (
    FOCUS,
    TRAIN,
    kind_folder,
    load_rows_table,
    load_table,
    rows_of,
    write_table,
)
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.collation import collate
from seekr.forward import batch_logits
from seekr.models import load_tokenizer
from seekr.taalm.network import TrainAttention
from seekr.taalm.weighted import token_nll

WEIGHTS = "weights"
# Documents that the report shows, and tokens of each.
_SHOWN, _SHOWN_TOKENS = 3, 600
WEIGHTS_SCHEMA = pa.schema([("row_id", pa.string()), ("values", pa.list_(pa.float32()))])


def weights(
    workspace: Workspace, config: StreamConfig, task: str, report: Reporter
) -> StageOutcome:
    """Run the stage; writes weights/: a number per token of each row, 0 in its prompt."""
    data, by = workspace.inputs["data"], workspace.config["by"]
    rows = load_rows_table(data, kind_folder(TRAIN))
    report.post(force=True, rows_done=0, rows=rows.num_rows)
    if by == "focus":
        found = _focused(data, rows)
    else:
        network = _network(workspace, config) if by == "train_attention" else None
        model = ModelSource.of(workspace, config, "model")
        arguments = {"model": model, "network": network, "report": report}
        with model_pool(
            "teach", _Weigher, arguments, workspace.key, config.teach, config
        ) as through:
            found = pa.concat_tables(ray_tables(through(rows_in_blocks(rows, config.teach))))
    write_table(found.cast(WEIGHTS_SCHEMA), workspace, WEIGHTS)
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    workspace.write_json(EXAMPLES, _examples(found, rows, tokenizer))
    return StageOutcome(rows=found.num_rows, stats=_stats(found, rows))


def load_weights(artifacts: Mapping[str, Artifact]) -> dict[str, NDArray[np.float32]]:
    """Read the numbers of some tasks' rows, by `task/row_id`."""
    found: dict[str, NDArray[np.float32]] = {}
    for task, artifact in artifacts.items():
        table = load_table(artifact, WEIGHTS)
        values = table["values"].to_numpy(zero_copy_only=False)
        for row_id, own in zip(table["row_id"].to_pylist(), values, strict=True):
            found[f"{task}/{row_id}"] = own
    return found


def _network(workspace: Workspace, config: StreamConfig) -> Artifact | Path:
    """Return where Train-Attention is, which every actor fetches for itself."""
    if "network" in workspace.inputs:
        return workspace.inputs["network"]
    assert config.token_weights is not None and config.token_weights.network is not None
    return config.token_weights.network


def _focused(data: Artifact, rows: pa.Table) -> pa.Table:
    """Return 1 at the tokens of each row's focus, 0 elsewhere."""
    focus = load_table(data, kind_folder(TRAIN), ["row_id", FOCUS])
    places = dict(zip(focus["row_id"].to_pylist(), focus[FOCUS].to_pylist(), strict=True))
    values: list[list[float]] = []
    for row in rows_of(rows):
        own = np.zeros(len(row.input_ids), dtype=np.float32)
        own[places[row.row_id]] = 1.0
        own[: row.prompt_length] = 0.0
        values.append(own.tolist())
    return pa.table({"row_id": rows["row_id"], "values": values}, schema=WEIGHTS_SCHEMA)


def _examples(found: pa.Table, rows: pa.Table, tokenizer: Any) -> list[dict[str, Any]]:
    """Return a few documents token by token, for people to look at."""
    values = dict(zip(found["row_id"].to_pylist(), found["values"].to_pylist(), strict=True))
    shown: list[dict[str, Any]] = []
    for row in rows_of(rows.slice(0, _SHOWN)):
        ids = row.input_ids[:_SHOWN_TOKENS].tolist()
        tokens = [tokenizer.decode([token]) for token in ids]
        shown.append(
            {"row_id": row.row_id, "tokens": tokens, "weights": values[row.row_id][: len(ids)]}
        )
    return shown


def _stats(found: pa.Table, rows: pa.Table) -> dict[str, Any]:
    """Return how the numbers are spread, and how many rows count for nothing."""
    prompts = dict(zip(rows["row_id"].to_pylist(), rows["prompt_length"].to_pylist(), strict=True))
    answers = [
        np.asarray(values[prompts[row_id] :])
        for row_id, values in zip(
            found["row_id"].to_pylist(), found["values"].to_pylist(), strict=True
        )
    ]
    every = np.concatenate(answers)
    return {
        "mean": float(every.mean()),
        "deviation": float(every.std()),
        "rows_without": sum(not values.any() for values in answers),
    }


def _load_network(network: Artifact | Path) -> TrainAttention:
    return TrainAttention.load(network if isinstance(network, Path) else network.local(NETWORK))


class _Weigher:
    """An actor with the network that weighs, or the model that is compared with."""

    def __init__(
        self,
        *,
        model: ModelSource,
        network: Artifact | Path | None,
        report: Reporter,
        pool: PoolConfig,
    ) -> None:
        self._device = prepare_device(pool)
        self._is_network = network is not None
        loaded: Any = model.load("sdpa") if network is None else _load_network(network)
        self._model = loaded.to(self._device)
        self._report = report.named(f"weigher-{id(self)}")

    @torch.no_grad()
    def __call__(self, table: pa.Table) -> pa.Table:
        rows = rows_of(table)
        batch = collate(rows, pad_id=0).to(self._device)
        if self._is_network:
            values_BT = self._model(batch)
        else:
            values_BT = token_nll(batch_logits(self._model, batch), batch.labels_BT)
        own = [
            values_BT[i, : len(row.input_ids)].float().cpu().tolist() for i, row in enumerate(rows)
        ]
        self._report.add_rows(len(rows))
        return pa.table(
            {"row_id": [row.row_id for row in rows], "values": own}, schema=WEIGHTS_SCHEMA
        )
