"""Evaluate: a row of the accuracy matrix, by greedy generation on the tasks' test rows.

Every model of the stage goes over its tasks' rows on an actor pool. Predictions are kept, so a score
can be looked into and computed again; a cell is the mean of its rows' scores, summed in row order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import field as column

from pipelines.config import PoolConfig, StreamConfig
from pipelines.hosts import model_pool
from pipelines.labels import is_before
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, ray_tables, rows_in_blocks
from pipelines.results import PREDICTIONS
from pipelines.rowsets import TEST, kind_folder, load_rows_table, rows_of
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.addition import addition_of
from seekr.collation import collate, collate_prompts
from seekr.errors import DataError
from seekr.metrics import METRICS
from seekr.models import generate_greedy, load_tokenizer
from seekr.prompts import TokenizedRow, eos_id_of, pad_id_of
from seekr.shared_attention import Attending, weights_of
from seekr.soft_prompts import Prompting

CELLS = "scores.json"
# Column of predictions by a model with shared attention: the task whose block had most weight.
BLOCK = "block"
PREDICTION_SCHEMA = pa.schema(
    [
        ("model_after", pa.string()),
        ("task", pa.string()),
        ("row_id", pa.string()),
        ("prediction", pa.string()),
        ("references", pa.list_(pa.string())),
        ("score", pa.float64()),
    ]
)


def evaluate(
    workspace: Workspace, config: StreamConfig, task: str, report: Reporter
) -> StageOutcome:
    """Run the stage; writes scores.json and predictions.parquet."""
    tasks = workspace.config["tasks"]
    models = [name for name in workspace.inputs if name.startswith("model.")]
    if is_before(task):
        models.append("model.base")
    folder = kind_folder(workspace.config.get("split", TEST))
    table = pa.concat_tables(
        _with_task(load_rows_table(workspace.inputs[f"data.{name}"], folder), name)
        for name in tasks
    )
    left = set(table["task"].to_pylist())
    if bare := [name for name in tasks if name not in left]:
        raise DataError(
            f"evaluate/{task}: {', '.join(bare)} has no row left to test with, all were forgotten; "
            "give the task other test data"
        )
    report.post(force=True, rows_done=0, rows=table.num_rows * len(models))
    predictions: list[pa.Table] = []
    cells: list[dict[str, Any]] = []
    for name in models:
        started = time.monotonic()
        arguments = {
            "model": ModelSource.of(workspace, config, name),
            "model_after": name.removeprefix("model."),
            "tasks": tasks,
            "report": report,
        }
        rows = rows_in_blocks(table, config.evaluate)
        opened = f"{workspace.key}/{name}"
        with model_pool(
            "evaluate", _Generator, arguments, opened, config.evaluate, config
        ) as through:
            found = pa.concat_tables(ray_tables(through(rows)))
        found = found.sort_by([("task", "ascending"), ("row_id", "ascending")])
        predictions.append(found)
        seconds = time.monotonic() - started
        cells += [_cell(found, name, other, tasks[other], seconds) for other in tasks]
    with workspace.store.filesystem.open_output_stream(workspace.full_path(PREDICTIONS)) as sink:
        # A model before its first task has no blocks.
        pq.write_table(pa.concat_tables(predictions, promote_options="default"), sink)
    workspace.write_json(CELLS, {"cells": cells, "decoding": {"strategy": "greedy"}})
    stats = {f"{cell['model_after']}/{cell['task']}": cell["score"] for cell in cells}
    return StageOutcome(rows=table.num_rows * len(models), stats=stats)


def _with_task(table: pa.Table, task: str) -> pa.Table:
    return table.append_column("task", pa.array([task] * table.num_rows, pa.string()))


def _cell(
    predictions: pa.Table, model: str, task: str, settings: dict[str, Any], seconds: float
) -> dict[str, Any]:
    own = predictions.filter(column("task") == task)
    share = own.num_rows / predictions.num_rows
    selected: dict[str, Any] = {}
    if BLOCK in own.column_names:
        hits = own[BLOCK].to_pylist().count(task)
        selected = {"selection_accuracy": hits / own.num_rows}
    return selected | {
        "model_after": model.removeprefix("model."),
        "task": task,
        "metric": settings["metric"],
        "score": math.fsum(own["score"].to_pylist()) / own.num_rows,
        "rows": own.num_rows,
        "seconds": seconds * share,
    }


class _Generator:
    """An actor with one model and its tokenizer."""

    def __init__(
        self,
        *,
        model: ModelSource,
        model_after: str,
        tasks: dict[str, Any],
        report: Reporter,
        pool: PoolConfig,
    ) -> None:
        self._device = prepare_device(pool)
        self._model = model.load("sdpa").to(self._device)  # pyright: ignore
        self._tokenizer = load_tokenizer(model.folder(), trust_remote_code=model.trust_remote_code)
        self._model_after, self._tasks = model_after, tasks
        self._report = report.named(f"generator-{model_after}-{id(self)}")

    def __call__(self, table: pa.Table) -> pa.Table:
        # A batch may hold rows of two tasks; they have their own limits, so they go separately.
        names = list(dict.fromkeys(table["task"].to_pylist()))
        parts = [self._generate(table.filter(column("task") == name), name) for name in names]
        return pa.concat_tables(parts)

    def _with_prompts(self, rows: list[TokenizedRow], task: str) -> list[TokenizedRow]:
        found = addition_of(self._model)
        if not isinstance(found, Prompting):
            return rows
        # A task that is not learnt yet is asked with all prompts there are.
        own = self._tasks[task].get("prompts") == "task" and task in found.spec.tasks
        return found.spec.before(rows, found.vocab_size, task if own else None)

    def _generate(self, table: pa.Table, task: str) -> pa.Table:
        rows, settings = self._with_prompts(rows_of(table), task), self._tasks[task]
        pad_id = pad_id_of(self._tokenizer)
        generated = generate_greedy(
            self._model,
            collate_prompts(rows, pad_id).to(self._device),
            settings["max_new_tokens"],
            eos_id_of(self._tokenizer),
            pad_id,
        )
        blocks = self._blocks(rows)
        metric = METRICS[settings["metric"]]
        texts = [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated]
        self._report.add_rows(len(rows))
        found = pa.table(
            {
                "model_after": [self._model_after] * len(rows),
                "task": [task] * len(rows),
                "row_id": [row.row_id for row in rows],
                "prediction": texts,
                "references": [list(row.references) for row in rows],
                "score": [
                    metric(text, row.references, row.input)
                    for text, row in zip(texts, rows, strict=True)
                ],
            },
            schema=PREDICTION_SCHEMA,
        )
        return found if blocks is None else found.append_column(BLOCK, pa.array(blocks))

    def _blocks(self, rows: Sequence[TokenizedRow]) -> list[str] | None:
        """Return the task whose block each row gives most to, None for a model without blocks."""
        found = addition_of(self._model)
        if not isinstance(found, Attending):
            return None
        weights_BS = weights_of(self._model, collate(rows, pad_id=0).to(self._device))
        return [found.spec.tasks[index] for index in weights_BS.argmax(dim=-1).tolist()]
