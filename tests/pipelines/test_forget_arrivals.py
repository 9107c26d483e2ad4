"""Rows leave the copies of what has arrived in an inbox, whatever their layout, and nothing runs again."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines import lease
from pipelines.arrivals import Arrival, tick_folder
from pipelines.find_rows import find_place, find_text
from pipelines.forget import forget, look_up
from pipelines.forgotten import ForgottenRows, pending, quarantined_id
from pipelines.lease import Lease
from pipelines.readers import read_source
from pipelines.rows import Columns, SourceRow
from pipelines.store import Store
from pipelines.stream import open_stream
from pipelines.tick import withdraw_task
from seekr.errors import ConfigError, DataError, StoreError
from seekr.prompts import row_id_of
from tests.pipelines.committed import Committer
from tests.pipelines.inboxes import Arriving, Inbox, arriving, arriving_in
from tests.pipelines.remembered import contents, forms
from tests.pipelines.streams import task_rows, write_yaml

ROWS = task_rows("reverse", 24)
GONE = (ROWS[0], ROWS[7], ROWS[23])
TRAIN, TEST = ROWS[:20], ROWS[20:]
SECRETS = [s.encode() for row in GONE for s in (row["input"].strip(), json.dumps(row["output"]))]


def id_of(row: dict[str, str]) -> str:
    return row_id_of(row["input"], (row["output"],))


IDS = [id_of(row) for row in GONE]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_LOCAL_SECONDS", 0.0)
    monkeypatch.setattr(lease, "SETTLE_REMOTE_SECONDS", 0.0)


@pytest.fixture(params=["disk", "s3"])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Arriving]:
    with arriving_in(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def local(tmp_path: Path) -> Arriving:
    return arriving(tmp_path)


def jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, str]], categories: bool = False) -> bytes:
    table = pa.Table.from_pylist([row | {"kind": row["output"]} for row in rows])
    if categories:  # a column that lists its values beside the rows
        place = table.schema.get_field_index("kind")
        table = table.set_column(place, "kind", table["kind"].dictionary_encode())
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=6)
    return sink.getvalue()


def instructions(rows: list[dict[str, str]]) -> bytes:
    example = {"input": rows[0]["input"], "output": rows[0]["output"], "explanation": "say it"}
    document = {"Definition": ["Do it."], "Positive Examples": [example]}
    instances = [{"input": row["input"], "output": [row["output"]]} for row in rows]
    return json.dumps(document | {"Instances": instances}).encode()


def saved(rows: list[dict[str, str]], folder: Path) -> dict[str, bytes]:
    datasets.Dataset.from_list(rows).save_to_disk(folder, num_shards=2)
    return {f"train/{path.name}": path.read_bytes() for path in folder.iterdir()}


LAYOUTS = ("jsonl", "json", "parquet", "categories", "instructions", "saved", "folder")


def deliver(inbox: Inbox, layout: str, folder: Path) -> None:
    """Put a task `news` there; its training rows lie in one of the layouts."""
    pieces = {
        "jsonl": {"train.jsonl": jsonl(TRAIN)},
        "json": {"train.json": json.dumps(TRAIN, indent=1).encode()},
        "parquet": {"train.parquet": parquet(TRAIN)},
        "categories": {"train.parquet": parquet(TRAIN, categories=True)},
        "instructions": {"train.json": instructions(TRAIN), "test.json": instructions(TEST)},
        "folder": {"train/a.jsonl": jsonl(TRAIN[:5]), "train/b.jsonl": jsonl(TRAIN[5:])},
    }
    files = saved(TRAIN, folder) if layout == "saved" else pieces[layout]
    if "test.json" not in files:
        files["test.jsonl"] = jsonl(TEST)
    for name, data in files.items():
        inbox.put(f"news/{name}", data)
    inbox.put("news/_SUCCESS", "")


def holding(store: Store, secrets: list[bytes]) -> list[str]:
    return [
        file.path
        for file in store.list_all()
        if any(s in form for form in forms(file.path, store.read_bytes(file.path)) for s in secrets)
    ]


def rows_in(arrival: Arrival, store: Store, part: str) -> list[tuple[str, tuple[str, ...]]]:
    source = store.address(f"{arrival.folder}/{arrival.parts[part]}")
    found = list(read_source(source, Columns()))
    return [(row.input, row.references) for row in found if isinstance(row, SourceRow)]


def the_copy(stream: Arriving) -> Arrival:
    (found,) = stream.register.copies
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_of_a_forgotten_row_is_left_in_a_copy_and_the_others_are_as_they_were(
    layout: str, tmp_path: Path
) -> None:
    local = arriving(tmp_path, data={"template": "{input}"})
    deliver(local.inbox, layout, tmp_path / "saved")
    local.look()
    store, before = local.store, open_stream(local.path).stages
    whole = {part: rows_in(the_copy(local), store, part) for part in ("train", "test")}
    definition = "Do it." if layout == "instructions" else None
    own = [row_id_of(row["input"], (row["output"],), definition) for row in GONE]
    assert holding(store, SECRETS)

    plan = forget(store, own, reason="asked").plan

    assert plan is not None and plan.num_rows == 3
    assert list(plan.stages.values()) == ["3 rows erased"]
    assert holding(store, SECRETS) == []
    inputs = {row["input"] for row in GONE}
    for part, rows in whole.items():
        left = [row for row in rows if row[0] not in inputs]
        assert rows_in(the_copy(local), store, part) == left
    assert open_stream(local.path).stages == before, "something would run again"
    assert local.verdicts() == [("news", "accepted"), ("news", "erased")]
    assert "3 rows of the copy forgotten on" in local.register.entries[-1].reason


def test_on_a_disk_and_on_s3_a_single_file_loses_its_rows_and_the_task_stays_what_it_is(
    stream: Arriving,
) -> None:
    values = yaml.safe_load(stream.path.read_text())
    values["data"] |= {"validation_rows": 5}
    write_yaml(stream.path, values | {"evaluate": {"split": "validation"}})
    stream.inbox.put("news.jsonl", jsonl(ROWS))
    stream.look()
    store, before = stream.store, open_stream(stream.path).stages
    stream.inbox.remove("news.jsonl")
    (found,) = find_text(store, GONE[1]["input"])
    assert (found.row_id, found.task, found.kind) == (IDS[1], "news", "arrived")
    (placed,) = find_place(store, stream.config, "inbox/news.jsonl:8")
    assert placed.row_id == IDS[1]

    forget(store, IDS[:2])
    forget(store, IDS[2:])

    assert holding(store, SECRETS) == []
    assert open_stream(stream.path).stages == before
    assert [asdict(lacks)["rows"] for lacks in the_copy(stream).left_out.values()] == [3]
    assert len(rows_in(the_copy(stream), store, "train")) == 21
    # Lines keep their numbers.
    (placed,) = find_place(store, stream.config, "news.jsonl:9")
    assert placed.row_id == id_of(ROWS[8])
    with pytest.raises(ConfigError, match=r"no source of the stream has this line.*news\.jsonl"):
        find_place(store, stream.config, "news.jsonl:8")
    # One copy is there, and looking again finds what the register says.
    assert len(store.children(f"{stream.register.folder}/data")) == 1
    assert forget(store, IDS).plan.stages == {}  # type: ignore[union-attr]


def test_rows_that_cannot_be_used_leave_the_copy_too(tmp_path: Path) -> None:
    stream = arriving(tmp_path, data={"max_bad_share": 0.5})
    bad = '{"input": "Jane Doe has no answer"}'
    stream.inbox.put("news/train.jsonl", jsonl(TRAIN) + bad.encode() + b"\n")
    stream.inbox.put("news/test.jsonl", jsonl(TEST))
    stream.inbox.put("news/_SUCCESS", "")
    stream.look()
    assert holding(stream.store, [b"Jane Doe"])
    (found,) = find_text(stream.store, "jane doe")
    assert found.row_id == quarantined_id(bad)
    forget(stream.store, [found.row_id])
    assert holding(stream.store, [b"Jane Doe"]) == []
    assert len(rows_in(the_copy(stream), stream.store, "train")) == 20


def test_a_row_is_known_by_the_columns_of_its_arrival_and_of_every_ingest(tmp_path: Path) -> None:
    columns = {"validation_rows": 2, "columns": {"output": "answer"}}
    stream = arriving(tmp_path, tasks=0, data=columns, evaluate={"split": "validation"})
    rows = [{"input": row["input"], "answer": row["output"], "other": "x"} for row in ROWS]
    stream.inbox.put_rows("news.jsonl", rows)
    stream.look()
    entry, store = stream.register.entries[0], stream.store
    assert entry.columns["output"] == "answer"
    later = row_id_of(rows[3]["input"], ("x",))
    with pytest.raises(ConfigError, match=later):
        look_up(store, [later])
    # As if `data.columns` had been changed meanwhile.
    Committer(store).commit(
        "ingest", "news", config={"columns": {"input": None, "output": "other", "definition": None}},
        sources={"train": str(entry.train_digest)}, files={"quarantine.json": b"[]"}, rows=0,
    )  # fmt: skip
    same = row_id_of(rows[0]["input"], ("x",))  # of a row that has another id here, too
    plan = forget(store, [*IDS, later, same]).plan
    assert plan is not None and list(plan.stages.values()) == ["4 rows erased"]
    assert holding(store, [*SECRETS[::2], rows[3]["input"].encode()]) == []
    assert the_copy(stream).left_out["train"].rows == 4


def test_what_arrives_later_is_copied_without_the_rows_that_are_forgotten(tmp_path: Path) -> None:
    local = arriving(tmp_path, replay={"ratio": 0.5})
    deliver(local.inbox, "jsonl", local.path.parent)
    local.look()
    forget(local.store, IDS)
    more = task_rows("sort", 30)
    local.inbox.put("more/train.jsonl", jsonl([*more[:20], GONE[0], GONE[0], *more[20:25]]))
    local.inbox.put("more/test.jsonl", jsonl(more[25:]))
    local.inbox.put("more/_SUCCESS", "")
    (entry,) = local.look().entered
    assert entry.verdict == "accepted" and entry.rows == 26
    assert asdict(entry.left_out["train"]) | {"digest": ""} == {
        "digest": "", "rows": 1, "repeated": 1,
    }  # fmt: skip
    assert holding(local.store, SECRETS) == []
    # To the stages it is what was delivered.
    facts = open_stream(local.path).facts.tasks["more"].train
    assert facts.digest == entry.train_digest and (facts.num_rows, facts.num_duplicates) == (26, 1)
    # What was delivered and forgotten, and what is left of it, are the same task.
    local.inbox.put("again/train.jsonl", jsonl(TRAIN))
    local.inbox.put("again/test.jsonl", jsonl(TEST))
    local.inbox.put("again/_SUCCESS", "")
    cleaned = local.store.read_bytes(f"{local.register.copies[0].folder}/train.jsonl")
    local.inbox.put("cleaned/train.jsonl", cleaned)
    local.inbox.put("cleaned/test.jsonl", jsonl(TEST))
    local.inbox.put("cleaned/_SUCCESS", "")
    assert [entry.verdict for entry in local.look().entered] == ["duplicate", "duplicate"]
    # Of what was forgotten altogether nothing can be learnt.
    local.inbox.put("only/train.jsonl", jsonl(list(GONE)))
    local.inbox.put("only/test.jsonl", jsonl(more[25:]))
    local.inbox.put("only/_SUCCESS", "")
    (entry,) = local.look().entered
    assert entry.verdict == "quarantined" and "all 3 usable train rows of it were" in entry.reason


def test_a_task_does_not_lose_its_last_row_unless_it_was_withdrawn(local: Arriving) -> None:
    deliver(local.inbox, "jsonl", local.path.parent)
    local.look()
    store, every = local.store, [id_of(row) for row in TRAIN]
    before = contents(store)
    for call in (look_up, forget):
        with pytest.raises(ConfigError, match=r"the task news of stream small.*seekr withdraw"):
            call(store, every)
    assert contents(store) == before
    withdraw_task(local.path, (), "news", "asked", pytest.fail)
    forget(store, every)
    inputs = [row["input"].strip().encode() for row in TRAIN]
    assert holding(store, inputs) == []
    assert [task.name for task in open_stream(local.path).config.tasks] == ["upper"]
    assert rows_in(the_copy(local), store, "test") == [
        (row["input"], (row["output"],)) for row in TEST
    ]


def test_copies_that_no_entry_names_are_removed(local: Arriving) -> None:
    deliver(local.inbox, "jsonl", local.path.parent)
    local.look()
    stray = f"{local.register.folder}/data/{'0' * 20}/train.jsonl"
    local.store.write_bytes(stray, jsonl(list(GONE)))
    forget(local.store, IDS)
    assert local.store.stat(stray) is None and holding(local.store, SECRETS) == []


def test_a_copy_that_is_lost_keeps_nobody_from_forgetting(local: Arriving) -> None:
    deliver(local.inbox, "jsonl", local.path.parent)
    more = task_rows("sort", 30)
    local.inbox.put("more/train.jsonl", jsonl([*more[:20], GONE[0]]))
    local.inbox.put("more/test.jsonl", jsonl(more[20:]))
    local.inbox.put("more/_SUCCESS", "")
    local.look()
    news, other = local.register.copies
    local.store.remove(str(other.folder))
    forget(local.store, IDS)
    assert holding(local.store, SECRETS) == []
    assert [e.shortens for e in local.register.entries if e.shortens] == [news.number]


def test_while_a_tick_is_at_work_rows_are_not_forgotten(local: Arriving) -> None:
    deliver(local.inbox, "jsonl", local.path.parent)
    local.look()
    before = contents(local.store)
    with (
        Lease(local.store, tick_folder("small")),
        pytest.raises(StoreError, match=r"a tick is at work.*Nothing was changed.*Let it end"),
    ):
        forget(local.store, IDS)
    assert contents(local.store) == before
    forget(local.store, IDS)
    assert holding(local.store, SECRETS) == []


def test_a_copy_that_was_changed_in_the_store_is_still_noticed_afterwards(local: Arriving) -> None:
    deliver(local.inbox, "jsonl", local.path.parent)
    local.look()
    forget(local.store, IDS)
    path = f"{the_copy(local).folder}/train.jsonl"
    data = local.store.read_bytes(path)
    local.store.write_bytes(path, data.replace(b"reverse", b"forward", 1))
    with pytest.raises(StoreError, match="the rows of the task news are not those that arrived on"):
        open_stream(local.path)
    local.store.write_bytes(path, b"")
    with pytest.raises((StoreError, DataError)):
        open_stream(local.path)


def stop_before(change: int | None) -> None:
    """Let this process end, as if it was killed, before its n-th change to a store."""
    left = [change]

    def counted(name: str) -> None:
        real = getattr(Store, name)

        def maybe(self: Store, first: Any, *rest: Any, **options: Any) -> Any:
            where = f"{rest[0]}/{rest[1]}" if name == "receive" else str(first)
            if ".lease" not in where and left[0] is not None:
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
            return real(self, first, *rest, **options)

        setattr(Store, name, maybe)

    for name in ("write_bytes", "receive", "remove"):
        counted(name)


def forget_and_stop(root: str, change: int | None) -> None:
    lease.SETTLE_LOCAL_SECONDS = 0.0  # type: ignore[misc]
    stop_before(change)
    forget(Store.open(root, writable=False), [] if change is None else IDS)


def state_of(store: Store, path: Path) -> tuple[Any, ...]:
    """What is there, but for names and times that differ from call to call."""
    stream = Arriving(path, Inbox("", store.filesystem, ""), (f"storage={store.location.root}",))
    entries = [
        {**asdict(e), "noted_at": "", "reason": e.reason.partition(" on ")[0]}
        for e in stream.register.entries
    ]
    data = {p: d for p, d in contents(store).items() if "/arrivals/data/" in p}
    return entries, data, open_stream(path, stream.changes).stages


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_before_any_change_and_completed_it_ends_with_the_same_copies(
    local: Arriving, tmp_path: Path
) -> None:
    deliver(local.inbox, "folder", tmp_path)
    more = task_rows("sort", 30)
    local.inbox.put("more/train.jsonl", jsonl([*more[:20], GONE[0]]))
    local.inbox.put("more/test.jsonl", jsonl(more[20:]))
    local.inbox.put("more/_SUCCESS", "")
    local.look()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pipelines.test_forget_arrivals"])

    def run(root: Path, change: int | None) -> int:
        process = context.Process(target=forget_and_stop, args=(str(root), change))
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    original = tmp_path / "store"
    before, wanted, stops = state_of(Store.open(original), local.path), None, 0
    while True:
        root = tmp_path / f"stopped-{stops}"
        shutil.copytree(original, root)
        code, store = run(root, stops), Store.open(root)
        middle = state_of(store, local.path)
        assert middle[2] == before[2], "a reader between two changes sees another stream"
        if code == 0:
            break
        assert code == 9
        if pending(store):
            assert run(root, None) == 0
            assert holding(store, SECRETS) == [], f"stopped before change {stops}"
            ended = state_of(store, local.path)
            wanted = ended if wanted is None else wanted
            assert ended == wanted, f"stopped before change {stops}"
        elif not ForgottenRows.load(store).dates:
            assert middle == before
        shutil.rmtree(root)
        stops += 1
    assert middle == wanted and stops > 10
