"""An append-only list: what is in it stays, and of two writers one is told that it lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Thread

import pytest

from pipelines.journal import Journal
from pipelines.lease import Lease
from pipelines.store import Store
from seekr.errors import LeaseLost
from tests.pipelines.s3_server import s3_server

FOLDER = "streams/small/arrivals"


@pytest.fixture(scope="module", params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path_factory.mktemp("store"))
        return
    with s3_server() as server:
        yield server.uri("journal")


@pytest.fixture
def store(root: str, request: pytest.FixtureRequest) -> Store:
    """A store of one test's own."""
    place, mark, options = root.partition("?")
    return Store.open(f"{place}/{abs(hash(request.node.name))}{mark}{options}")


def held(store: Store) -> Lease:
    return Lease(store, "a tick", settle=0.0)


def test_entries_come_in_the_order_in_which_they_were_added(store: Store) -> None:
    journal = Journal(store, FOLDER)
    assert journal.read() == []
    with held(store) as lease:
        for number in range(12):
            journal.append({"n": number}, after=number, lease=lease)
    assert [entry["n"] for entry in Journal(store, FOLDER).read()] == list(range(12))


def test_whoever_has_not_seen_the_newest_entry_adds_nothing(store: Store) -> None:
    journal = Journal(store, FOLDER)
    with held(store) as lease:
        journal.append({"by": "first"}, after=0, lease=lease)
        with pytest.raises(LeaseLost, match="another run has added entry 1 meanwhile"):
            journal.append({"by": "second"}, after=0, lease=lease)
    assert journal.read() == [{"by": "first"}]


def test_whoever_has_lost_the_lease_adds_nothing(store: Store) -> None:
    journal = Journal(store, FOLDER)
    with held(store) as lease:
        lease.abandon()
        with pytest.raises(LeaseLost):
            journal.append({}, after=0, lease=lease)
    assert journal.read() == [] and store.list(FOLDER) == []


def test_of_many_writers_at_once_each_number_has_one(store: Store) -> None:
    journal, ready, added = Journal(store, FOLDER), Barrier(3), []

    def write(name: int) -> None:
        ready.wait()
        for turn in range(2):
            with Lease(store, "a tick") as lease:
                journal.append({"by": [name, turn]}, after=len(journal), lease=lease)
                added.append([name, turn])

    threads = [Thread(target=write, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry["by"] for entry in journal.read()] == added
    assert len(added) == 6


def test_an_entry_that_is_written_late_displaces_none(store: Store) -> None:
    """Its writer slept between asking for the lease and writing, longer than the lease lives."""
    journal = Journal(store, FOLDER)
    with held(store) as lease:
        journal.append({"by": "first"}, after=0, lease=lease)
    first = store.list(FOLDER)[0]
    while True:  # S3 dates objects by the second
        store.write_bytes("clock", b"")
        stat = store.stat("clock")
        assert stat is not None
        if stat.mtime > first.mtime:
            break
    store.write_json(f"{FOLDER}/000001-{'0' * 32}.json", {"by": "the sleeper"})
    assert journal.read() == [{"by": "first"}]
    with held(store) as lease:
        journal.append({"by": "second"}, after=1, lease=lease)
    assert [entry["by"] for entry in journal.read()] == ["first", "second"]


def test_other_files_in_the_folder_are_no_entries(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store.write_bytes(f"{FOLDER}/data/abc/000001-{'0' * 32}.json", b"{}")
    store.write_bytes(f"{FOLDER}/note.json", b"{}")
    assert Journal(store, FOLDER).read() == []
    (tmp_path / FOLDER / f"000002-{'1' * 32}.json").write_text(json.dumps({}))
    assert Journal(store, FOLDER).read() == [], "an entry after a gap was never reached in order"
