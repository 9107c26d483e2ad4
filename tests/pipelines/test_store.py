"""The store on a disk: whole files or none, errors that name places, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.location import locate
from pipelines.provenance import PeakMemory, Provenance, git_commit, redact, redact_argv
from pipelines.store import Store
from pipelines.transfer import OutputFile
from seekr.errors import StoreError

ROOT = Path(__file__).parents[2]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "root")


def test_opening_leaves_nothing_behind(tmp_path: Path) -> None:
    Store.open(tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read_listed_and_removed(store: Store) -> None:
    store.write_bytes("a/b/one.bin", b"123")
    store.write_json("a/two.json", {"x": [1, None]})
    assert store.read_bytes("a/b/one.bin") == b"123"
    assert store.read_json("a/two.json") == {"x": [1, None]}
    assert [f.size for f in store.list("a")][:1] == [3]
    assert [f.path for f in store.list("a")] == ["a/b/one.bin", "a/two.json"]
    assert abs(store.list("a")[0].mtime - time.time()) < 60
    assert store.children("a") == ["b"]
    assert store.exists("a") and store.exists("a/two.json") and not store.exists("a/three")
    assert store.stat("a") is None
    assert store.digest("a/b/one.bin") == sha256(b"123")
    store.remove("a/two.json")
    assert not store.exists("a/two.json")
    store.remove("a")
    store.remove("a")
    assert store.list("a") == [] and store.children("a") == []


def test_a_write_that_fails_midway_leaves_the_old_file_and_no_rubbish(
    store: Store, tmp_path: Path
) -> None:
    store.write_bytes("a/file", b"old")
    unreadable = tmp_path / "source"
    unreadable.mkdir()
    (unreadable / "file").symlink_to("/proc/self/mem")  # opens, but reading it at 0 fails
    with pytest.raises(StoreError, match="failed while writing"):
        store.upload(unreadable, "a")
    assert store.read_bytes("a/file") == b"old"
    assert [f.path for f in store.list("a")] == ["a/file"]


def test_readers_never_see_half_a_file(store: Store) -> None:
    # Another process overwrites one file with blocks of one letter; every read must be one block.
    code = (
        "import sys; from pipelines.store import Store; store = Store.open(sys.argv[1])\n"
        "for i in range(300): store.write_bytes('f', bytes([65 + i % 26]) * (1 << 16))"
    )
    store.write_bytes("f", b"A" * (1 << 16))
    writer = subprocess.Popen([sys.executable, "-c", code, store.location.uri], cwd=ROOT)
    seen = set()
    while writer.poll() is None:
        data = store.read_bytes("f")
        assert len(data) == 1 << 16 and len(set(data)) == 1
        seen.add(data[0])
    assert writer.returncode == 0
    assert len(seen) > 3


def test_upload_copies_folders_and_files_with_their_digests(store: Store, tmp_path: Path) -> None:
    (tmp_path / "src" / "deep").mkdir(parents=True)
    (tmp_path / "src" / "w.bin").write_bytes(b"w" * 5_000_000)
    (tmp_path / "src" / "deep" / "c.json").write_bytes(b"{}")
    written = store.upload(tmp_path / "src", "train/t/abc", "model")
    assert written == [
        OutputFile(path="model/deep/c.json", size=2, sha256=sha256(b"{}")),
        OutputFile(path="model/w.bin", size=5_000_000, sha256=sha256(b"w" * 5_000_000)),
    ]
    assert store.digest("train/t/abc/model/w.bin") == written[1].sha256
    assert store.upload(tmp_path / "src" / "w.bin", "x")[0].path == "w.bin"
    assert store.local("train/t/abc", written) == tmp_path / "root" / "train/t/abc"
    with pytest.raises(StoreError, match="nothing to upload"):
        store.upload(tmp_path / "absent", "x")


def test_missing_and_broken_files_are_named(store: Store, tmp_path: Path) -> None:
    missing = tmp_path / "root" / "a" / "b"
    with pytest.raises(StoreError, match=f"{missing}: failed while reading: there is no"):
        store.read_bytes("a/b")
    store.write_bytes("a/b", b'{"cut": ')
    with pytest.raises(StoreError, match="a/b: 8 bytes that are not JSON"):
        store.read_json("a/b")
    store.write_bytes("a/latin", b'"\xff"')
    with pytest.raises(StoreError, match="a/latin: 3 bytes that are not JSON"):
        store.read_json("a/latin")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/./b", "a/"])
def test_paths_that_leave_the_root_are_refused(store: Store, path: str) -> None:
    for verb in (store.read_bytes, store.remove, store.list, store.full_path):
        with pytest.raises(ValueError, match="expected a relative path"):
            verb(path)


def test_a_place_that_cannot_be_written_is_refused_with_what_was_tried(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/seekr/store")):
        with pytest.raises(
            StoreError, match=r"cannot be written\. Tried creating a file in "
        ) as caught:
            Store.open(place)
        assert str(place) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_folder_opens_for_reading_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        Store.open(tmp_path)
    assert Store.open(tmp_path, writable=False).list("x") == []


@pytest.mark.parametrize("uri", ["hdfs://host/x", "http://host/x", "ftp://u:secret@h/x"])
def test_unknown_schemes_are_refused_with_what_is_allowed(uri: str) -> None:
    with pytest.raises(
        StoreError, match=r"Allowed: a local path, file://, s3:// or gs://"
    ) as caught:
        Store.open(uri)
    assert "secret" not in str(caught.value)


def test_file_uris_and_relative_paths_open_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "with space"
    monkeypatch.chdir(tmp_path)
    relative = Store.open("with space")
    by_uri = Store.open(f"file://{tmp_path}/with%20space")
    relative.write_bytes("x", b"1")
    assert by_uri.read_bytes("x") == b"1"
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(relative)).read_bytes("x") == b"1"
    assert (folder / "x").read_bytes() == b"1"


def test_google_cloud_uris_are_understood_and_an_unreachable_one_is_an_error() -> None:
    uri = (
        "gs://anonymous@bucket/a/b?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1"
    )
    location = locate(uri)
    assert (location.root, location.shown, location.is_local) == (
        "bucket/a/b",
        "gs://bucket/a/b",
        False,
    )
    with pytest.raises(StoreError, match=r"store gs://bucket/a/b: cannot be written"):
        Store.open(uri)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AK:se%2Fcret@bucket/p?region=x", "s3://***@bucket/p?region=x"),
        (
            "gs://bucket/p?access_token=abc&scheme=http",
            "gs://bucket/p?access_token=***&scheme=http",
        ),
        ("PASSWORD=hunter2 go", "PASSWORD=*** go"),
        ("--hf-token=hf_abcdefghijkl", "--hf-token=***"),
        ("use hf_abcdefghijklmnop", "use ***"),
        ("--tokenizer=bpe max_tokens=5", "--tokenizer=bpe max_tokens=5"),
        ("s3://bucket/no-secret", "s3://bucket/no-secret"),
    ],
)
def test_credentials_are_removed_from_text(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_secret_that_follows_its_flag_is_removed_from_a_command_line() -> None:
    argv = ["seekr", "run", "--api-token", "abc", "--tokenizer", "bpe", "--secret", "--verbose"]
    assert redact_argv(argv) == [*argv[:3], "***", *argv[4:]]


def test_provenance_names_commit_versions_and_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert git_commit("/proc") is None
    git("init", "-q")
    (tmp_path / "stream.yaml").write_text("a")
    git("add", ".")
    git("commit", "-qm", "first")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "stream.yaml").write_text("b")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
    found = Provenance.capture(tmp_path)
    assert found.git_commit == git_commit(tmp_path)
    assert {"python", "torch", "ray", "transformers"} <= found.versions.keys()


def test_peak_memory_sees_children_and_what_was_freed() -> None:
    code = "x = bytearray(80_000_000); import time; time.sleep(0.6)"
    with PeakMemory(interval=0.05) as idle:
        pass
    with PeakMemory(interval=0.05) as busy:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert busy.peak_bytes - idle.peak_bytes > 70_000_000
