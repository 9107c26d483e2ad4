"""Rollout: the newest model answers the stored prompts of an earlier task, and the good answers stay.

The rows that come out are a replay set like any other: the same prompts under the same row ids, with the
model's own tokens for an answer. An answer is good if it ended by itself and the task's metric gives it
enough. What becomes of a row without one is the stream's choice: its gold answer, or nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.config import PoolConfig, StreamConfig
from pipelines.hosts import model_pool
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, ray_tables, rows_in_blocks
from pipelines.rowsets import REPLAY, ROW_SCHEMA, load_rows_table, rows_of, write_table
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.collation import collate_prompts
from seekr.metrics import METRICS
from seekr.models import generate_greedy, load_tokenizer
from seekr.prompts import TokenizedRow, eos_id_of, pad_id_of

ROLLOUT_SCHEMA = pa.schema([*ROW_SCHEMA, pa.field("accepted", pa.bool_())])


def rollout(
    workspace: Workspace, config: StreamConfig, task: str, report: Reporter
) -> StageOutcome:
    """Run the stage; writes replay/."""
    table = load_rows_table(workspace.inputs["replay"], REPLAY)
    report.post(force=True, rows_done=0, rows=table.num_rows)
    if table.num_rows == 0:  # all were forgotten
        write_table(table, workspace, REPLAY)
        return StageOutcome(rows=0, stats={"asked": 0, "accepted": 0})
    arguments = {
        "model": ModelSource.of(workspace, config, "model"),
        "settings": dict(workspace.config),
        "report": report,
    }
    with model_pool(
        "evaluate", _Roller, arguments, workspace.key, config.evaluate, config
    ) as through:
        found = pa.concat_tables(ray_tables(through(rows_in_blocks(table, config.evaluate))))
    accepted = int(np.count_nonzero(found["accepted"].to_numpy()))
    if workspace.config["rejected"] == "drop":
        found = found.filter(found["accepted"])
    write_table(found.select(ROW_SCHEMA.names), workspace, REPLAY)
    return StageOutcome(rows=found.num_rows, stats={"asked": table.num_rows, "accepted": accepted})


class _Roller:
    """An actor with one model and its tokenizer."""

    def __init__(
        self, *, model: ModelSource, settings: dict[str, Any], report: Reporter, pool: PoolConfig
    ) -> None:
        self._device = prepare_device(pool)
        loaded: Any = model.load("sdpa")
        self._model = loaded.to(self._device)
        self._tokenizer = load_tokenizer(model.folder(), trust_remote_code=model.trust_remote_code)
        self._settings, self._report = settings, report.named(f"roller-{id(self)}")

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, pad_id = rows_of(table), pad_id_of(self._tokenizer)
        generated = generate_greedy(
            self._model,
            collate_prompts(rows, pad_id).to(self._device),
            self._settings["max_new_tokens"],
            eos_id_of(self._tokenizer),
            pad_id,
        )
        self._report.add_rows(len(rows))
        records = [self._record(row, ids) for row, ids in zip(rows, generated, strict=True)]
        return pa.Table.from_pylist(records, schema=ROLLOUT_SCHEMA)

    def _record(self, row: TokenizedRow, ids: list[int]) -> dict[str, Any]:
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        score = METRICS[self._settings["metric"]](text, row.references, row.input)
        ended = len(ids) < self._settings["max_new_tokens"]
        accepted = ended and score >= self._settings["accept"]
        record = row.to_record() | {"accepted": accepted}
        if accepted:
            prompt = row.input_ids[: row.prompt_length].tolist()
            record["input_ids"] = [*prompt, *ids, eos_id_of(self._tokenizer)]
        return record
