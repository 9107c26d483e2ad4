"""What an inbox holds, in which order, and what of it is whole; on a disk and on S3."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from pipelines.inbox import Delivery, look
from seekr.errors import DataError
from tests.pipelines.inboxes import EPOCH, Inbox
from tests.pipelines.s3_server import ACCESS_KEY, BUCKET, S3Server, s3_server

NOW = EPOCH + 1000.0


def seen(inbox: str, settle: float = 0.0, now: float = NOW) -> list[Delivery]:
    return look(inbox, settle, clock=lambda: now)


def names(inbox: str) -> list[str]:
    return [delivery.name for delivery in seen(inbox)]


@pytest.fixture
def disk(tmp_path: Path) -> Inbox:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return Inbox(str(folder), fs.LocalFileSystem(), str(folder))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def bucket(server: S3Server, request: pytest.FixtureRequest) -> Inbox:
    prefix = f"in-{abs(hash(request.node.name))}"
    return Inbox(f"{BUCKET}/{prefix}", server.filesystem(), server.uri(prefix))


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3)), unique_by=lambda x: x[0])
)
@settings(max_examples=25)
def test_the_order_is_that_of_the_times_and_then_of_the_names(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("inbox")
    inbox = Inbox(str(folder), fs.LocalFileSystem(), str(folder))
    for name, at in files:
        inbox.put(f"{name}.jsonl", "{}\n", at)
    expected = [name for name, _ in sorted(files, key=lambda file: (file[1], file[0]))]
    assert names(inbox.uri) == names(f"{inbox.uri}/*") == names(f"{inbox.uri}/") == expected


def test_the_time_of_a_folder_is_that_of_its_marker(disk: Inbox) -> None:
    disk.put_task("late", "upper", at=1, whole=False)
    disk.put("file.jsonl", "{}\n", at=5)
    disk.put("late/_SUCCESS", "", at=9)
    assert names(disk.uri) == ["file", "late"]


def test_a_file_on_a_disk_is_whole_when_it_was_left_alone_for_a_while(disk: Inbox) -> None:
    disk.put("news.jsonl", "{}\n", at=0)
    (young,) = seen(disk.uri, settle=60, now=EPOCH + 20)
    assert young.waits_for == "40 s without a change (inbox.settle_seconds is 60)"
    (old,) = seen(disk.uri, settle=60, now=EPOCH + 60)
    assert old.waits_for == ""


def test_a_folder_is_whole_when_it_holds_the_marker_however_young(disk: Inbox) -> None:
    disk.put_task("news", "upper", at=0, whole=False)
    (half,) = seen(disk.uri, settle=60, now=NOW)
    assert "_SUCCESS" in half.waits_for
    disk.put("news/_SUCCESS", "", at=999)
    (whole,) = seen(disk.uri, settle=60, now=NOW)
    assert whole.waits_for == ""
    assert [disk_file.path.rpartition("/")[2] for disk_file in whole.part("train")] == [
        "train.jsonl"
    ]
    assert [disk_file.path.rpartition("/")[2] for disk_file in whole.part("test")] == ["test.jsonl"]


@pytest.mark.parametrize("name", [".news.jsonl", "_news.jsonl", "news.jsonl.tmp", "news.part"])
def test_names_of_unfinished_files_are_passed_over(name: str, disk: Inbox) -> None:
    disk.put(name, "{}\n")
    assert seen(disk.uri) == []


def test_a_file_that_is_renamed_into_the_inbox_keeps_its_time(disk: Inbox) -> None:
    disk.put(".news.jsonl", "{}\n", at=3)
    os.rename(f"{disk.folder}/.news.jsonl", f"{disk.folder}/news.jsonl")
    assert [delivery.modified for delivery in seen(disk.uri)] == [EPOCH + 3]


def test_a_stamp_changes_with_any_file_and_with_nothing_else(disk: Inbox) -> None:
    disk.put_task("news", "upper", at=0)
    (before,) = seen(disk.uri)
    assert seen(disk.uri)[0].stamp == before.stamp
    disk.put("news/test.jsonl", "{}\n", at=7)
    assert seen(disk.uri)[0].stamp != before.stamp


def test_a_glob_chooses(disk: Inbox) -> None:
    for name in ("week-1.jsonl", "week-2.jsonl", "notes.jsonl"):
        disk.put(name, "{}\n")
    assert names(f"{disk.uri}/week-*.jsonl") == ["week-1", "week-2"]


def test_two_sources_of_training_rows_are_refused(disk: Inbox) -> None:
    disk.put_task("news", "upper", at=0)
    disk.put("news/train/part.jsonl", "{}\n")
    (found,) = seen(disk.uri)
    with pytest.raises(
        DataError, match=r"several sources of train rows: train, train\.jsonl; keep one"
    ):
        found.part("train")


@pytest.mark.parametrize("pattern", ["", "/*", "/week-*"])
def test_an_inbox_that_is_not_there_is_no_empty_one(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone does not exist; make it, or mount the storage"):
        seen(f"{tmp_path}/gone{pattern}")


def test_a_file_is_no_inbox(disk: Inbox) -> None:
    disk.put("news.jsonl", "{}\n")
    with pytest.raises(DataError, match="is a file; name the folder"):
        seen(f"{disk.uri}/news.jsonl")


def test_on_s3_files_are_whole_at_once_and_folders_by_their_marker(bucket: Inbox) -> None:
    assert seen(bucket.uri) == [], "a prefix without objects is an empty inbox"
    bucket.put("b.jsonl", "{}\n")
    bucket.put_task("folder", "upper", whole=False)
    found = {delivery.name: delivery for delivery in look(bucket.uri, settle=3600)}
    assert found["b"].waits_for == "" and "_SUCCESS" in found["folder"].waits_for
    bucket.put("folder/_SUCCESS", "")
    assert [delivery.waits_for for delivery in look(bucket.uri, settle=3600)] == ["", ""]
    with found["b"].open(found["b"].files[0]) as stream:
        assert stream.read() == b"{}\n"


def test_no_credential_is_in_what_is_shown_of_a_delivery(bucket: Inbox) -> None:
    bucket.put("news.jsonl", "{}\n")
    (found,) = seen(bucket.uri)
    assert ACCESS_KEY not in found.place + repr(found)
    assert ACCESS_KEY in found.source(found.part("train")), "its source opens it"


def test_a_bucket_that_is_not_there_is_an_error_without_credentials(server: S3Server) -> None:
    with pytest.raises(DataError) as refused:
        seen(server.uri("inbox/*", bucket="no-such-bucket"))
    assert "no-such-bucket" in str(refused.value) and ACCESS_KEY not in str(refused.value)
