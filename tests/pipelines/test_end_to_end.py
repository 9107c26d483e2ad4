"""A whole SEEKR stream on a real local Ray, and what must not change its results."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.numpy import load_file

from pipelines.job import Job
from pipelines.monitor import start_monitor
from pipelines.provenance import Provenance
from pipelines.rowsets import REPLAY, load_table
from pipelines.runner import run_stages
from pipelines.session import ray_session
from pipelines.stage import Artifact, Stage, find
from pipelines.stream import Stream, open_stream, records_of, run_streams, status_of
from tests.pipelines.running import end_shared_cluster
from tests.pipelines.streams import make_stream, task_rows, write_rows

pytestmark = pytest.mark.ray
TASKS = ("upper", "reverse")


@pytest.fixture(scope="module")
def stream_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("stream"), data={"metric": "exact_match"})


@pytest.fixture(scope="module", autouse=True)
def cluster(stream_path: Path) -> Iterator[None]:
    end_shared_cluster()
    config = open_stream(stream_path, ["train.workers=2"]).config
    with ray_session([config]):
        yield
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def finished(stream_path: Path, cluster: None) -> Stream:
    stream = open_stream(stream_path, writable=True)
    run_streams([stream], lambda *_: None, warn=pytest.fail)
    return stream


def run_only(stream: Stream, stages: Sequence[Stage]) -> None:
    """Run some of a stream's stages, whose inputs are among them or in the store."""
    needed = [s for s in stream.stages if s in stages or find(stream.store, s) is not None]
    jobs = [Job(stage=stage, config=stream.config) for stage in needed]
    for _ in run_stages(stream.store, jobs, start_monitor(), Provenance.capture(), 2):
        pass


def weights(stream: Stream, task: str) -> dict[str, Any]:
    stage = next(s for s in stream.stages if s.name == "train" and s.task == task)
    record = find(stream.store, stage)
    assert record is not None
    return load_file(Artifact(store=stream.store, record=record).local("model/model.safetensors"))


def test_every_stage_is_recorded_with_rows_digests_and_its_inputs(finished: Stream) -> None:
    records = records_of(finished)
    assert list(records) == list(finished.stages)
    for stage, record in records.items():
        assert record.outputs and all(len(output.sha256) == 64 for output in record.outputs)
        assert {n: r.fingerprint for n, r in record.inputs.items()} == {
            name: other.fingerprint for name, other in stage.inputs.items()
        }
        assert record.rows and record.peak_memory_bytes is not None
    assert all(status.state == "ran" for status in status_of(finished))


def test_nothing_of_a_training_is_left_but_its_model_and_history(finished: Stream) -> None:
    for stage, record in records_of(finished).items():
        if stage.name == "train":
            names = {output.path.split("/")[0] for output in record.outputs}
            assert names == {"model", "history.json"}
            assert not [f for f in finished.store.list(stage.key) if "checkpoints" in f.path]


def test_the_second_task_is_trained_with_all_four_parts_of_the_loss(finished: Stream) -> None:
    stage = next(s for s in finished.stages if str(s) == "train/reverse")
    steps = finished.store.read_json(f"{stage.key}/history.json")["steps"]
    weight = finished.config.method.model_dump()
    for step in steps:
        whole = step["task"] + weight["replay_weight"] * step["replay"]
        whole += (1 - weight["replay_weight"]) * step["logits"]
        whole += weight["attention_weight"] * step["attention"]
        assert step["loss"] == pytest.approx(whole, rel=1e-5)
    # The student starts as the teacher of its replay rows, so it has nothing to distil yet.
    assert steps[0]["logits"] == pytest.approx(0.0, abs=1e-6)
    assert steps[0]["attention"] == pytest.approx(0.0, abs=1e-6)
    assert steps[-1]["attention"] > 0


def test_running_again_reuses_every_stage_in_seconds_and_touches_no_record(
    finished: Stream,
) -> None:
    root = Path(finished.store.full_path("x")).parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("record.json")}
    again = open_stream(finished.path, writable=True)
    events = []
    started = time.monotonic()
    run_streams([again], lambda event, _: events.append(event), warn=pytest.fail)
    assert time.monotonic() - started < 5.0
    assert {event.kind for event in events if event is not None} == {"reused"}
    assert {path: path.stat().st_mtime_ns for path in root.rglob("record.json")} == before


@pytest.mark.parametrize(
    ("override", "would_run"),
    [
        (
            "method.attention_weight=5",
            {"train/reverse", "score/reverse", "select/reverse", "evaluate/reverse"}
            | {"teach/reverse", "teach/upper--after--reverse"},
        ),
        ("train.workers=2", set()),
        ("train.strategy=fsdp", set()),
        ("evaluate.actors=3", set()),
        ("train.checkpoint_every=7", set()),
    ],
)
def test_a_changed_field_reruns_exactly_what_depends_on_it(
    finished: Stream, override: str, would_run: set[str]
) -> None:
    statuses = status_of(open_stream(finished.path, [override]))
    assert {f"{s.name}/{s.task}" for s in statuses if s.state == "missing"} == would_run


def test_an_appended_task_runs_only_its_own_stages(finished: Stream, tmp_path: Path) -> None:
    longer = make_stream(tmp_path, tasks=3, data={"metric": "exact_match"})
    storage = finished.config.storage
    statuses = status_of(open_stream(longer, [f"storage={storage}"]))
    missing = {status.task for status in statuses if status.state == "missing"}
    assert missing == {"first", "upper--after--first", "reverse--after--first"}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_workers_give_the_same_weights_within_rounding(
    finished: Stream, tmp_path: Path, strategy: str
) -> None:
    shutil.copytree(finished.config.storage, tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "train" / "reverse")
    changes = [f"storage={tmp_path / 'store'}", "train.workers=2", f"train.strategy={strategy}"]
    changes.append("train.micro_batch_size=3")
    other = open_stream(finished.path, changes, writable=True)
    run_only(other, [s for s in other.stages if str(s) == "train/reverse"])
    ours, theirs = weights(other, "reverse"), weights(finished, "reverse")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # AdamW divides by the gradient's size: rounding in the sum may move a weight by a
        # fraction of one update (1e-3), no more.
        assert value == pytest.approx(theirs[name], abs=2e-4), name


def test_the_replay_set_does_not_depend_on_files_or_blocks(tmp_path: Path) -> None:
    one = make_stream(tmp_path / "one", tasks=1)
    many = make_stream(tmp_path / "many", tasks=1, replay={"ratio": 0.25})
    rows = task_rows("upper", 50)[:40]
    folder = many.parent / "data" / "upper" / "parts"
    for part in range(5):
        write_rows(folder / f"{9 - part}.jsonl", rows[part::5] + rows[:2])
    changes = [f"tasks.0.train={folder}"]
    streams = [
        open_stream(one, ["replay.ratio=0.25"], writable=True),
        open_stream(many, changes, writable=True),
    ]
    drawn = []
    for stream in streams:
        run_only(stream, [s for s in stream.stages if s.name in ("ingest", "sample")])
        sample = next(s for s in stream.stages if s.name == "sample")
        record = find(stream.store, sample)
        assert record is not None and record.rows == 10
        drawn.append(load_table(Artifact(store=stream.store, record=record), REPLAY))
    assert drawn[0].select(["row_id", "input_ids"]) == drawn[1].select(["row_id", "input_ids"])


def test_bad_rows_are_quarantined_with_file_line_and_reason(tmp_path: Path) -> None:
    path = make_stream(tmp_path, tasks=1, data={"max_bad_share": 0.2})
    train = tmp_path / "data" / "upper" / "train.jsonl"
    with train.open("a") as file:
        file.write('{"input": "x", "output": ""}\n{"input": \n')
    stream = open_stream(path, writable=True)
    ingest = stream.stages[0]
    run_only(stream, [ingest])
    quarantine = json.loads(stream.store.read_bytes(f"{ingest.key}/quarantine.json"))
    assert [(Path(row["file"]).name, row["line"]) for row in quarantine] == [
        ("train.jsonl", 41),
        ("train.jsonl", 42),
    ]
    assert all(row["reason"] for row in quarantine)
    record = find(stream.store, ingest)
    assert record is not None and record.stats["quarantined"] == 2
    assert record.stats["train_rows"] == 40


def test_a_limit_on_rows_keeps_the_same_rows_whatever_the_order(tmp_path: Path) -> None:
    kept = []
    for name, step in (("forth", 1), ("back", -1)):
        path = make_stream(tmp_path / name, tasks=1, data={"train_rows": 12})
        write_rows(tmp_path / name / "data/upper/train.jsonl", task_rows("upper", 50)[:40][::step])
        stream = open_stream(path, writable=True)
        run_only(stream, [stream.stages[0]])
        record = find(stream.store, stream.stages[0])
        assert record is not None and record.stats["train_rows"] == 12
        table = load_table(Artifact(store=stream.store, record=record), "rows/kind=train")
        kept.append(table["row_id"].to_pylist())
    assert kept[0] == kept[1]
