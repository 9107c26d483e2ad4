"""Borrow: the newest model answers earlier tasks' questions about the new task's inputs.

Before a task is learnt, its inputs are put under the instruction of every earlier task, as the kept
rows have it, and the model that has learnt those tasks answers. The pairs are replayed beside the kept
rows while the new task is learnt, and are not needed afterwards. An answer that does not end is dropped.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipelines.config import PoolConfig, StreamConfig
from pipelines.hosts import model_pool
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, ray_tables, rows_in_blocks
from pipelines.rowsets import (
    REPLAY,
    ROW_SCHEMA,
    TRAIN,
    kind_folder,
    load_rows_table,
    rows_of,
    write_table,
)
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.borrowing import answered, borrowed_prompts, frame_of
from seekr.collation import collate_prompts
from seekr.errors import DataError
from seekr.models import generate_greedy, load_tokenizer
from seekr.prompts import Template, TokenizedRow, eos_id_of, pad_id_of
from seekr.sampling import priority

# With the most tokens of an answer.
ASKED_SCHEMA = pa.schema([*ROW_SCHEMA, pa.field("max_new_tokens", pa.int32())])


def borrow(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes replay/."""
    model = ModelSource.of(workspace, config, "model")
    asked = _asked(workspace, model)
    report.post(force=True, rows_done=0, rows=asked.num_rows)
    if asked.num_rows == 0:
        write_table(ROW_SCHEMA.empty_table(), workspace, REPLAY)
        return StageOutcome(rows=0, stats={"asked": 0})
    arguments = {"model": model, "report": report}
    with model_pool(
        "evaluate", _Answerer, arguments, workspace.key, config.evaluate, config
    ) as through:
        rows = pa.concat_tables(ray_tables(through(rows_in_blocks(asked, config.evaluate))))
    write_table(rows, workspace, REPLAY)
    seeds = {"borrow": workspace.config["seed"]}
    return StageOutcome(rows=rows.num_rows, stats={"asked": asked.num_rows}, seeds=seeds)


def _asked(workspace: Workspace, model: ModelSource) -> pa.Table:
    """Return the prompts: some of the new task's inputs, under every earlier task's instruction."""
    settings = workspace.config
    tokenizer = load_tokenizer(model.folder(), trust_remote_code=model.trust_remote_code)
    new = rows_of(load_rows_table(workspace.inputs["data"], kind_folder(TRAIN)))
    records: list[dict[str, Any]] = []
    for name, options in settings["tasks"].items():
        kept = rows_of(load_rows_table(workspace.inputs[f"replay.{name}"], REPLAY))
        if not kept:  # all were forgotten
            continue
        template, truncate = Template.parse(options["template"]), options["truncate"]
        found = [frame_of(row, template, tokenizer, truncate) for row in kept]
        frames = [frame for frame in found if frame is not None]
        if not frames:
            raise DataError(
                f"task {name}: in none of its {len(kept)} kept rows can the input be told from the "
                "instruction, which replay.borrowed needs; set replay.borrowed to null or raise "
                "data.max_length"
            )
        drawn = sorted(new, key=lambda row: priority(settings["seed"], f"{name}/{row.row_id}"))
        texts = list(dict.fromkeys(row.input for row in drawn))  # each is asked about once
        rows = borrowed_prompts(
            name,
            frames,
            texts[: settings["rows"]],
            tokenizer,
            prompt_length=options["max_length"] - options["max_answer_length"],
            truncate=truncate,
        )
        budget = {"max_new_tokens": options["max_answer_length"]}
        records += [row.to_record() | budget for row in rows]
    return pa.Table.from_pylist(records, schema=ASKED_SCHEMA)


class _Answerer:
    """An actor with one model and its tokenizer."""

    def __init__(self, *, model: ModelSource, report: Reporter, pool: PoolConfig) -> None:
        self._device = prepare_device(pool)
        loaded: Any = model.load("sdpa")
        self._model = loaded.to(self._device)
        self._tokenizer = load_tokenizer(model.folder(), trust_remote_code=model.trust_remote_code)
        self._report = report.named(f"answerer-{id(self)}")

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, pad_id = rows_of(table), pad_id_of(self._tokenizer)
        budgets = table["max_new_tokens"].to_pylist()
        generated = generate_greedy(
            self._model,
            collate_prompts(rows, pad_id).to(self._device),
            max(budgets),
            eos_id_of(self._tokenizer),
            pad_id,
        )
        self._report.add_rows(len(rows))
        done: list[TokenizedRow] = [
            answered(row, ids, self._tokenizer)
            for row, ids, budget in zip(rows, generated, budgets, strict=True)
            if len(ids) < budget
        ]
        return pa.Table.from_pylist([row.to_record() for row in done], schema=ROW_SCHEMA)
