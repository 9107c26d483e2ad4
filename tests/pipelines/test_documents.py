"""Documents as rows of a source, and as tokens: what is read, what is bad, what makes them the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from pipelines.forgotten import NOTHING
from pipelines.ingest import _Encoder
from pipelines.inspection import inspect
from pipelines.readers import read_source
from pipelines.rows import BadRow, Columns, SourceRow
from pipelines.rowsets import FOCUS, TRAIN
from pipelines.sources import list_files
from seekr.errors import DataError
from seekr.fact_probes import document_tokens
from seekr.models import byte_tokenizer, load_tokenizer
from seekr.prompts import encode_document, start_ids
from tests.pipelines.streams import make_model

BYTES = byte_tokenizer()
BOS = byte_tokenizer()
BOS.add_special_tokens({"bos_token": "<s>"})
BOS._tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", BOS.bos_token_id)]
)
TEXT, FOCUSED = Columns(text="text"), Columns(text="text", focus="focus")
EOS = 1


def read(folder: Path, columns: Columns, *rows: Any) -> list[SourceRow | BadRow]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_source(str(path), columns))


def test_a_document_is_a_row_without_input_whose_answer_is_the_text(tmp_path: Path) -> None:
    (row,) = read(tmp_path, TEXT, {"text": " a b\n", "input": 7})
    assert isinstance(row, SourceRow)
    assert (row.input, row.references, row.definition) == ("", (" a b\n",), None)
    assert row.focus == ()
    parts = read(tmp_path, FOCUSED, {"text": "a b", "focus": ["b", "a"]})[0]
    assert isinstance(parts, SourceRow) and parts.focus == ("b", "a")


BAD = {
    "blank": ({"text": " \n"}, TEXT, "empty document (column 'text')"),
    "no text": ({"text": 3}, TEXT, "column 'text' holds a number"),
    "missing": ({"other": "a"}, TEXT, "missing column 'text'"),
    "absent focus": ({"text": "a", "focus": "b"}, FOCUSED, "part 1 of column 'focus' is not in"),
    "a part that is absent": ({"text": "ab", "focus": ["a", "c"]}, FOCUSED, "part 2 of column"),
    "blank focus": ({"text": "a b", "focus": " "}, FOCUSED, "empty answer (column 'focus')"),
    "no focus": ({"text": "a", "focus": []}, FOCUSED, "column 'focus' is an empty list"),
    "null focus": ({"text": "a", "focus": None}, FOCUSED, "column 'focus' holds null"),
}


@pytest.mark.parametrize(("row", "columns", "reason"), BAD.values(), ids=list(BAD))
def test_a_document_that_cannot_be_used_is_a_bad_row(
    tmp_path: Path, row: dict[str, Any], columns: Columns, reason: str
) -> None:
    good, bad = read(tmp_path, columns, {"text": "x y", "focus": "x"}, row)
    assert isinstance(good, SourceRow)
    assert isinstance(bad, BadRow) and bad.line == 2 and reason in bad.reason


def test_a_column_that_no_row_has_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'text' \(columns.text\).*'texts'"):
        read(tmp_path, TEXT, {"texts": "a"})
    with pytest.raises(DataError, match=r"no column 'focus' \(columns.focus\)"):
        read(tmp_path, FOCUSED, {"text": "a"})


def test_documents_that_differ_in_text_or_focus_are_different_rows(tmp_path: Path) -> None:
    rows = [{"text": "a b", "focus": f} for f in ("a", "b", ["a", "b"], ["b", "a"], "a")]
    focused = read(tmp_path, FOCUSED, *rows, {"text": "a b c", "focus": "a"})
    ids = [row.row_id for row in focused if isinstance(row, SourceRow)]
    assert len(set(ids)) == 5 and ids[0] == ids[4]
    plain = read(tmp_path, TEXT, *rows)
    assert len({row.row_id for row in plain if isinstance(row, SourceRow)}) == 1
    source = str(tmp_path / "rows.jsonl")
    counted = [
        inspect(source, columns, cache_dir=tmp_path / "cache") for columns in (TEXT, FOCUSED)
    ]
    assert [report.num_duplicates for report in counted] == [4, 1]
    tokenised = [encode_document("a b", BYTES, max_length=9, focus=f) for f in ((), ("a",), ("b",))]
    assert len({row.row_id for row in tokenised}) == 3


def test_columns_of_questions_beside_documents_are_the_usual_ones() -> None:
    both = Columns(text="t", focus="f", input="q", output="a")
    assert both.of_questions == Columns(input="q", output="a")


def test_a_document_s_tokens_are_the_text_and_its_end() -> None:
    row = encode_document("ab", BYTES, max_length=9)
    assert row.input_ids.tolist() == [ord("a") + 2, ord("b") + 2, EOS]
    assert row.prompt_length == 1  # nothing stands before the first token
    started = encode_document("ab", BOS, max_length=9)
    bos = BOS.bos_token_id
    assert started.input_ids.tolist() == [bos, ord("a") + 2, ord("b") + 2, EOS]
    assert started.prompt_length == 1 and row.row_id == started.row_id
    assert row.input_ids.dtype == np.int32 and row.references == ("ab",)


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1, max_size=12), room=st.integers(4, 16), bos=st.booleans())
def test_a_long_document_is_cut_at_its_end_and_still_ends(text: str, room: int, bos: bool) -> None:
    tokenizer = BOS if bos else BYTES
    whole = encode_document(text, tokenizer, max_length=1000).input_ids.tolist()
    found = encode_document(text, tokenizer, max_length=room).input_ids.tolist()
    assert whole[-1] == found[-1] == EOS and len(found) == min(len(whole), room)
    assert found[:-1] == whole[: len(found) - 1]
    if bos:
        assert found[0] == BOS.bos_token_id


def test_what_looks_like_a_control_token_in_a_document_is_text() -> None:
    assert encode_document("a</s>", BYTES, max_length=99).input_ids.tolist().count(EOS) == 1


@pytest.mark.parametrize("max_length", [24, 9])
def test_the_focus_is_kept_as_places_of_tokens_in_the_row(tmp_path: Path, max_length: int) -> None:
    make_model(tmp_path / "model")
    rows = [{"text": "say ab or ab", "focus": "ab"}, {"text": "xy ab", "focus": ["x", "b"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"input": None, "output": None, "definition": None, "text": "text", "focus": "focus"}
    encoder = _Encoder(
        str(tmp_path / "model"), False, {"columns": columns, "max_length": max_length}, NOTHING
    )
    (file,) = list_files(str(tmp_path / "rows.jsonl"))
    found = list(encoder({"kind": TRAIN, "file": file}))
    tokenizer = load_tokenizer(tmp_path / "model")
    for row, record in zip(rows, found, strict=True):
        begin = len(start_ids(tokenizer))
        _, offsets = document_tokens(tokenizer, row["text"])
        parts = [row["focus"]] if isinstance(row["focus"], str) else row["focus"]
        inside = {
            place
            for part in parts
            for place in range(len(row["text"]))
            if any(
                row["text"].startswith(part, s) and s <= place < s + len(part)
                for s in range(place + 1)
            )
        }
        wanted = [begin + t for t, (first, _) in enumerate(offsets.tolist()) if first in inside]
        assert record[FOCUS] == [t for t in wanted if t < len(record["input_ids"]) - 1]
    assert (len(found[0][FOCUS]), len(found[1][FOCUS])) == ((4, 2) if max_length == 24 else (2, 2))
