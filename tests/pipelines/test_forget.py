"""Forgotten rows are in no byte of a store, whatever held them and whenever the command was killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import forget_plan, lease
from pipelines.artifact import Artifact, StageRecord, verify
from pipelines.find_rows import find_text
from pipelines.forget import forget, look_up
from pipelines.forgotten import (
    FOLDER,
    ForgottenRows,
    Request,
    mark_of,
    pending,
    require_settled,
)
from pipelines.lease import Lease
from pipelines.lineage import learnt_and_forgotten, walk
from pipelines.rowsets import ROW_SCHEMA
from pipelines.stage import Stage, StageOutcome, run_stage
from pipelines.store import Store
from pipelines.transfer import cache_folder
from seekr.errors import ConfigError, StoreError
from tests.pipelines.committed import Committer
from tests.pipelines.remembered import (
    NUM_TEST,
    NUM_TRAIN,
    QUARANTINED,
    QUARANTINED_ID,
    Row,
    borrowed_row,
    commit_ingest,
    commit_replay,
    commit_store,
    contents,
    leave_reports,
    leave_unfinished,
    parquet,
    rows_of,
    table_of,
    targets,
    traces,
)
from tests.pipelines.s3_server import S3Server, s3_server

LETTERS, NOTES = rows_of("letters"), rows_of("notes")
# Replayed, only trained on, tested on; and one whose text was borrowed.
GONE = (LETTERS[0], LETTERS[9], LETTERS[NUM_TRAIN], NOTES[1])
IDS = [row.row_id for row in GONE]
AT = "2026-11-23T10:15:00.000+00:00"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store.open(tmp_path / "store")
    running: S3Server = request.getfixturevalue("server")
    return Store.open(running.uri(tmp_path.name))


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else claims anything here, so nothing has to settle."""
    monkeypatch.setattr(lease, "SETTLE_LOCAL_SECONDS", 0.0)
    monkeypatch.setattr(lease, "SETTLE_REMOTE_SECONDS", 0.0)


def all_records(store: Store) -> dict[str, StageRecord]:
    keys = [f.path.rpartition("/")[0] for f in store.list_all() if f.path.endswith("/record.json")]
    return {key: StageRecord.load(store, key) for key in keys}


def test_nothing_of_a_forgotten_row_is_left_in_any_file(store: Store) -> None:
    done = commit_store(store)
    leave_unfinished(store, done)
    leave_reports(store, done)
    holding = {path.partition("/")[0] for path in traces(store, GONE)}
    every = {"ingest", "sample", "score", "teach", "borrow", "evaluate", "weights", "train"}
    assert holding == every | {"streams", "mlflow"}

    forget(store, IDS)

    assert traces(store, GONE) == []
    others = [row for row in (*LETTERS, *NOTES) if row not in GONE]
    assert all(traces(store, [row]) for row in others)


def test_the_files_of_every_artifact_are_what_its_record_says_afterwards(disk: Store) -> None:
    done = commit_store(disk)
    forget(disk, IDS)
    for name, result in done.items():
        record = StageRecord.load(disk, result.record.key)
        verify(Store(disk.location), record, "digests")
        before = {output.path: output for output in result.record.outputs}
        changed = {output.path for output in record.outputs if output != before[output.path]}
        replaced = {old.path: old for erasure in record.forgotten for old in erasure.replaced}
        assert {path: before[path] for path in changed} == replaced
        assert bool(changed) == bool(sum(e.rows for e in record.forgotten)), name
        assert record.payload == result.record.payload and record.inputs == result.record.inputs
        assert all(erasure.done for erasure in record.forgotten)


def test_what_is_not_about_the_rows_is_not_touched(disk: Store) -> None:
    done = commit_store(disk)
    leave_reports(disk, done)
    before = contents(disk)
    forget(disk, IDS)
    after = contents(disk)
    for path in before:
        if path.split("/")[1] == "other" or path.startswith("mlflow/artifacts/other/"):
            assert after[path] == before[path], path


def test_counts_follow_the_rows(disk: Store) -> None:
    done = commit_store(disk)
    forget(disk, [*IDS, QUARANTINED_ID])
    record = StageRecord.load(disk, done["ingest/letters"].record.key)
    assert record.rows == NUM_TRAIN + NUM_TEST - 3
    assert record.stats == {
        "train_rows": NUM_TRAIN - 2,
        "train_rows_forgotten": 2,
        "test_rows": NUM_TEST - 1,
        "test_rows_forgotten": 1,
        "test_rows_in_train": 0,
        "quarantined": 1,
        "bad_rows_forgotten": 1,
    }
    assert table_of(disk, record, "rows/kind=train").num_rows == NUM_TRAIN - 2
    assert QUARANTINED not in disk.read_bytes(f"{record.key}/quarantine.json").decode()


def test_a_model_is_marked_if_it_was_trained_on_a_row_and_so_are_those_that_grew_from_it(
    disk: Store,
) -> None:
    done = commit_store(disk)
    forget(disk, IDS)
    records = all_records(disk)
    learnt = {
        record.task: {mark for erasure in record.forgotten for mark in erasure.learnt}
        for record in records.values()
        if record.stage == "train"
    }
    trained, replayed, tested, borrowed = (mark_of(row_id) for row_id in IDS)
    (derived,) = the_request(disk).derived
    # A test row was not learnt; the second model saw what was replayed, and its own task's row twice.
    assert tested not in learnt["letters"] | learnt["notes"]
    assert learnt == {
        "letters": {trained, replayed},
        "notes": {trained, borrowed, derived},
        "other": set(),
    }
    key = done["train/other"].record.key
    rows = learnt_and_forgotten(disk, records[key])
    assert list(rows.values()) == [len(learnt["letters"] | learnt["notes"])]
    assert walk(list(records.values()), key.rpartition("/")[2]).forgotten() == rows


def the_request(store: Store) -> Request:
    (path,) = [file.path for file in store.list(FOLDER) if file.path.endswith(".json")]
    return Request.load(store, path)


def test_a_row_of_a_generator_that_says_a_forgotten_row_by_heart_goes_too(disk: Store) -> None:
    out = Committer(disk)
    data = commit_ingest(out, LETTERS, "letters")
    spelt = [
        LETTERS[0].record(row_id="0" * 32, references=[]),
        LETTERS[1].record(row_id="1" * 32, references=[], input="something else"),
        NOTES[0].record(row_id="2" * 32, references=[]),
    ]
    made = out.commit(
        "generate", "letters", inputs={"data": data}, rows=3,
        files={"replay/rows.parquet": parquet(spelt, ROW_SCHEMA)},
    )  # fmt: skip
    model = out.commit("train", "notes", inputs={"replay.letters": made}, rows=1)
    forget(disk, [LETTERS[0].row_id, LETTERS[1].row_id])
    record = StageRecord.load(disk, made.record.key)
    assert table_of(disk, record)["row_id"].to_pylist() == ["2" * 32]
    # The generator has learnt both rows, and the model has learnt from the generator.
    (erasure,) = StageRecord.load(disk, model.record.key).forgotten
    assert {mark_of(row.row_id) for row in LETTERS[:2]} <= set(erasure.learnt)


def test_an_instruction_that_only_a_forgotten_row_had_goes_with_the_rows_that_borrowed_it(
    disk: Store,
) -> None:
    out = Committer(disk)
    own, shared = "the file of patient 4711 says", "repeat"
    kept = [
        replace(LETTERS[0], definition=own),
        *(replace(r, definition=shared) for r in LETTERS[1:]),
    ]
    data, new = commit_ingest(out, kept, "letters"), commit_ingest(out, NOTES, "notes")
    replay = commit_replay(out, "letters", kept, data)

    def lent(row: Row, definition: str) -> dict[str, Any]:
        tokens = [3, 4, 5, *map(ord, definition), *row.tokens[3:-2], 8, 1]
        return borrowed_row(row, "letters") | {
            "input_ids": tokens,
            "prompt_length": len(tokens) - 2,
        }

    rows = [lent(NOTES[0], own), lent(NOTES[1], shared), lent(NOTES[2], shared)]
    made = out.commit(
        "borrow", "notes", inputs={"data": new, "replay.letters": replay}, rows=3,
        files={"replay/rows.parquet": parquet(rows, ROW_SCHEMA)},
    )  # fmt: skip
    forget(disk, [kept[0].row_id])
    record = StageRecord.load(disk, made.record.key)
    left = [row["row_id"] for row in rows[1:]]
    assert table_of(disk, record)["row_id"].to_pylist() == left
    # A row with the task's usual instruction takes nothing with it but itself.
    forget(disk, [kept[1].row_id])
    assert table_of(disk, StageRecord.load(disk, record.key))["row_id"].to_pylist() == left


def test_unfinished_stages_lose_what_they_wrote_and_trainings_on_the_rows_their_checkpoints(
    disk: Store,
) -> None:
    done = commit_store(disk)
    keys = leave_unfinished(disk, done)
    disk.write_json(f"train/old/{'0' * 20}/.lease/attempts.json", {"attempts": 3})
    disk.write_bytes(f"train/old/{'0' * 20}/checkpoints/step-3/weights.safetensors", bytes(8))
    forget(disk, IDS)
    left = {key: [f.path[len(key) + 1 :] for f in disk.list(key)] for key in keys.values()}
    kept = "checkpoints/step-1/weights.safetensors"
    assert left[keys["train1"]] == [".lease/attempts.json"]
    # It reads other rows, so it goes on where it was; its note loses the id alone.
    assert left[keys["train2"]] == [".lease/attempts.json", kept, "failure.json"]
    assert "a forgotten row" in disk.read_json(f"{keys['train2']}/failure.json")["message"]
    assert left[keys["sample"]] == left[keys["ingest"]] == [".lease/attempts.json"]
    # What it read was not written down by an earlier version, so it may have been these rows.
    assert disk.list(f"train/old/{'0' * 20}/checkpoints") == []


def test_only_reports_that_show_touched_stages_are_removed(disk: Store) -> None:
    done = commit_store(disk)
    leave_reports(disk, done)
    found = forget(disk, IDS)
    assert found.reports == ("both",)
    pages = [path for path in contents(disk) if path.endswith("report.html")]
    assert pages == ["mlflow/artifacts/other/artifacts/report.html", "streams/other/report.html"]


def test_forgetting_again_changes_nothing(disk: Store) -> None:
    commit_store(disk)
    forget(disk, IDS)
    before = contents(disk)
    found = forget(disk, IDS)
    assert contents(disk) == before
    assert found.plan is not None and set(found.plan.already) == set(IDS)
    assert found.plan.stages == {}


def test_rows_that_came_back_with_a_backup_are_taken_out_again(disk: Store, tmp_path: Path) -> None:
    done = commit_store(disk)
    key = done["teach/letters"].record.key
    root = Path(disk.full_path(key))
    shutil.copytree(root, tmp_path / "backup")
    forget(disk, IDS)
    shutil.rmtree(root)
    (tmp_path / "backup").rename(root)
    assert traces(disk, GONE)
    forget(disk, IDS)
    assert traces(disk, GONE) == []


def test_an_unknown_id_is_named_and_nothing_is_changed(disk: Store) -> None:
    commit_store(disk)
    before = contents(disk)
    unknown = "ab" * 16
    for call in (look_up, forget):
        with pytest.raises(ConfigError, match=rf"{unknown}.*nothing was changed.*--find"):
            call(disk, [IDS[0], unknown])
    assert contents(disk) == before


def test_looking_changes_nothing_and_says_what_will_happen(disk: Store) -> None:
    done = commit_store(disk)
    keys = leave_unfinished(disk, done)
    before = contents(disk)
    words = look_up(disk, IDS).stages
    assert contents(disk) == before
    assert words[done["sample/letters"].record.key] == "1 row erased"
    assert words[done["train/letters"].record.key].startswith("trained on 2 rows: marked")
    assert words[done["train/other"].record.key] == "grew from a model trained on them"
    assert words[keys["train1"]] == "unfinished: begins again" and keys["train2"] not in words
    assert forget(disk, IDS).plan.stages == words  # type: ignore[union-attr]


def test_the_request_names_rows_by_marks_and_never_by_their_ids(disk: Store) -> None:
    commit_store(disk)
    forget(disk, IDS, reason=f"asked by letter, row {IDS[0]}")
    request = the_request(disk)
    assert set(request.rows) == {mark_of(row_id) for row_id in IDS}
    assert request.reason == "asked by letter, row (a forgotten row)"
    known = ForgottenRows.load(disk)
    assert all(known.holds(row_id) for row_id in IDS)
    assert not known.holds(LETTERS[1].row_id) and not known.holds(mark_of(IDS[0]))


def test_while_a_stage_runs_rows_are_not_forgotten(disk: Store) -> None:
    commit_store(disk)
    before = contents(disk)
    with (
        Lease(disk, f"train/letters/{'f' * 20}"),
        pytest.raises(StoreError, match=r"stages are running.*train/letters.*Stop them"),
    ):
        forget(disk, IDS)
    assert contents(disk) == before
    forget(disk, IDS)
    assert traces(disk, GONE) == []


def test_while_rows_are_forgotten_no_stage_begins_and_finished_ones_are_reused(disk: Store) -> None:
    stage = Stage(name="select", task="letters", config={"a": 1})
    run_stage(disk, stage, lambda _: StageOutcome())
    commit_store(disk)
    begun = look_up(disk, IDS).request
    begun.begin(disk)
    other = Stage(name="select", task="letters", config={"a": 2})
    with pytest.raises(StoreError, match=rf"{begun.id}.*seekr forget STREAM"):
        run_stage(disk, other, lambda _: pytest.fail("it was computed"))
    assert run_stage(disk, stage, lambda _: pytest.fail("it was computed"))
    assert [request.id for request in forget(disk, []).completed] == [begun.id]
    require_settled(disk)
    assert run_stage(disk, other, lambda _: StageOutcome())
    assert traces(disk, GONE) == []


def test_a_record_of_before_reads_as_one_of_which_nothing_was_forgotten(disk: Store) -> None:
    done = commit_store(disk)
    record = done["ingest/other"].record
    value = disk.read_json(f"{record.key}/record.json")
    assert "forgotten" not in value
    assert StageRecord.load(disk, record.key).forgotten == ()


def test_copies_on_this_host_of_files_that_had_the_rows_are_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEEKR_CACHE_DIR", str(tmp_path / "cache"))
    done = commit_store(store)
    artifacts = [done["sample/letters"].artifact, done["sample/notes"].artifact]
    copies = [artifact.local(part) for artifact in artifacts for part in ("", "replay")]
    forget(store, [LETTERS[0].row_id])
    if not store.is_local:
        assert [copy.exists() for copy in copies] == [False, False, True, True]
        fresh = StageRecord.load(store, artifacts[0].record.key)
        assert Artifact(store=store, record=fresh).local("replay").is_dir()
        assert cache_folder() == tmp_path / "cache"


def test_rows_are_found_by_what_they_say(disk: Store) -> None:
    commit_store(disk)
    (found,) = find_text(disk, LETTERS[0].input.upper())
    assert (found.row_id, found.task, found.kind) == (LETTERS[0].row_id, "letters", "train")
    assert found.replayed
    (tested,) = find_text(disk, LETTERS[NUM_TRAIN].answer)
    assert tested.kind == "test" and not tested.replayed
    bad = find_text(disk, "names somebody")
    assert {row.row_id for row in bad} == {QUARANTINED_ID} and bad[0].kind == "quarantine"
    assert find_text(disk, "of nobody at all") == []


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    gone=st.sets(st.integers(0, NUM_TRAIN + NUM_TEST - 1), min_size=1),
    codec=st.sampled_from(["none", "snappy", "zstd"]),
)
def test_the_other_rows_stay_as_they_are_and_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], gone: set[int], codec: str
) -> None:
    store = Store.open(tmp_path_factory.mktemp("store"))
    out = Committer(store)
    pieces = [LETTERS[sum(cuts[:i]) : sum(cuts[: i + 1])] for i in range(len(cuts))]
    held = [row for piece in pieces for row in piece]
    ids = {LETTERS[n].row_id for n in gone} & {row.row_id for row in held}
    files = {
        f"replay/{n}.parquet": parquet(
            [row.record() for row in piece], ROW_SCHEMA, codec=codec, group=3
        )
        for n, piece in enumerate(pieces)
    }
    made = out.commit("sample", "letters", files=files, rows=len(held))
    before = table_of(store, made.record)
    if not ids:
        return
    forget(store, sorted(ids))
    record = StageRecord.load(store, made.record.key)
    after = table_of(store, record)
    assert after.schema.equals(before.schema)
    assert after.to_pylist() == [row for row in before.to_pylist() if row["row_id"] not in ids]
    assert record.rows == after.num_rows
    verify(store, record)


def small_store(root: Path) -> Store:
    """As little as has all kinds of steps in it."""
    store = Store.open(root)
    out = Committer(store)
    data = commit_ingest(out, LETTERS, "letters")
    model = out.commit("train", "letters", inputs={"data.letters": data}, rows=9)
    kept = commit_replay(out, "letters", LETTERS, data)
    files = {"targets/rows.parquet": targets(LETTERS[:4])}
    taught = out.commit("teach", "letters", inputs={"teacher": model, "replay": kept}, files=files)
    key = f"train/notes/{'a' * 20}"
    inputs = {"replay.letters": kept.record.key, "targets.letters": taught.record.key}
    store.write_json(f"{key}/.lease/attempts.json", {"attempts": 1, "inputs": inputs})
    store.write_bytes(f"{key}/checkpoints/step-1/weights.safetensors", bytes(8))
    log = {"ran": [data.record.key], "reused": [], "finished_at": AT}
    store.write_json("streams/small/last_run.json", log)
    store.write_bytes("streams/small/report.html", LETTERS[0].input.encode())
    return store


def forget_with_a_fixed_clock(root: str, stop_before: int | None) -> None:
    """Forget rows; the process ends, as if it was killed, before one of its changes to the store."""
    lease.SETTLE_LOCAL_SECONDS = 0.0  # type: ignore[misc]
    tempfile.tempdir = str(Path(root).parent)
    forget_plan.now_iso = lambda: AT
    forget_plan.uuid4 = lambda: type("Fixed", (), {"hex": "0" * 32})()
    left = [stop_before]

    def counted(name: str) -> None:
        change = getattr(Store, name)

        def maybe(self: Store, first: Any, *rest: Any, **options: Any) -> Any:
            where = rest[0] if name == "upload" else str(first)
            if ".lease" not in where and left[0] is not None:
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
            return change(self, first, *rest, **options)

        setattr(Store, name, maybe)

    for name in ("write_bytes", "upload", "remove"):
        counted(name)
    forget(Store.open(root, writable=False), [LETTERS[0].row_id, LETTERS[9].row_id, QUARANTINED_ID])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_before_any_change_and_repeated_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pipelines.test_forget"])

    def run(root: Path, stop_before: int | None) -> int:
        process = context.Process(target=forget_with_a_fixed_clock, args=(str(root), stop_before))
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    original = small_store(tmp_path / "original")
    shutil.copytree(tmp_path / "original", tmp_path / "whole")
    assert run(tmp_path / "whole", None) == 0
    wanted = contents(Store.open(tmp_path / "whole"))
    assert traces(Store.open(tmp_path / "whole"), [LETTERS[0], LETTERS[9]]) == []
    stops = 0
    while True:
        root = tmp_path / f"stopped-{stops}"
        shutil.copytree(tmp_path / "original", root)
        code = run(root, stops)
        store = Store.open(root)
        for record in all_records(store).values():
            verify(store, record, "digests")
        if code == 0:
            break
        assert code == 9
        if not pending(store):
            # Before the request, or after the last step of it.
            assert contents(store) in (contents(original), wanted)
        assert run(root, None) == 0
        assert contents(Store.open(root)) == wanted, f"stopped before change {stops}"
        stops += 1
    assert stops > 15
