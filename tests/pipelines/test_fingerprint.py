"""Fingerprints are the same in every process, refuse what has no text, and say what differs."""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import fingerprint as fp
from pipelines.fingerprint import ABSENT, Change, canonical_json, diff, file_digest, folder_digest
from seekr.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class Mode(enum.Enum):
    PAPER = "paper"


@dataclass(frozen=True)
class Budget:
    layers: int
    mode: Mode


def test_the_fingerprint_of_a_known_value_never_changes() -> None:
    # Changing canonical JSON would orphan every result in every store.
    value = {"b": [1, 2.5, None, True], "a": {"name": "t\u00e4sk", "rate": 1e-05}}
    text = '{"a":{"name":"t\\u00e4sk","rate":1e-05},"b":[1,2.5,null,true]}'
    assert canonical_json(value) == text
    assert fp.fingerprint(value) == "0f5527dff8d98dff1dc3"


def test_another_process_with_another_hash_seed_finds_the_same_fingerprint() -> None:
    value = {f"key{i}": {"x": i * 0.1, "y": [i, str(i)]} for i in range(50)}
    code = (
        "import json, sys; from pipelines.fingerprint import fingerprint; "
        "print(fingerprint(json.load(sys.stdin)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(dict(reversed(value.items()))),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "77"},
    )
    assert done.stdout.strip() == fp.fingerprint(value)


@given(values)
def test_a_value_read_back_from_a_record_has_the_same_fingerprint(value: object) -> None:
    assert fp.fingerprint(json.loads(canonical_json(value))) == fp.fingerprint(value)


@given(values)
def test_a_value_does_not_differ_from_itself(value: object) -> None:
    assert diff(value, json.loads(json.dumps(value))) == []


@given(values, values)
def test_values_differ_exactly_when_their_fingerprints_do(old: object, new: object) -> None:
    assert (diff(old, new) == []) == (fp.fingerprint(old) == fp.fingerprint(new))


def test_tuples_enums_paths_and_dataclasses_are_understood() -> None:
    rich = {"budget": Budget(layers=3, mode=Mode.PAPER), "p": PurePosixPath("a/b"), "t": (1, (2,))}
    same = {"budget": {"layers": 3, "mode": "paper"}, "p": "a/b", "t": [1, [2]]}
    assert fp.plain(rich) == same
    assert fp.fingerprint(rich) == fp.fingerprint(same)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "builtins.set"),
        (b"bytes", "builtins.bytes"),
        (object(), "builtins.object"),
        (lambda: None, "builtins.function"),
        (Budget, "builtins.type"),
        (np.float64(0.5), "numpy.float64"),
        (np.arange(3), "numpy.ndarray"),
        (1j, "builtins.complex"),
    ],
)
def test_other_types_are_refused_with_place_type_and_remedy(value: object, named: str) -> None:
    with pytest.raises(ConfigError, match=r"value\.method\.heads\.1: ") as caught:
        fp.fingerprint({"method": {"heads": [0, value]}})
    assert named in str(caught.value)
    assert "Convert it first" in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_does_not_have_are_refused(number: float) -> None:
    with pytest.raises(ConfigError, match=r"value\.lr: found"):
        fp.fingerprint({"lr": number})


def test_keys_that_are_not_strings_are_refused() -> None:
    with pytest.raises(ConfigError, match="key 1 is of type int"):
        fp.fingerprint({"a": {1: "x"}})


def test_types_of_equal_value_are_told_apart() -> None:
    assert len({fp.fingerprint(value) for value in (1, 1.0, True, "1", [1], None, "null")}) == 7


def test_a_difference_names_every_field_by_its_path() -> None:
    old = {"method": {"layer_budget": 24, "heads": [1, 2, 3]}, "gone": None, "same": 1}
    new = {"method": {"layer_budget": 16, "heads": [1, 9]}, "added": {"x": 1}, "same": 1}
    assert diff(old, new) == [
        Change(path="added", old=ABSENT, new={"x": 1}),
        Change(path="gone", old=None, new=ABSENT),
        Change(path="method.heads.1", old=2, new=9),
        Change(path="method.heads.2", old=3, new=ABSENT),
        Change(path="method.layer_budget", old=24, new=16),
    ]
    assert str(diff(old, new)[-1]) == "method.layer_budget 24 -> 16"
    assert str(diff(old, new)[1]) == "gone null -> (absent)"


def aged(path: Path, content: bytes, seconds: float = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_a_folder_digest_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        aged(tmp_path / name / "weights" / "a.bin", b"aaa", seconds=len(name) * 100)
        aged(tmp_path / name / "config.json", b"{}")
    (tmp_path / "two" / ".cache").mkdir()
    aged(tmp_path / "two" / ".cache" / "junk", b"junk")
    first = folder_digest(tmp_path / "one")
    assert first == folder_digest(tmp_path / "two")

    aged(tmp_path / "two" / "weights" / "a.bin", b"aab")
    assert folder_digest(tmp_path / "two") != first
    aged(tmp_path / "two" / "weights" / "a.bin", b"aaa")
    assert folder_digest(tmp_path / "two") == first
    (tmp_path / "two" / "config.json").rename(tmp_path / "two" / "settings.json")
    assert folder_digest(tmp_path / "two") != first


def test_linked_files_count_by_content_and_circles_are_refused(tmp_path: Path) -> None:
    aged(tmp_path / "blobs" / "b1", b"weights")
    aged(tmp_path / "plain" / "model.bin", b"weights")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.bin").symlink_to(tmp_path / "blobs" / "b1")
    assert folder_digest(tmp_path / "linked") == folder_digest(tmp_path / "plain")
    (tmp_path / "linked" / "again").symlink_to(tmp_path / "linked")
    with pytest.raises(DataError, match="leads back"):
        folder_digest(tmp_path / "linked")


def test_the_cache_spares_reading_and_notices_every_write(tmp_path: Path) -> None:
    model, cache = aged(tmp_path / "model.bin", b"version 1"), tmp_path / "cache" / "digests.json"
    first = file_digest(model, cache)
    # The proof that the file is not read again: a false digest in the cache is believed.
    book = json.loads(cache.read_text())
    (entry,) = book.values()
    cache.write_text(json.dumps({key: [*entry[:2], "f" * 64] for key in book}))
    assert file_digest(model, cache) == "f" * 64
    aged(model, b"version 2", seconds=30)
    second = file_digest(model, cache)
    assert second not in (first, "f" * 64)
    assert second == file_digest(model)


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    # It could change again within the resolution of its time stamp and look the same.
    cache = tmp_path / "digests.json"
    (tmp_path / "fresh").write_bytes(b"x")
    file_digest(tmp_path / "fresh", cache)
    assert not cache.exists()


def test_a_damaged_cache_is_replaced(tmp_path: Path) -> None:
    model, cache = aged(tmp_path / "model.bin", b"w"), tmp_path / "digests.json"
    cache.write_text("{ not json")
    assert file_digest(model, cache) == file_digest(model)
    assert json.loads(cache.read_text())


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_folders_without_data_are_refused(tmp_path: Path, make: str) -> None:
    if make == "empty":
        aged(tmp_path / "empty" / ".hidden", b"x")
    with pytest.raises(DataError, match=str(tmp_path / make)):
        folder_digest(tmp_path / make)
    with pytest.raises(DataError, match="cannot be read"):
        file_digest(tmp_path / make / "file")


def test_importing_the_pipeline_core_is_quick_and_light() -> None:
    code = (
        "import time; start = time.perf_counter(); import pipelines.explain, sys; "
        "took = time.perf_counter() - start; "
        "heavy = [m for m in ('torch', 'transformers', 'ray', 'mlflow') if m in sys.modules]; "
        "assert not heavy, heavy; print(took)"
    )
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(runs) < 0.5, runs
