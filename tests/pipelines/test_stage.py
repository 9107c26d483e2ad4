"""A stage is computed once and committed whole, whoever else runs and whatever dies."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pipelines.lease import Lease
from pipelines.provenance import Provenance
from pipelines.stage import (
    Artifact,
    Stage,
    StageEvent,
    StageOutcome,
    StageRecord,
    Workspace,
    find,
    run_stage,
    state,
    verify,
)
from pipelines.store import Store
from seekr.errors import ConfigError, LeaseLost, StoreError
from tests.pipelines.s3_server import S3Server, s3_server

ROOT = Path(__file__).parents[2]

# Runs one stage from another process. Each computation leaves a line in a log outside the store,
# and takes `seconds`, or if that is negative until somebody else waits for it.
RUNNER = """
import sys, time
from pathlib import Path
from pipelines.stage import Stage, StageOutcome, run_stage
from pipelines.store import Store
uri, log, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])

def claims(workspace):
    return sum("claim-" in file.path for file in workspace.store.list(workspace.key))

def compute(workspace):
    with log.open("a") as stream:
        stream.write("computed\\n")
    workspace.write_json("checkpoints/step.json", {"step": 7})
    workspace.write_json("half.json", {})
    print("computing", flush=True)
    while seconds < 0 and claims(workspace) < 2:
        time.sleep(0.1)
    time.sleep(abs(seconds))
    workspace.write_json("result.json", {"x": 1})
    return StageOutcome()

events = []
run_stage(Store.open(uri, writable=False), Stage(name="train", task="news", config={"lr": 0.1}),
          compute, on_event=lambda event: events.append(event.kind))
print(*events, flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "root")


@pytest.fixture(params=["disk", "s3"])
def any_store(request: pytest.FixtureRequest, store: Store) -> Store:
    if request.param == "disk":
        return store
    server: S3Server = request.getfixturevalue("server")
    return Store.open(server.uri(f"stage/{uuid4().hex}"))


TRAIN = Stage(name="train", task="news", config={"lr": 0.1})


def number(value: int) -> Callable[[Workspace], StageOutcome]:
    """A computation that writes one JSON file, and adds the numbers of its inputs."""

    def compute(workspace: Workspace) -> StageOutcome:
        total = value + sum(a.read_json("n.json")["n"] for a in workspace.inputs.values())
        workspace.write_json("n.json", {"n": total})
        return StageOutcome(rows=1, stats={"n": total}, seeds={"data": 3})

    return compute


def never(workspace: Workspace) -> StageOutcome:
    raise AssertionError("must not be computed")


class Kinds(list[str]):
    """Collects the kinds of events."""

    def __call__(self, event: StageEvent) -> None:
        self.append(event.kind)


def test_the_fingerprint_holds_what_decides_the_result_and_nothing_else() -> None:
    base = Stage(name="train", task="t", config={"a": 1, "b": 2.0}, sources={"model": "d1"})
    data = Stage(name="ingest", task="t")
    assert base == Stage(name="train", task="t", config={"b": 2.0, "a": 1}, sources={"model": "d1"})
    assert base.key == f"train/t/{base.fingerprint}" and len(base.fingerprint) == 20
    others = [
        Stage(name="teach", task="t", config={"a": 1, "b": 2.0}, sources={"model": "d1"}),
        Stage(name="train", task="u", config={"a": 1, "b": 2.0}, sources={"model": "d1"}),
        Stage(name="train", task="t", config={"a": 1, "b": 2.5}, sources={"model": "d1"}),
        Stage(name="train", task="t", config={"a": 1, "b": 2.0}, sources={"model": "d2"}),
        Stage(
            name="train", task="t", config={"a": 1, "b": 2.0}, sources={"model": "d1"}, version=2
        ),
        Stage(
            name="train",
            task="t",
            config={"a": 1, "b": 2.0},
            sources={"model": "d1"},
            inputs={"data": data},
        ),
    ]
    assert len({stage.fingerprint for stage in [base, *others]}) == 7


def test_a_change_far_upstream_changes_everything_downstream_and_only_that() -> None:
    def chain(rate: float) -> list[Stage]:
        first = Stage(name="ingest", task="a")
        second = Stage(name="train", task="a", inputs={"data": first}, config={"lr": rate})
        return [first, second, Stage(name="evaluate", task="a", inputs={"model": second})]

    same = [old == new for old, new in zip(chain(0.1), chain(0.2), strict=True)]
    assert same == [True, False, False]


def test_later_changes_to_a_config_do_not_reach_a_stage() -> None:
    config = {"heads": [1]}
    stage = Stage(name="train", task="t", config=config)
    config["heads"].append(2)
    assert stage.payload["config"] == {"heads": [1]}


@pytest.mark.parametrize("task", ["", "a/b", ".hidden", "..", "a\\b"])
def test_names_that_cannot_be_folders_are_refused(task: str) -> None:
    with pytest.raises(ConfigError, match="becomes a folder name"):
        Stage(name="train", task=task)


def test_a_stage_is_computed_once_and_its_record_says_everything(any_store: Store) -> None:
    data = Stage(name="ingest", task="news", version=3, sources={"file": "ab"})
    stage = Stage(name="train", task="news", config={"lr": 0.1}, inputs={"data": data})
    circumstances = Provenance(
        host="h", user="u", argv=("seekr", "run"), git_commit="c0ffee", versions={"torch": "2"}
    )
    kinds = Kinds()
    assert find(any_store, stage) is None and state(any_store, stage) == "missing"
    run_stage(any_store, data, number(4), on_event=kinds)
    record = run_stage(
        any_store, stage, number(1), on_event=kinds, provenance=circumstances, verify="digests"
    )
    again = run_stage(any_store, stage, never, on_event=kinds)
    assert kinds == ["started", "finished", "started", "finished", "reused"]
    assert again == record == find(any_store, stage)
    assert state(any_store, stage) == "reused"

    content = b'{\n "n": 5\n}\n'
    raw = any_store.read_json(f"{stage.key}/record.json")
    assert raw["outputs"] == [
        {"path": "n.json", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ]
    assert raw["inputs"] == {
        "data": {"stage": "ingest", "task": "news", "fingerprint": data.fingerprint}
    }
    assert raw["payload"] == {
        "stage": "train",
        "version": 1,
        "task": "news",
        "config": {"lr": 0.1},
        "inputs": {"data": data.fingerprint},
        "sources": {},
    }
    assert (raw["stage"], raw["task"], raw["fingerprint"]) == ("train", "news", stage.fingerprint)
    assert (raw["rows"], raw["stats"], raw["seeds"]) == (1, {"n": 5}, {"data": 3})
    assert (raw["host"], raw["user"], raw["git_commit"]) == ("h", "u", "c0ffee")
    assert (raw["argv"], raw["versions"]) == (["seekr", "run"], {"torch": "2"})
    assert raw["attempts"] == 1 and isinstance(raw["peak_memory_bytes"], int)
    assert raw["started_at"] <= raw["finished_at"] and raw["started_at"].endswith("+00:00")
    assert [f.path for f in any_store.list(stage.key)] == [
        f"{stage.key}/n.json",
        f"{stage.key}/record.json",
    ]


def test_checkpoints_and_scratch_are_no_outputs(any_store: Store, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"w" * 100)

    def compute(workspace: Workspace) -> StageOutcome:
        workspace.write_json("checkpoints/1.json", {})
        workspace.write_json("scratch/part.json", {})
        workspace.upload(tmp_path / "weights.bin", "model/weights.bin")
        with workspace.folder("model/tokenizer") as folder:
            (folder / "vocab.txt").write_text("a b")
        return StageOutcome()

    record = run_stage(any_store, TRAIN, compute)
    assert [output.path for output in record.outputs] == [
        "model/tokenizer/vocab.txt",
        "model/weights.bin",
    ]
    verify(any_store, record, "digests")
    assert any_store.list(f"{TRAIN.key}/scratch") == []
    artifact = Artifact(store=any_store, record=record)
    assert (artifact.local("model") / "tokenizer" / "vocab.txt").read_text() == "a b"
    assert artifact.local("model/weights.bin").read_bytes() == b"w" * 100
    with pytest.raises(StoreError, match=r"no output 'mod'\. There are: model/tokenizer"):
        artifact.local("mod")


def test_a_failed_stage_says_so_and_a_later_success_forgets_it(any_store: Store) -> None:
    def fail(workspace: Workspace) -> StageOutcome:
        workspace.write_json("half.json", {})
        workspace.write_json("checkpoints/a.json", {"step": workspace.attempt})
        raise ValueError("no memory for s3://AK:hunter22@bucket")

    kinds = Kinds()
    for _ in range(2):
        with pytest.raises(ValueError, match="no memory"):
            run_stage(any_store, TRAIN, fail, on_event=kinds)
    assert state(any_store, TRAIN) == "failed"
    failure = any_store.read_json(f"{TRAIN.key}/failure.json")
    assert failure.pop("time")
    assert failure == {
        "error": "ValueError",
        "message": "no memory for s3://***@bucket",
        "attempt": 2,
    }

    def succeed(workspace: Workspace) -> StageOutcome:
        assert workspace.resumed and workspace.attempt == 3
        assert any_store.read_json(workspace.path("checkpoints/a.json")) == {"step": 2}
        assert not any_store.exists(workspace.path("half.json"))
        return number(1)(workspace)

    record = run_stage(any_store, TRAIN, succeed, on_event=kinds)
    assert kinds == ["started", "failed", "resumed", "failed", "resumed", "finished"]
    assert record.attempts == 3
    assert [output.path for output in record.outputs] == ["n.json"]
    assert not any_store.exists(f"{TRAIN.key}/failure.json")


def test_an_interrupt_is_no_failure(store: Store) -> None:
    def interrupt(workspace: Workspace) -> StageOutcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(store, TRAIN, interrupt)
    assert state(store, TRAIN) == "interrupted"
    assert run_stage(store, TRAIN, number(1)).attempts == 2


def start(store: Store, log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUNNER, store.location.uri, str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_runs_at_once_compute_a_stage_once(any_store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    running = [start(any_store, log, seconds=-0.3) for _ in range(2)]
    outputs = sorted(process.communicate(timeout=60)[0] for process in running)
    assert log.read_text() == "computed\n"
    assert outputs == ["computing\nstarted finished\n", "waiting reused\n"]
    record = find(any_store, TRAIN)
    assert record is not None and record.attempts == 1


def test_a_killed_run_is_repeated_with_the_same_result_and_nothing_else_is(
    any_store: Store, tmp_path: Path
) -> None:
    data = Stage(name="ingest", task="news")
    finished = run_stage(any_store, data, number(4))
    process = start(any_store, tmp_path / "log", seconds=60)
    assert read_line(process) == "computing"
    assert state(any_store, TRAIN) == "running"
    process.kill()
    process.wait()
    assert state(any_store, TRAIN) == "interrupted"
    assert any_store.exists(f"{TRAIN.key}/half.json")

    kinds = Kinds()
    began = time.monotonic()

    def compute(workspace: Workspace) -> StageOutcome:
        assert time.monotonic() - began < 5  # did not wait for the dead run's time to live
        step = any_store.read_json(workspace.path("checkpoints/step.json"))
        workspace.write_json("result.json", {"x": 1})
        return StageOutcome(stats=step)

    record = run_stage(any_store, TRAIN, compute, on_event=kinds)
    assert kinds == ["resumed", "finished"]
    assert (record.attempts, record.stats) == (2, {"step": 7})
    assert [output.path for output in record.outputs] == ["result.json"]
    assert run_stage(any_store, data, never) == finished


def test_a_run_that_lost_its_lease_commits_nothing(store: Store) -> None:
    def compute(workspace: Workspace) -> StageOutcome:
        for file in store.list(f"{workspace.key}/.lease"):
            if "claim-" in file.path:
                store.remove(file.path)
        return number(1)(workspace)

    with pytest.raises(LeaseLost, match="Nothing was committed"):
        run_stage(store, TRAIN, compute)
    assert find(store, TRAIN) is None
    assert not store.exists(f"{TRAIN.key}/failure.json")


def test_a_result_that_appears_while_waiting_is_used(store: Store) -> None:
    other = Stage(name="other", task="news", config={"lr": 0.1})
    kinds = Kinds()

    def commit(event: StageEvent) -> None:
        kinds(event)
        if event.kind == "waiting":
            run = run_stage(store, other, number(1))
            raw = json.loads(store.read_bytes(f"{run.key}/record.json"))
            raw |= {"stage": "train", "fingerprint": TRAIN.fingerprint, "payload": TRAIN.payload}
            store.write_bytes(f"{TRAIN.key}/n.json", store.read_bytes(f"{run.key}/n.json"))
            store.write_json(f"{TRAIN.key}/record.json", raw)
            holding.__exit__(None, None, None)

    holding = Lease(store, TRAIN.key).__enter__()
    run_stage(store, TRAIN, never, on_event=commit)
    assert kinds == ["waiting", "reused"]


def test_a_missing_input_is_named(store: Store) -> None:
    data = Stage(name="ingest", task="news")
    stage = Stage(name="train", task="news", inputs={"data": data})
    with pytest.raises(
        StoreError, match=r"train/news: its input 'data' is not in the store.*Run in"
    ):
        run_stage(store, stage, never)


def damage(store: Store, path: str, how: str) -> None:
    data = store.read_bytes(path)
    match how:
        case "removed":
            store.remove(path)
        case "cut":
            store.write_bytes(path, data[:-2])
        case "flipped":
            store.write_bytes(path, bytes([data[0] ^ 1]) + data[1:])


@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_reused_stage_whose_output_is_gone_or_short_is_refused(store: Store, how: str) -> None:
    record = run_stage(store, TRAIN, number(1))
    damage(store, f"{TRAIN.key}/n.json", how)
    with pytest.raises(StoreError) as caught:
        run_stage(store, TRAIN, never)
    found = "no such file" if how == "removed" else "10 bytes"
    assert f"{TRAIN.key}/n.json: expected 12 bytes, found {found}" in str(caught.value)
    assert f"Remove the folder {store.uri_for(record.key)} and run again" in str(caught.value)
    store.remove(record.key)
    assert run_stage(store, TRAIN, number(1)).outputs == record.outputs


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_input_stops_a_stage_before_it_computes(any_store: Store, how: str) -> None:
    data = Stage(name="ingest", task="news")
    stage = Stage(name="train", task="news", inputs={"data": data})
    run_stage(any_store, data, number(1))
    damage(any_store, f"{data.key}/n.json", how)
    with pytest.raises(StoreError, match=rf"{data.key}/n.json: expected .* found"):
        run_stage(any_store, stage, never)
    assert state(any_store, stage) == "missing"


def test_a_flipped_byte_of_a_reused_stage_is_found_by_digests_only(store: Store) -> None:
    record = run_stage(store, TRAIN, number(1))
    damage(store, f"{TRAIN.key}/n.json", "flipped")
    verify(store, record, "sizes")
    with pytest.raises(StoreError, match=r"expected sha256 \w{64}, found sha256 \w{64}"):
        verify(store, record, "digests")


def test_digests_are_read_once_per_process(store: Store) -> None:
    record = run_stage(store, TRAIN, number(1))
    verify(store, record, "digests")
    damage(store, f"{TRAIN.key}/n.json", "flipped")
    verify(store, record, "digests")
    with pytest.raises(StoreError, match="sha256"):
        verify(Store.open(store.location.uri), record, "digests")


def edited(**changes: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda raw: json.dumps(raw | changes).encode()


@pytest.mark.parametrize(
    ("rewrite", "says"),
    [
        (lambda raw: json.dumps(raw).encode()[:100], "not JSON"),
        (lambda raw: b"", "not JSON"),
        (lambda raw: b"[1, 2]", "found list"),
        (
            lambda raw: json.dumps({k: v for k, v in raw.items() if k != "rows"}).encode(),
            "expected",
        ),
        (edited(invented=1), "another version of seekr"),
        (edited(outputs=[{"path": "x"}]), "is not a stage record"),
        (edited(inputs=[1]), "is not a stage record"),
        (edited(task="sport"), "belongs to train/sport/"),
        (edited(payload={"lr": 0.2}), "does not hash to its fingerprint"),
    ],
)
def test_a_damaged_record_is_refused_with_its_path_and_a_remedy(
    store: Store, rewrite: Callable[[dict[str, Any]], bytes], says: str
) -> None:
    run_stage(store, TRAIN, number(1))
    path = f"{TRAIN.key}/record.json"
    store.write_bytes(path, rewrite(store.read_json(path)))
    for verb in (find, state):
        with pytest.raises(StoreError) as caught:
            verb(store, TRAIN)
        assert str(caught.value).startswith(store.uri_for(path))
        assert says in str(caught.value) and "Remove the folder" in str(caught.value)


def test_a_record_survives_saving_and_loading(store: Store) -> None:
    record = run_stage(store, TRAIN, number(1))
    assert StageRecord.load(store, TRAIN.key) == record
    with pytest.raises(StoreError, match="there is no such file"):
        StageRecord.load(store, "train/news/0000")


def test_a_diverged_loss_does_not_cost_the_commit(store: Store) -> None:
    stats = {"loss": float("nan"), "curve": (1.0, float("inf")), "steps": 3}
    record = run_stage(store, TRAIN, lambda workspace: StageOutcome(stats=stats))
    assert record.stats == {"loss": "nan", "curve": [1.0, "inf"], "steps": 3}
    assert StageRecord.load(store, TRAIN.key) == record


def test_an_upload_that_is_lost_before_the_commit_is_an_error(store: Store, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"12345")

    def compute(workspace: Workspace) -> StageOutcome:
        workspace.upload(tmp_path / "w")
        os.truncate(workspace.full_path("w"), 2)
        return StageOutcome()

    def lose(workspace: Workspace) -> StageOutcome:
        workspace.upload(tmp_path / "w")
        store.remove(workspace.path("w"))
        return StageOutcome()

    with pytest.raises(StoreError, match="written with 5 bytes, the store has 2"):
        run_stage(store, TRAIN, compute)
    with pytest.raises(StoreError, match="was written and is gone"):
        run_stage(store, TRAIN, lose)
    assert find(store, TRAIN) is None
