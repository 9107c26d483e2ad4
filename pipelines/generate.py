"""Generate: a task's pseudo prompts, from a generator that has learnt how its prompts read.

The generator is the base model under low-rank adapters of its own. It is trained on the prompts of the
task's rows, never on answers, by the loop that trains everything else, and writes the prompts that are
replayed in place of kept rows; then it is let go. All happens in one actor: a stage that was interrupted
begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import ray.data

from pipelines.config import StreamConfig
from pipelines.hosts import model_pool
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, ray_tables
from pipelines.pool_config import PoolConfig
from pipelines.rowsets import (
    REPLAY,
    ROW_SCHEMA,
    TRAIN,
    kind_folder,
    load_rows_table,
    replayed,
    rows_of,
    write_table,
)
from pipelines.stage import StageOutcome
from pipelines.workspace import Workspace
from seekr.errors import SeekrError
from seekr.methods.seqft import SeqFT
from seekr.models import load_tokenizer
from seekr.prompt_generator import PromptForm, write_prompts
from seekr.prompts import Template, TokenizedRow, eos_id_of, pad_id_of
from seekr.training.build import Origin
from seekr.training.loop import Training, Workers
from seekr.training.microbatches import TrainingRows
from seekr.training.settings import Execution, Recipe
from seekr.training.strategy import Plain

WRITTEN_SCHEMA = pa.schema([*ROW_SCHEMA, pa.field("draw", pa.int64())])
# Draws per prompt that is wanted: a generator of which less can be used has not learnt the form.
_MOST_DRAWS = 10


def generate(
    workspace: Workspace, config: StreamConfig, task: str, report: Reporter
) -> StageOutcome:
    """Run the stage; writes replay/.

    Raises:
        SeekrError: too few of the prompts that the generator writes can be used.
    """
    settings = workspace.config
    table = load_rows_table(workspace.inputs["data"], kind_folder(TRAIN))
    size = replayed(workspace.inputs["data"], settings)
    report.post(force=True, rows_done=0, rows=size)
    arguments = {
        "model": ModelSource.of(workspace, config, "model"),
        "task": task,
        "settings": dict(settings),
        "rows": table,
        "report": report,
    }
    # One batch: a generator is trained for it and is gone with it.
    pool = config.teach.model_copy(update={"actors": 1})
    with model_pool("teach", Writer, arguments, workspace.key, pool, config) as through:
        found = ray_tables(through(ray.data.from_arrow(pa.table({"size": [size]}))))
    rows = pa.concat_tables([WRITTEN_SCHEMA.empty_table(), *found])  # Ray drops empty tables
    if rows.num_rows < size:
        raise SeekrError(_too_few(task, rows.num_rows, size))
    write_table(rows.select(ROW_SCHEMA.names), workspace, REPLAY)
    own = {tuple(row.input_ids[: row.prompt_length]) for row in rows_of(table)}
    same = sum(tuple(row.input_ids[: row.prompt_length]) in own for row in rows_of(rows))
    drawn = 1 + max(rows["draw"].to_pylist())
    stats = {"drawn": drawn, "verbatim": same, "learnt_from": table.num_rows}
    return StageOutcome(rows=size, stats=stats, seeds={"generate": settings["seed"]})


def _too_few(task: str, kept: int, size: int) -> str:
    return (
        f"the generator of task {task} wrote {_MOST_DRAWS * size} prompts, of which {kept} are "
        f"distinct and of the template's form; {size} are needed: train it longer "
        "(replay.generator.epochs or learning_rate), raise replay.generator.temperature if they are "
        "too much alike, or lower replay.ratio or replay.rows"
    )


class Writer:
    """An actor that trains a generator for every batch it is sent, and lets it write."""

    def __init__(
        self,
        *,
        model: ModelSource,
        task: str,
        settings: dict[str, Any],
        rows: pa.Table,
        report: Reporter,
        pool: PoolConfig,
    ) -> None:
        folder = model.folder()
        self._origin = Origin(folder=folder, trust_remote_code=model.trust_remote_code)
        self._tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
        self._form = PromptForm.of(Template.parse(settings["template"]), self._tokenizer)
        self._task, self._settings, self._rows = task, settings, rows_of(rows)
        self._device, self._batch_size = prepare_device(pool), pool.batch_size
        self._report = report.named(f"writer-{id(self)}")

    def __call__(self, table: pa.Table) -> pa.Table:
        (size,) = table["size"].to_pylist()
        model = self._trained()
        kept: dict[str, dict[str, Any]] = {}
        most = _MOST_DRAWS * size
        for first in range(0, most, self._batch_size):
            draws = range(first, min(first + self._batch_size, most))
            for draw, row in zip(draws, self._written(model, draws), strict=True):
                if row is not None and row.row_id not in kept and len(kept) < size:
                    kept[row.row_id] = row.to_record() | {"draw": draw}
                    self._report.add_rows(1)
            if len(kept) == size:
                break
        return pa.Table.from_pylist(list(kept.values()), schema=WRITTEN_SCHEMA)

    def _written(self, model: Any, draws: Iterable[int]) -> list[TokenizedRow | None]:
        settings, form = self._settings, self._form
        found = write_prompts(
            model,
            form.given,
            [f"{settings['seed']}/{self._task}/{draw}" for draw in draws],
            temperature=settings["temperature"],
            # The EOS that ends a prompt is not of it.
            max_new_tokens=settings["prompt_length"] - len(form.opening) + 1,
            eos_id=eos_id_of(self._tokenizer),
        )
        return [None if ids is None else form.row(ids) for ids in found]

    def _trained(self) -> Any:
        lessons = [self._form.lesson(row) for row in self._rows]
        recipe = Recipe.of(self._settings, f"{self._task}/prompts")
        # Passes as large as steps: in other passes rounding differs, and other prompts are drawn.
        execution = Execution(micro_batch_size=recipe.batch_size)
        strategy = Plain(self._origin, recipe, execution, self._device)
        training = Training(
            recipe,
            execution,
            SeqFT(),
            TrainingRows(
                task=lessons,
                task_ids=[row.row_id for row in lessons],
                replay=(),
                replay_ids=(),
                targets=None,
            ),
            strategy,
            self._device,
            pad_id_of(self._tokenizer),
            Workers(),
        )
        for step in range(training.num_steps):
            entry = training.step(step)
            self._report.post(steps_done=step + 1, steps=training.num_steps, loss=entry["loss"])
        return strategy.model.eval()
