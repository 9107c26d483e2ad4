"""Reports are right, are remembered only as long as they are true, and judge a source in words."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import inspection
from pipelines.inspection import MAX_LISTED, SourceReport, inspect, require_good
from pipelines.readers import Columns
from pipelines.sources import Layout
from seekr.errors import DataError

SHARED = Path(os.environ.get("SEEKR_SHARED_DATA", Path(__file__).parents[2] / "../shared/data"))
ANY = Columns()
LONG_AGO_NS = 1_700_000_000_000_000_000


def write(path: Path, rows: list[Any], mtime_ns: int | None = LONG_AGO_NS) -> Path:
    """JSON Lines; last changed long ago, so that a cache may trust the time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if mtime_ns is not None:
        os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def good(i: int) -> dict[str, str]:
    return {"input": f"question {i}", "output": f"answer {i}"}


def bad(i: int) -> dict[str, str]:
    return {"input": f"question {i}", "output": ""}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def counts(report: SourceReport) -> tuple[int, int, int]:
    return report.num_rows, report.num_duplicates, report.num_bad


def test_a_report_counts_rows_repeats_and_bad_ones_over_all_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [good(1), good(2), good(1), bad(3)])
    second = write(tmp_path / "b.jsonl", [good(2), bad(4), good(5)])
    report = inspect(tmp_path, ANY)
    assert counts(report) == (3, 2, 2)
    assert report.source == str(tmp_path)
    assert [(bad.file, bad.line) for bad in report.bad] == [(str(first), 4), (str(second), 2)]
    assert [(f.name, f.num_rows, f.num_duplicates, f.num_bad) for f in report.files] == [
        (str(first), 2, 1, 1),
        (str(second), 1, 1, 1),
    ]
    assert report.files[0].layout is Layout.JSONL
    assert report.bad_share == 2 / 7


@given(
    rows=st.lists(
        st.sampled_from(["q1", "q2", "q3", "", None]).map(
            lambda text: {"input": text, "output": "a"}
        )
    )
)
@settings(deadline=None, max_examples=40)
def test_counts_equal_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = write(tmp_path_factory.mktemp("counts") / "rows.jsonl", rows)
    usable = [row["input"] for row in rows if row["input"]]
    expected = (len(set(usable)), len(usable) - len(set(usable)), len(rows) - len(usable))
    assert counts(inspect(path, ANY)) == expected


def test_a_digest_is_of_the_bytes_and_not_of_names_or_places(tmp_path: Path) -> None:
    one = write(tmp_path / "x/rows.jsonl", [good(1)])
    two = write(tmp_path / "x/rows2.jsonl", [good(2)])
    assert inspect(one, ANY).digest == sha256(one)
    both = hashlib.sha256((sha256(one) + sha256(two)).encode()).hexdigest()
    assert inspect(tmp_path / "x", ANY).digest == both
    write(tmp_path / "y/1.jsonl", [good(1)], mtime_ns=None)
    write(tmp_path / "y/2.jsonl", [good(2)], mtime_ns=None)
    assert inspect(tmp_path / "y/*.jsonl", ANY).digest == both
    write(tmp_path / "z/1.jsonl", [good(2)])
    write(tmp_path / "z/2.jsonl", [good(1)])
    assert inspect(tmp_path / "z", ANY).digest != both


def test_all_bad_rows_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [bad(i) for i in range(MAX_LISTED + 30)])
    report = inspect(path, ANY)
    assert report.num_bad == MAX_LISTED + 30
    assert [bad.line for bad in report.bad] == list(range(1, MAX_LISTED + 1))


def test_a_remembered_report_equals_the_one_that_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [good(1), bad(2), {"input": "\u00e9", "output": ""}])
    cache = tmp_path / "made" / "cache"
    report = inspect(path, ANY, cache_dir=cache)
    path.write_bytes(b"x" * path.stat().st_size)  # what only a second reading would notice
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    assert inspect(path, ANY, cache_dir=cache) == report
    assert inspect(path, ANY) != report


@pytest.mark.parametrize("change", ["size", "mtime", "columns", "files", "path"])
def test_a_report_is_forgotten_when_what_it_was_made_of_changes(
    tmp_path: Path, change: str
) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    write(folder / "rows.jsonl", [{**good(1), "other": "text"}])
    inspect(folder, ANY, cache_dir=cache)
    assert len(list(cache.iterdir())) == 1
    columns = ANY
    match change:
        case "size":
            write(folder / "rows.jsonl", [good(1), good(2)])
        case "mtime":
            write(folder / "rows.jsonl", [{**good(2), "other": "text"}], LONG_AGO_NS + 1)
        case "columns":
            columns = Columns(output="other")
        case "files":
            write(folder / "more.jsonl", [good(2)])
        case "path":
            folder = folder.rename(tmp_path / "moved")
    report = inspect(folder, columns, cache_dir=cache)
    assert report == inspect(folder, columns)
    assert len(list(cache.iterdir())) == 2


def test_a_file_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [good(1)], mtime_ns=None)
    inspect(path, ANY, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("left", ["", "{", "[]", "{}", '{"bad": 3, "files": []}'])
def test_what_a_crash_left_in_the_cache_is_read_again(tmp_path: Path, left: str) -> None:
    path = write(tmp_path / "rows.jsonl", [good(1), bad(2)])
    cache = tmp_path / "cache"
    report = inspect(path, ANY, cache_dir=cache)
    (entry,) = cache.iterdir()
    entry.write_text(left)
    assert inspect(path, ANY, cache_dir=cache) == report
    assert [json.loads(entry.read_text())["digest"]] == [report.digest]


def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", [good(1)])
    read_rows = inspection.read_rows

    def read_while_written(*args: Any) -> Any:
        yield from read_rows(*args)
        write(path, [good(1), good(2)], mtime_ns=None)

    monkeypatch.setattr(inspection, "read_rows", read_while_written)
    with pytest.raises(DataError, match="changed while it was read; run again"):
        inspect(path, ANY, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        inspect(tmp_path / "none.jsonl", ANY)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_source_is_accepted_up_to_the_allowed_share(tmp_path: Path, share: float) -> None:
    num_bad = int(share * 4)
    rows = [bad(i) for i in range(num_bad)] + [good(i) for i in range(4 - num_bad or 1)]
    report = inspect(write(tmp_path / "rows.jsonl", rows), ANY)
    require_good(report, report.bad_share, "tasks.news.train")
    if num_bad:
        with pytest.raises(DataError):
            require_good(report, report.bad_share - 1e-9, "tasks.news.train")


def test_a_refusal_says_what_was_found_what_is_allowed_and_where_to_look(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [good(1), *[bad(i) for i in range(2, 7)], good(7)])
    with pytest.raises(DataError) as caught:
        require_good(inspect(path, ANY), 0.01, "tasks.news.train")
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"tasks.news.train: {path} has 5 bad rows of 7 (71.43%); allowed are 1.00% "
        "(max_bad_share). Correct the rows, or allow more:"
    )
    assert lines[1] == (
        f'  {path}:2: empty answer (column \'output\'): {{"input": "question 2", "output": ""}}'
    )
    assert lines[4:] == ["  and 2 more"]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_source_is_refused_whatever_is_allowed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"test data: .*rows\.jsonl is empty .* {len(text)} bytes"):
        require_good(inspect(path, ANY), 1.0, "test data")


def test_a_source_without_a_usable_row_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [bad(1), "text"])
    with pytest.raises(DataError, match="has no usable row; all 2 are bad"):
        require_good(inspect(path, ANY), 1.0, "train data")


def test_a_repeated_row_is_not_a_bad_one(tmp_path: Path) -> None:
    report = inspect(write(tmp_path / "rows.jsonl", [good(1)] * 5), ANY)
    assert counts(report) == (1, 4, 0)
    require_good(report, 0.0, "train data")


def test_superni_has_six_bad_rows_in_one_file() -> None:
    folder = SHARED / "superni"
    if not folder.is_dir():
        pytest.skip(f"no SuperNI data in {folder}; set SEEKR_SHARED_DATA")
    train = inspect(folder / "*/train.json", ANY)
    test = inspect(folder / "*/test.json", ANY)
    assert counts(train) == (11_741 - 6, 0, 6)
    assert counts(test) == (1_197, 0, 0)
    assert [bad.line for bad in train.bad] == [80, 371, 429, 724, 880, 940]
    assert {Path(bad.file).parent.name for bad in train.bad} == {
        "task511_reddit_tifu_long_text_summarization"
    }
    require_good(train, 0.001, "SuperNI")
