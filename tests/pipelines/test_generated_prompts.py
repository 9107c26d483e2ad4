"""Pseudo prompts in a stream: what is stored, what they look like, that they are drawn the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from pipelines.generate import Writer
from pipelines.graph import build_graph
from pipelines.load import load_config
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource
from pipelines.report import render_report
from pipelines.rowsets import REPLAY, TRAIN, kind_folder, load_rows_table, load_table, rows_of
from pipelines.stage import Stage
from pipelines.stream import finished_view, open_stream
from pipelines.survey import survey
from pipelines.teach import TARGETS
from seekr.errors import ConfigError, SeekrError
from seekr.models import load_tokenizer
from seekr.prompts import TokenizedRow
from seekr.teacher_store import decode_target
from tests.pipelines.running import Find, run_to_end
from tests.pipelines.streams import MAX_LENGTH, NUM_TRAIN, RULES, make_stream

FIRST, SECOND = list(RULES)[:2]
# A model that has learnt something: under frozen random embeddings nothing is ever likely.
MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
GENERATED = (
    "method={name: sapt, rank: 2, query_width: 4}",
    "replay.generator={epochs: 8, batch_size: 4, learning_rate: 5.0e-3, lora: {rank: 8}}",
    "data.template='say {input}='",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("stream"), model={"path": str(MODEL)})


def graph(path: Path, *overrides: str) -> dict[str, Stage]:
    config = load_config(path, overrides)
    return {str(stage): stage for stage in build_graph(config, survey(config))}


def test_a_generator_stands_where_rows_were_kept(path: Path) -> None:
    found = graph(path, *GENERATED)
    kinds = {stage.name for stage in found.values()}
    assert kinds == {"ingest", "generate", "train", "teach", "evaluate"}
    assert {name: str(s) for name, s in found[f"generate/{FIRST}"].inputs.items()} == {
        "data": f"ingest/{FIRST}"
    }
    assert str(found[f"teach/{FIRST}"].inputs["replay"]) == f"generate/{FIRST}"
    assert str(found[f"train/{SECOND}"].inputs[f"replay.{FIRST}"]) == f"generate/{FIRST}"
    # A task is learnt without any row of another one.
    assert [name for name in found[f"train/{SECOND}"].inputs if name.startswith("data")] == [
        f"data.{SECOND}"
    ]


@pytest.mark.parametrize(
    "change",
    [
        "replay.generator.epochs=3",
        "replay.generator.temperature=0.5",
        "replay.generator.lora={rank: 2}",
        "replay.ratio=0.2",
        "seed=1",
    ],
)
def test_what_decides_the_prompts_is_in_their_fingerprint(path: Path, change: str) -> None:
    ours, other = graph(path, *GENERATED), graph(path, *GENERATED, change)
    moved = {name for name in ours if ours[name].fingerprint != other[name].fingerprint}
    assert {f"generate/{FIRST}", f"teach/{FIRST}", f"train/{SECOND}"} <= moved
    assert (f"train/{FIRST}" in moved) == (change == "seed=1")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["method={name: replay}"], "method replay does not replay prompts alone"),
        (["method={name: seqft}"], "method seqft does not replay prompts alone"),
        (["replay.sampling=surprise_before"], "replay.sampling is surprise_before"),
        (["replay.generator.temperature=0"], "replay.generator.temperature"),
    ],
)
def test_what_does_not_go_with_a_generator_is_refused_at_start(
    path: Path, changes: list[str], told: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        open_stream(path, [*GENERATED, *changes])
    assert told in str(refused.value)


@pytest.fixture(scope="module")
def ran(path: Path) -> Find:
    return run_to_end(path, *GENERATED)


def prompts(rows: list[TokenizedRow]) -> list[list[int]]:
    return [row.input_ids[: row.prompt_length].tolist() for row in rows]


def written(found: Find, task: str) -> list[TokenizedRow]:
    return rows_of(load_rows_table(found(f"generate/{task}"), REPLAY))


@pytest.mark.ray
@pytest.mark.parametrize("task", [FIRST, SECOND])
def test_prompts_have_the_tasks_template_and_are_distinct(ran: Find, task: str) -> None:
    rows = written(ran, task)
    assert len(rows) == NUM_TRAIN // 10
    tokenizer = load_tokenizer(MODEL)
    texts = [str(tokenizer.decode(ids)) for ids in prompts(rows)]
    assert len(set(texts)) == len(texts)
    for row, text in zip(rows, texts, strict=True):
        assert text == f"say {row.input}=" and row.input.strip()
        assert row.references == () and row.input_ids[row.prompt_length :].tolist() == [1]
        assert row.prompt_length <= MAX_LENGTH - 8
    stored = prompts(rows_of(load_rows_table(ran(f"ingest/{task}"), kind_folder(TRAIN))))
    same = [ids for ids in prompts(rows) if ids in stored]
    stats = ran(f"generate/{task}").record.stats
    assert stats["verbatim"] == len(same) and stats["drawn"] >= len(rows)


@pytest.mark.ray
def test_the_generated_prompts_are_what_is_recorded_and_reflected(ran: Find) -> None:
    targets = load_table(ran(f"teach/{FIRST}"), TARGETS)
    rows = written(ran, FIRST)
    assert targets["row_id"].to_pylist() == [row.row_id for row in rows]
    for row, data in zip(rows, targets["target"].to_pylist(), strict=True):
        target = decode_target(data)
        assert target.length == len(row.input_ids)
        assert target.weights is not None and target.weights.tolist() == [1.0]
    steps = ran(f"train/{SECOND}").read_json("history.json")["steps"]
    assert all(step["reflection"] > 0 and step["selection"] > 0 for step in steps)


class Unheard:
    """A reporter of a stage that runs nowhere."""

    def named(self, _: str) -> Unheard:
        return self

    def post(self, **_: Any) -> None: ...

    def add_rows(self, _: int) -> None: ...


@pytest.mark.ray
def test_the_same_prompts_are_written_again_however_many_are_drawn_at_a_time(
    ran: Find, path: Path
) -> None:
    config = load_config(path, GENERATED)
    stage = graph(path, *GENERATED)[f"generate/{FIRST}"]
    source = ModelSource(artifact=None, base=MODEL, trust_remote_code=False, dtype="float32")
    again = Writer(
        model=source,
        task=FIRST,
        settings=dict(stage.config),
        rows=load_rows_table(ran(f"ingest/{FIRST}"), kind_folder(TRAIN)),
        report=cast(Reporter, Unheard()),
        pool=config.teach.model_copy(update={"batch_size": 3}),
    )
    found = rows_of(again(pa.table({"size": [NUM_TRAIN // 10]})).sort_by("row_id"))
    one = written(ran, FIRST)
    assert [row.row_id for row in one] == [row.row_id for row in found]
    assert prompts(one) == prompts(found)


@pytest.mark.ray
def test_the_report_counts_generated_prompts_as_what_is_kept(ran: Find, path: Path) -> None:
    view = finished_view(open_stream(path, GENERATED))
    assert [(size.task, size.rows) for size in view.replay()] == [
        (task, NUM_TRAIN // 10) for task in (FIRST, SECOND)
    ]
    assert "generate" in render_report([view])


@pytest.mark.ray
def test_a_generator_that_writes_nothing_of_use_ends_the_run(path: Path) -> None:
    hot = "replay.generator={epochs: 1, learning_rate: 1.0e-9, temperature: 9}"
    with pytest.raises(SeekrError, match=r"generator of task .* wrote 40 prompts, of which \d are"):
        run_to_end(path, *GENERATED, hot)
