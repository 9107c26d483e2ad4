"""The same store on S3 (a real server on the loopback interface), and what only an object store
needs."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from pipelines.store import Store
from pipelines.transfer import OutputFile
from seekr.errors import StoreError
from tests.pipelines.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, s3_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def store(server: S3Server, request: pytest.FixtureRequest) -> Store:
    return Store.open(server.uri(f"streams/{request.node.name[:40]}"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEEKR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_opening_leaves_no_object_behind(server: S3Server) -> None:
    Store.open(server.uri("fresh/place"))
    listing = server.filesystem().get_file_info(fs.FileSelector(f"{BUCKET}/fresh", recursive=True))
    assert [info.path for info in listing if info.type == fs.FileType.File] == []


def test_what_is_written_is_read_listed_and_removed(store: Store) -> None:
    store.write_bytes("a/b/one.bin", b"123")
    store.write_json("a/two.json", {"x": 1})
    assert store.read_bytes("a/b/one.bin") == b"123"
    assert store.read_json("a/two.json") == {"x": 1}
    assert [(f.path, f.size) for f in store.list("a")] == [
        ("a/b/one.bin", 3),
        ("a/two.json", store.list("a")[1].size),
    ]
    assert abs(store.list("a")[0].mtime - time.time()) < 60
    assert store.children("a") == ["b"]
    assert store.digest("a/b/one.bin") == hashlib.sha256(b"123").hexdigest()
    assert store.exists("a/b") and store.stat("a/b") is None
    store.remove("a/two.json")
    store.remove("a/b")
    store.remove("a/never")
    assert store.list("a") == []
    with pytest.raises(
        StoreError, match=r"s3://seekr-tests/streams/.*/a/two.json: failed while reading"
    ):
        store.read_bytes("a/two.json")


def test_credentials_appear_in_no_text_but_survive_a_pickle(store: Store, server: S3Server) -> None:
    copy = pickle.loads(pickle.dumps(store))
    copy.write_bytes("x", b"1")
    assert store.read_bytes("x") == b"1"
    with pytest.raises(StoreError) as refused:
        Store.open(server.uri("x", bucket="no-such-bucket"))
    assert "s3://no-such-bucket/x" in str(refused.value)
    assert "NO_SUCH_BUCKET" in str(refused.value)
    texts = [repr(store), store.uri_for("x"), str(refused.value), store.location.redact(SECRET_KEY)]
    for text in texts:
        assert SECRET_KEY not in text and ACCESS_KEY not in text and "%2F" not in text


def test_an_uri_that_cannot_be_parsed_does_not_show_its_secret() -> None:
    with pytest.raises(StoreError, match="percent-encoded") as caught:
        Store.open("s3://AKID:abc/def+secret@bucket/p?endpoint_override=127.0.0.1:1")
    shown = f"{caught.value!s} {caught.value.__cause__!r}"
    assert "def+secret" not in shown
    with pytest.raises(StoreError, match="foo"):
        Store.open("s3://AKID:abcdef@bucket/p?foo=1&endpoint_override=127.0.0.1:1")


def test_endpoint_and_credentials_may_come_from_the_environment(
    server: S3Server, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_bytes("x", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    plain = Store.open(store.location.shown + "?region=us-east-1")
    assert plain.read_bytes("x") == b"1"


def test_pyarrow_writers_share_the_file_system(store: Store) -> None:
    table = pa.table({"row_id": ["a", "b"], "n": [1, 2]})
    pq.write_table(table, store.full_path("t/rows.parquet"), filesystem=store.filesystem)
    assert pq.read_table(store.full_path("t/rows.parquet"), filesystem=store.filesystem) == table
    assert [f.path for f in store.list("t")] == ["t/rows.parquet"]


def model(store: Store, tmp_path: Path, size: int = 3_000_000) -> list[OutputFile]:
    source = tmp_path / "source"
    (source / "shards").mkdir(parents=True)
    (source / "config.json").write_bytes(b"{}")
    (source / "shards" / "1.bin").write_bytes(b"ab" * (size // 2))
    return store.upload(source, "train/t/f", "model")


def test_a_local_copy_is_verified_and_downloaded_once(
    store: Store, tmp_path: Path, cache: Path
) -> None:
    outputs = model(store, tmp_path)
    copy = store.local("train/t/f", outputs)
    assert (copy / "model" / "shards" / "1.bin").read_bytes() == b"ab" * 1_500_000
    store.remove("train/t/f/model")  # the second time needs no network
    assert store.local("train/t/f", outputs) == copy


def test_a_damaged_copy_is_replaced(store: Store, tmp_path: Path, cache: Path) -> None:
    outputs = model(store, tmp_path)
    copy = store.local("train/t/f", outputs)
    (copy / "model" / "shards" / "1.bin").write_bytes(b"cut")
    assert store.local("train/t/f", outputs) == copy
    assert (copy / "model" / "shards" / "1.bin").stat().st_size == 3_000_000


def test_a_download_that_differs_from_its_record_is_refused_and_not_kept(
    store: Store, tmp_path: Path, cache: Path
) -> None:
    outputs = model(store, tmp_path)
    store.write_bytes("train/t/f/model/shards/1.bin", b"XX" * 1_500_000)
    with pytest.raises(
        StoreError, match=r"model/shards/1.bin: found 3000000 bytes with sha256"
    ) as caught:
        store.local("train/t/f", outputs)
    assert "Remove s3://seekr-tests/streams/" in str(caught.value)
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []


def test_processes_that_ask_at_once_share_one_complete_copy(
    store: Store, tmp_path: Path, cache: Path
) -> None:
    outputs = model(store, tmp_path, size=8_000_000)
    payload = pickle.dumps((store, outputs)).hex()
    code = (
        "import pickle, sys, os\n"
        "store, outputs = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "copy = store.local('train/t/f', outputs)\n"
        "print(os.stat(copy / 'model/shards/1.bin').st_ino,"
        " os.path.getsize(copy / 'model/shards/1.bin'))"
    )
    command = [sys.executable, "-c", code, payload]
    asking = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    answers = {process.communicate(timeout=60)[0] for process in asking}
    assert [process.returncode for process in asking] == [0, 0, 0]
    assert len(answers) == 1  # one inode: nobody downloaded a second copy
    assert answers.pop().split()[1] == b"8000000"


def test_a_cache_that_cannot_be_used_is_named(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = model(store, tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEEKR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(StoreError, match="SEEKR_CACHE_DIR"):
        store.local("train/t/f", outputs)
