"""Every layout as a real file: what is read, what is refused, and in which words."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs
from pyarrow import parquet

from pipelines.readers import BadRow, Columns, SourceRow, read_rows, read_source
from pipelines.sources import Layout, detect_layout, list_files, split_lines
from seekr.errors import DataError

REPOSITORY = Path(__file__).parents[2]
SHARED = Path(os.environ.get("SEEKR_SHARED_DATA", REPOSITORY / "../shared/data"))
ANY = Columns()
# sapt.md section 7.1: train and test rows per task; task511 has six rows with an empty answer.
SUPERNI_ROWS = {
    "task002_quoref_answer_generation": (1000, 100),
    "task073_commonsenseqa_answer_generation": (975, 100),
    "task1290_xsum_summarization": (1000, 100),
    "task1510_evalution_relation_extraction": (1000, 100),
    "task1572_samsum_summary": (160, 20),
    "task1590_diplomacy_text_generation": (126, 16),
    "task1687_sentiment140_classification": (1000, 100),
    "task1729_personachat_generate_next": (1000, 100),
    "task181_outcome_extraction": (338, 43),
    "task363_sst2_polarity_classification": (1000, 100),
    "task511_reddit_tifu_long_text_summarization": (1000, 100),
    "task591_sciq_answer_generation": (1000, 100),
    "task639_multi_woz_user_utterance_generation": (142, 18),
    "task748_glucose_reverse_cause_event_detection": (1000, 100),
    "task875_emotion_classification": (1000, 100),
}


def content(rows: Iterator[SourceRow | BadRow]) -> list[tuple[Any, ...]]:
    """Good rows without their place; a bad row is a failure of the test."""
    found = []
    for row in rows:
        assert isinstance(row, SourceRow), row
        found.append((row.input, row.references, row.definition))
    return found


def bad_rows(path: Path, columns: Columns = ANY) -> list[BadRow]:
    return [row for row in read_source(path, columns) if isinstance(row, BadRow)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


TWO_ROWS = [{"input": "2+2", "output": "4"}, {"input": "capital?", "output": ["Rome", "Roma"]}]
TWO_CONTENTS = [("2+2", ("4",), None), ("capital?", ("Rome", "Roma"), None)]


def write_two_rows(folder: Path, layout: Layout) -> Path:
    """The same two rows in each layout, written by the library that owns the layout."""
    lists = [{**row, "output": [row["output"]]} for row in TWO_ROWS[:1]] + TWO_ROWS[1:]
    match layout:
        case Layout.JSONL:
            return write_jsonl(folder / "rows.jsonl", TWO_ROWS)
        case Layout.JSON:
            path = folder / "rows.json"
            path.write_text(json.dumps(TWO_ROWS, indent=1), encoding="utf-8")
        case Layout.INSTRUCTIONS:
            path = folder / "rows.json"
            path.write_text(json.dumps({"Source": ["s"], "Instances": TWO_ROWS}), encoding="utf-8")
        case Layout.PARQUET:
            path = folder / "rows.parquet"
            parquet.write_table(pa.Table.from_pylist(lists), path, row_group_size=1)
        case Layout.ARROW:
            datasets = pytest.importorskip("datasets")
            datasets.disable_progress_bars()
            path = folder / "rows"
            datasets.Dataset.from_list(lists).save_to_disk(path, num_shards=2)
    return path


@pytest.mark.parametrize("layout", list(Layout))
def test_the_same_rows_come_out_of_every_layout(tmp_path: Path, layout: Layout) -> None:
    path = write_two_rows(tmp_path, layout)
    assert detect_layout(path) is layout
    assert content(read_source(path, ANY)) == TWO_CONTENTS


@pytest.mark.parametrize("layout", list(Layout))
def test_row_ids_do_not_depend_on_layout_or_place(tmp_path: Path, layout: Layout) -> None:
    rows = read_source(write_two_rows(tmp_path, layout), ANY)
    ids = [row.row_id for row in rows if isinstance(row, SourceRow)]
    expected = [
        hashlib.sha256(text.encode()).hexdigest()[:32]
        for text in ('["2+2",["4"],null]', '["capital?",["Rome","Roma"],null]')
    ]
    assert ids == expected


@pytest.mark.parametrize("layout", list(Layout))
def test_the_bytes_fed_to_a_digest_are_the_files_bytes(tmp_path: Path, layout: Layout) -> None:
    for file in list_files(write_two_rows(tmp_path, layout)):
        digest = hashlib.sha256()
        assert list(read_rows(file, ANY, digest.update))
        assert digest.hexdigest() == hashlib.sha256(Path(file.path).read_bytes()).hexdigest()


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"input": texts, "output": texts | st.lists(texts, min_size=1, max_size=3)}
        ),
        min_size=1,
        max_size=8,
    ),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n", " \n"]),
    bom=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_jsonl_written_and_read_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    ascii_only: bool,
    end: str,
    bom: bool,
) -> None:
    path = tmp_path_factory.mktemp("round") / "rows.jsonl"
    text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    expected = [
        (row["input"], (row["output"],) if isinstance(row["output"], str) else tuple(row["output"]))
        for row in rows
    ]
    assert [row[:2] for row in content(read_source(path, ANY))] == expected


@given(data=st.binary(max_size=60), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_lines_do_not_depend_on_where_chunks_end(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(data)]
    chunks = [data[a:b] for a, b in pairwise(edges)]
    assert list(split_lines(iter(chunks))) == data.split(b"\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"input": "a", "output": }', "malformed JSON: Expecting value at column 26"),
        (b'{"input": "a"', "malformed JSON: Expecting ',' delimiter at column 14"),
        (b"[" * 100_000, "malformed JSON: "),
        (b'{"input": ' + b"9" * 5000 + b"}", "malformed JSON: "),
        (b'["a", "b"]', "not an object but a list"),
        (b"null", "not an object but null"),
        (b"3", "not an object but a number"),
        (b'{"input": "a"}', "missing column 'output'"),
        (b'{"output": "a"}', "missing column 'input'"),
        (b'{"input": 3, "output": "a"}', "wrong type: column 'input' holds a number, not a string"),
        (b'{"input": ["a"], "output": "a"}', "wrong type: column 'input' holds a list, not a str"),
        (b'{"input": "a", "output": null}', "wrong type: column 'output' holds null, not a string"),
        (b'{"input": "a", "output": ["b", true]}', "wrong type: column 'output' holds a boolean"),
        (b'{"input": "a", "output": [["b"]]}', "wrong type: column 'output' holds a list, not a"),
        (b'{"input": " \\n", "output": "a"}', "empty input"),
        (b'{"input": "a", "output": ""}', "empty answer"),
        (b'{"input": "a", "output": ["b", " "]}', "empty answer"),
        (b'{"input": "a", "output": []}', "no references"),
        (b'{"input": "caf\xe9", "output": "a"}', "not UTF-8 at byte 15"),
        (b'{"input": "\\ud83d", "output": "a"}', "not UTF-8: column 'input' holds a lone \\ud83d"),
    ],
)
def test_a_bad_line_is_named_and_its_neighbours_are_kept(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    good = b'{"input": "q", "output": "a"}'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good, b"", line, good]))
    first, bad, last = read_source(path, ANY)
    assert isinstance(first, SourceRow) and first.line == 1
    assert isinstance(last, SourceRow) and last.line == 4
    assert isinstance(bad, BadRow)
    assert (bad.file, bad.line) == (str(path), 3)
    assert bad.reason.startswith(reason)
    assert 0 < len(bad.text) <= 200 and bad.text.encode()
    assert str(bad) == f"{path}:3: {bad.reason}"


def test_an_excerpt_is_the_beginning_of_the_bad_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input": "é" * 500, "output": ""}])
    (bad,) = bad_rows(path)
    assert bad.text == '{"input": "' + "é" * 186 + "..."


def test_a_list_is_counted_by_rows_and_its_items_judged_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "q", "answer": "a"}, "text", {"prompt": "q"}]))
    assert [(bad.line, bad.reason) for bad in bad_rows(path)] == [
        (2, "not an object but a string"),
        (3, "missing column 'answer'"),
    ]


def test_a_natural_instructions_header_defines_its_instances(tmp_path: Path) -> None:
    header = {"Definition": ["Answer.", "Be brief."], "Positive Examples": []}
    instances = [{"id": "1", "input": "q", "output": ["a", "b"]}, {"input": "r", "output": "c"}]
    for indent in (None, 2):
        path = tmp_path / f"task{indent}.json"
        path.write_text(json.dumps({**header, "Instances": instances}, indent=indent))
        assert detect_layout(path) is Layout.INSTRUCTIONS
        definition = "Answer.\nBe brief."
        expected = [("q", ("a", "b"), definition), ("r", ("c",), definition)]
        assert content(read_source(path, ANY)) == expected


@pytest.mark.parametrize("header", [{}, {"Definition": []}, {"Definition": ""}])
def test_an_empty_header_is_no_definition(tmp_path: Path, header: dict[str, Any]) -> None:
    path = tmp_path / "task.json"
    path.write_text(json.dumps({**header, "Instances": [{"input": "q", "output": "a"}]}))
    assert content(read_source(path, ANY)) == [("q", ("a",), None)]


def test_json_lines_called_json_are_recognised(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.json", TWO_ROWS)
    assert detect_layout(path) is Layout.JSONL
    assert content(read_source(path, ANY)) == TWO_CONTENTS


def test_trace_columns_are_found_without_being_named(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"prompt": "q", "answer": "a"}]))
    assert content(read_source(path, ANY)) == [("q", ("a",), None)]


def test_named_columns_are_read_and_others_ignored(tmp_path: Path) -> None:
    row = {"input": "x", "q": "question", "gold": ["a"], "rule": "be kind", "image": 3}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    columns = Columns(input="q", output="gold", definition="rule")
    assert content(read_source(path, columns)) == [("question", ("a",), "be kind")]


@pytest.mark.parametrize("layout", list(Layout))
def test_a_named_column_that_is_absent_is_refused_with_the_nearest(
    tmp_path: Path, layout: Layout
) -> None:
    path = write_two_rows(tmp_path, layout)
    message = r"no column 'imput' \(columns.input\); .* input, output; did you mean 'input'\?"
    with pytest.raises(DataError, match=message):
        list(read_source(path, Columns(input="imput")))


def test_a_column_absent_from_one_row_only_is_that_rows_fault(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "a"}, {"q": "a", "gold": "b"}])
    assert [bad.line for bad in bad_rows(path, Columns(input="q", output="gold"))] == [1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "output": "b"}, r"no input column \(looked for input or prompt\)"),
        ({"input": "a", "label": "b"}, r"no output column .* found: input, label; set columns.out"),
        ({"input": "a", "prompt": "b", "output": "c"}, "has both input and prompt"),
        ({}, "columns found: none"),
    ],
)
def test_usual_columns_are_never_guessed(tmp_path: Path, row: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_source(write_jsonl(tmp_path / "rows.jsonl", [row]), ANY))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"input": "a",\n  "output": }]', "Expecting value at line 2 column 13"),
        ('{"input": "a",\n "output": "b"}', 'without a list under "Instances"'),
        ('{"Instances": {}}', 'without a list under "Instances"'),
        ('"text"', "holds a string; allowed in .json are"),
        ("[" * 100_000, "malformed JSON"),
    ],
)
def test_a_document_that_cannot_hold_rows_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_source(path, ANY))


def test_a_document_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes('[{"input": "a",\n "output": "é"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 \(line 2\)"):
        list(read_source(path, ANY))


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff", "\ufeff\n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_of_blanks_has_no_rows(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert list(read_source(path, ANY)) == []


def test_parquet_types_that_hold_text_are_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            "input": pa.array(["a", "b"]).dictionary_encode(),
            "output": pa.array([["x"], ["y", "z"]], pa.large_list(pa.large_string())),
            "definition": pa.array(["d", None]),
            "image": pa.array([b"1", b"2"]),
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = content(read_source(tmp_path / "rows.parquet", ANY))
    assert rows == [("a", ("x",), "d"), ("b", ("y", "z"), None)]


def test_bad_parquet_rows_are_counted_across_row_groups(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xe9t\xe9"]).buffers())
    inputs = pa.chunked_array([pa.array(["q"] * 600 + [None, ""]), broken])
    table = pa.table({"input": inputs, "output": ["a"] * 603})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=500)
    assert [(bad.line, bad.reason) for bad in bad_rows(tmp_path / "rows.parquet")] == [
        (601, "wrong type: column 'input' holds null, not a string"),
        (602, "empty input (column 'input')"),
        (603, "not UTF-8 at byte 1"),
    ]


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"text" * 100])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(damage)
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read"):
        list(read_source(path, ANY))


def test_a_truncated_dataset_shard_is_refused(tmp_path: Path) -> None:
    shard = Path(list_files(write_two_rows(tmp_path, Layout.ARROW))[1].path)
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow cannot be read"):
        list(read_source(tmp_path / "rows", ANY))
    shard.unlink()
    with pytest.raises(DataError, match=r"00001-of-00002\.arrow named by state\.json is missing"):
        list(read_source(tmp_path / "rows", ANY))


def test_a_dataset_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list([{"prompt": "q", "answer": "a"}])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "all")
    with pytest.raises(DataError, match=r"splits train, test\. .* write .*/all/train"):
        list_files(tmp_path / "all")
    assert content(read_source(tmp_path / "all/test", ANY)) == [("q", ("a",), None)]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.jsonl", "b/2.jsonl", "b/1.jsonl", "a.jsonl", "_SUCCESS", ".hidden.jsonl"):
        write_jsonl(tmp_path / name, [{"input": name, "output": "a"}])
    names = [row[0] for row in content(read_source(tmp_path, ANY))]
    assert names == ["a.jsonl", "b/1.jsonl", "b/2.jsonl", "c.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl", ["a.jsonl", "c.jsonl"]),
        ("[bc]*", ["b/1.jsonl", "b/d/2.jsonl", "c.jsonl"]),
        ("*/*.jsonl", ["b/1.jsonl"]),
        ("**/?.jsonl", ["a.jsonl", "b/1.jsonl", "b/d/2.jsonl", "c.jsonl"]),
        ("b/**/2.jsonl", ["b/d/2.jsonl"]),
    ],
)
def test_a_glob_selects_by_path_segments(tmp_path: Path, pattern: str, found: list[str]) -> None:
    (tmp_path / "b/d").mkdir(parents=True)
    for name in ("a.jsonl", "b/1.jsonl", "b/d/2.jsonl", "c.jsonl"):
        write_jsonl(tmp_path / name, TWO_ROWS)
    names = [str(Path(file.name).relative_to(tmp_path)) for file in list_files(tmp_path / pattern)]
    assert names == found


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a[1].jsonl", TWO_ROWS)
    assert len(list_files(tmp_path / "a[1].jsonl")) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.jsonl", "absent.jsonl does not exist"),
        ("*.jsonl", r"/\*.jsonl does not exist"),
        ("empty", "empty holds no data files"),
        ("rows.csv", r"has the extension '.csv'. Allowed are .jsonl, .ndjson, .json, .parquet"),
        ("mixed", r"README.md has the extension '.md'.*folder/\*.jsonl"),
        ("nfs://host/rows.jsonl", "nfs://host/rows.jsonl cannot be opened"),
    ],
)
def test_a_source_that_is_not_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    write_jsonl(tmp_path / "mixed/rows.jsonl", TWO_ROWS)
    (tmp_path / "mixed/README.md").write_text("about")
    (tmp_path / "rows.csv").write_text("input,output")
    with pytest.raises(DataError, match=message):
        list_files(source)


def test_reading_jsonl_and_parquet_holds_a_piece_at_a_time(tmp_path: Path) -> None:
    rows = [{"input": f"{i} " + "x" * 1000, "output": "a"} for i in range(12_000)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=500)
    del rows
    for name in ("rows.jsonl", "rows.parquet"):
        next(read_source(tmp_path / name, ANY))  # what is imported lazily is not the rows' memory
        arrow_before = pa.total_allocated_bytes()
        arrow_peak = 0
        tracemalloc.start()
        for i, _ in enumerate(read_source(tmp_path / name, ANY)):
            if i % 100 == 0:
                arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - arrow_before)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak + arrow_peak < 6_000_000, name  # the text alone is 12 MB


def test_an_object_store_is_read_and_its_credentials_stay_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_module = pytest.importorskip("moto.server")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        store = pafs.S3FileSystem(
            access_key="AKIAKEY",
            secret_key="hunter2",
            endpoint_override=f"{host}:{port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        store.create_dir("data")
        for layout in (Layout.JSONL, Layout.PARQUET, Layout.ARROW):
            (tmp_path / "task" / layout).mkdir(parents=True)
            write_two_rows(tmp_path / "task" / layout, layout)
        pafs.copy_files(str(tmp_path), "data", destination_filesystem=store, use_threads=False)
        base = "s3://AKIAKEY:hunter2@data"
        assert content(read_source(f"{base}/task{options}", ANY)) == TWO_CONTENTS * 3
        (file,) = list_files(f"{base}/task/*/*.jsonl{options}")
        assert file.name == "s3://data/task/jsonl/rows.jsonl"
        assert file.mtime_ns is not None and file.size > 0
        assert "hunter2" not in repr(file)
        with pytest.raises(DataError, match=r"s3://data/none\.jsonl does not exist") as caught:
            list_files(f"{base}/none.jsonl{options}")
        assert "hunter2" not in str(caught.value)
    finally:
        server.stop()


def test_superni_files_have_the_published_sizes() -> None:
    folder = SHARED / "superni"
    if not folder.is_dir():
        pytest.skip(f"no SuperNI data in {folder}; set SEEKR_SHARED_DATA")
    for task, sizes in SUPERNI_ROWS.items():
        for split, size in zip(("train", "test"), sizes, strict=True):
            rows = list(read_source(folder / task / f"{split}.json", ANY))
            bad = [row for row in rows if isinstance(row, BadRow)]
            assert len(rows) == size, (task, split)
            assert len(bad) == (6 if task.startswith("task511") and split == "train" else 0)
            assert {row.reason for row in bad} <= {"empty answer (column 'output')"}
            assert all(row.definition for row in rows if isinstance(row, SourceRow))


def test_lama_files_are_read_by_naming_their_columns() -> None:
    path = SHARED / "lama_ckl" / "variant.jsonl"
    if not path.is_file():
        pytest.skip(f"no LAMA-ckl data at {path}; set SEEKR_SHARED_DATA")
    rows = content(read_source(path, Columns(input="masked_evidence", output="object")))
    assert len(rows) == 500


def test_readers_import_neither_ray_nor_torch() -> None:
    code = (
        "import sys, pipelines.inspection;"
        "print([name for name in ('ray', 'torch', 'datasets', 'pandas') if name in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
