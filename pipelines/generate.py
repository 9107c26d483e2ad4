"""Generate: a task's pseudo prompts, from a generator that has learnt how its prompts read.

The generator is the base model under low-rank adapters of its own. It is trained on the prompts of the
task's rows, never on answers, by the loop that trains everything else, and writes the prompts that are
replayed in place of kept rows; then it is let go. All happens in one actor: a stage that was interrupted
begins anew.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from pipelines.config import StreamConfig
from pipelines.hosts import model_pool
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, ray_tables, rows_in_blocks
from pipelines.pool_config import PoolConfig
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
from seekr.errors import SeekrError
from seekr.methods.seqft import SeqFT
from seekr.models import load_tokenizer
from seekr.prompt_generator import PromptForm, write_prompts
from seekr.prompts import Template, TokenizedRow, eos_id_of, pad_id_of
from seekr.sampling import replay_size
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
    size = replay_size(table.num_rows, settings["ratio"], settings["rows"])
    pool = config.teach.model_copy(update={"actors": 1})
    arguments = {
        "model": ModelSource.of(workspace, config, "model"),
        "task": task,
        "settings": dict(settings),
        "rows": table,
        "report": report,
    }
    kept: dict[str, dict[str, Any]] = {}
    drawn = 0
    with model_pool(_Writer, arguments, workspace.key, pool, config) as through:
        while len(kept) < size:
            if drawn >= _MOST_DRAWS * size:
                raise SeekrError(_too_few(task, len(kept), size, drawn))
            draws = pa.table({"draw": range(drawn, drawn + size)})
            blocks = ray_tables(through(rows_in_blocks(draws, pool)))
            found = pa.concat_tables(
                [WRITTEN_SCHEMA.empty_table(), *blocks]
            )  # Ray drops empty ones
            for record in found.sort_by("draw").to_pylist():
                kept.setdefault(record["row_id"], record)
            drawn += size
    chosen = sorted(kept.values(), key=lambda record: record["draw"])[:size]
    rows = pa.Table.from_pylist(chosen, schema=WRITTEN_SCHEMA).select(ROW_SCHEMA.names)
    write_table(rows, workspace, REPLAY)
    own = {tuple(row.input_ids[: row.prompt_length]) for row in rows_of(table)}
    same = sum(tuple(row.input_ids[: row.prompt_length]) in own for row in rows_of(rows))
    # Of the draws that were needed, whatever was drawn at a time.
    stats = {"drawn": 1 + chosen[-1]["draw"], "verbatim": same, "learnt_from": table.num_rows}
    return StageOutcome(rows=size, stats=stats, seeds={"generate": settings["seed"]})


def _too_few(task: str, kept: int, size: int, drawn: int) -> str:
    return (
        f"the generator of task {task} wrote {drawn} prompts, of which {kept} are distinct and of the "
        f"template's form; {size} are needed: train it longer (replay.generator.epochs or "
        "learning_rate), raise replay.generator.temperature if they are too much alike, or lower "
        "replay.ratio or replay.rows"
    )


class _Writer:
    """An actor with one generator, which it trains when it is made."""

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
        folder, device = model.folder(), prepare_device(pool)
        self._tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
        self._form = PromptForm.of(Template.parse(settings["template"]), self._tokenizer)
        self._settings, self._draw = settings, f"{settings['seed']}/{task}"
        self._report = report.named(f"writer-{id(self)}")
        origin = Origin(folder=folder, trust_remote_code=model.trust_remote_code)
        lessons = [self._form.lesson(row) for row in rows_of(rows)]
        self._model: Any = self._trained(origin, task, lessons, pool, device)

    def _trained(
        self,
        origin: Origin,
        task: str,
        lessons: list[TokenizedRow],
        pool: PoolConfig,
        device: torch.device,
    ) -> Any:
        recipe = Recipe.of(self._settings, f"{task}/prompts")
        execution = Execution(micro_batch_size=pool.batch_size)
        strategy = Plain(origin, recipe, execution, device)
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
            device,
            pad_id_of(self._tokenizer),
            Workers(),
        )
        for step in range(training.num_steps):
            entry = training.step(step)
            self._report.post(steps_done=step + 1, steps=training.num_steps, loss=entry["loss"])
        return strategy.model.eval()

    def __call__(self, table: pa.Table) -> pa.Table:
        draws: list[int] = table["draw"].to_pylist()
        given = self._form.given
        found = write_prompts(
            self._model,
            given,
            [f"{self._draw}/{draw}" for draw in draws],
            temperature=self._settings["temperature"],
            # The EOS that ends a prompt is not of it.
            max_new_tokens=self._settings["prompt_length"] - len(self._form.opening) + 1,
            eos_id=eos_id_of(self._tokenizer),
        )
        records: list[dict[str, Any]] = []
        for draw, written in zip(draws, found, strict=True):
            row = None if written is None else self._form.row(written)
            if row is not None:
                records.append(row.to_record() | {"draw": draw})
        self._report.add_rows(len(draws))
        return pa.Table.from_pylist(records, schema=WRITTEN_SCHEMA)
