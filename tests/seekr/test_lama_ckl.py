"""LAMA-ckl's and TemporalWiki's rows: what is refused, what is counted, and the published files."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seekr.errors import DataError
from seekr.fact_probes import make_probe
from seekr.knowledge import constant_floor
from seekr.lama_ckl import (
    Fact,
    Oddities,
    Shared,
    meta_training_facts,
    oddities,
    parse_fact,
    parse_statement,
    read_facts,
    read_statements,
    schematic_sentence,
    shared,
)
from seekr.models import byte_tokenizer

SHARED = Path(os.environ.get("SEEKR_SHARED_DATA", Path(__file__).parents[2] / "../shared/data"))
ROW: dict[str, Any] = {
    "uuid": "u-1",
    "evidence": "Long ago the (harp) was played, says Ann Harper of the harp.",
    "task_descriptive": "Ann Harper plays harp .",
    "task_schematic": schematic_sentence("Ann Harper", "instrument", "harp"),
    "subject": "Ann Harper",
    "relation_label": "instrument",
    "object": "harp",
    "scores": {"unused": 1},
}
FACT = parse_fact(ROW, "here")


def test_a_row_becomes_a_document_two_sentences_and_an_answer() -> None:
    fact = parse_fact(ROW, "here")
    assert fact == Fact(
        row_id="u-1",
        document=ROW["evidence"],
        descriptive=ROW["task_descriptive"],
        schematic=ROW["task_schematic"],
        subject="Ann Harper",
        relation="instrument",
        answer="harp",
    )
    assert FACT.sentence("descriptive") == ROW["task_descriptive"]
    assert FACT.sentence("schematic") == ROW["task_schematic"]


@pytest.mark.parametrize("field", sorted(ROW.keys() - {"scores"}))
@pytest.mark.parametrize("value", [None, 3, "", "  "])
def test_a_field_that_is_missing_or_no_text_is_named(field: str, value: object) -> None:
    with pytest.raises(DataError, match=f"f.jsonl line 3: .*{field}"):
        parse_fact(ROW | {field: value}, "f.jsonl line 3")
    with pytest.raises(DataError, match=f"has no field '{field}', but .*"):
        parse_fact({name: ROW[name] for name in ROW if name != field}, "f.jsonl line 3")


@pytest.mark.parametrize("field", ["evidence", "task_descriptive", "task_schematic"])
def test_an_answer_that_a_text_lacks_is_refused(field: str) -> None:
    with pytest.raises(DataError, match=f"'harp' is not in {field} 'she sings'"):
        parse_fact(ROW | {field: "she sings"}, "here")


def test_files_are_read_line_by_line_and_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{json.dumps(ROW | {'uuid': 'u-2'})}\n")
    assert read_facts(path) == [FACT, replace(FACT, row_id="u-2")]
    for text, message in (
        ("", "no rows"),
        (f"{json.dumps(ROW)}\n{{", "line 2 is malformed"),
        ("[1]", "line 1: the row is list"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_facts(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_facts(tmp_path / "none.jsonl")


def test_a_temporalwiki_probe_is_asked_as_a_form_that_ends_with_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "changed.jsonl"
    row = {"subject": "Mali", "relation": "head of Mali", "object": "Mali"}
    path.write_text(json.dumps(row))
    (statement,) = read_statements(path)
    assert statement.sentence.endswith(
        "subject is Mali , relation is head of Mali , object is Mali"
    )
    probe = make_probe(byte_tokenizer(), statement.sentence, statement.answer)
    assert probe.positions[-1] == len(probe.input_ids) - 1
    with pytest.raises(DataError, match="here: the row has no field 'object'"):
        parse_statement({"subject": "a", "relation": "b"}, "here")


def test_what_is_odd_is_counted() -> None:
    plain = replace(
        FACT,
        row_id="u-2",
        subject="Bob",
        document="Bob has a harp.",
        descriptive="Bob plays harp .",
    )
    joined = replace(plain, row_id="u-3", document='Bob has a "harp".')
    again = replace(plain, document="Bob: harp")
    in_subject = replace(
        plain, row_id="u-4", subject="Bob harp", descriptive="Bob harp plays harp ."
    )
    assert oddities([FACT, plain, joined, again, in_subject]) == Oddities(
        repeated_answer=1,
        joined_answer=1,
        answer_in_subject=1,
        repeated_sentence_answer=1,
        repeated_document=1,
        repeated_row_id=1,
    )


def test_pairs_for_a_weighter_share_no_row_and_no_document_with_what_is_evaluated() -> None:
    others = [replace(FACT, row_id=f"v-{n}", document=f"harp {n}") for n in range(4)]
    asked, kept = [replace(others[0], document="harp")], [replace(FACT, document="harp 1")]
    assert meta_training_facts([*others, FACT], asked, kept) == others[2:]
    assert shared([*others, FACT], asked) == Shared(row_ids=1, documents=0, subjects=1)


@pytest.fixture(scope="module")
def published() -> dict[str, list[Fact]]:
    folder = SHARED / "lama_ckl"
    if not folder.is_dir():
        pytest.skip(f"no LAMA-ckl data in {folder}; set SEEKR_SHARED_DATA")
    names = ("variant", "invariant_descriptive", "invariant_schematic")
    return {name: read_facts(folder / f"{name}.jsonl") for name in names}


def test_the_published_files_have_the_sizes_and_quirks_that_are_known(
    published: dict[str, list[Fact]],
) -> None:
    assert {name: len(facts) for name, facts in published.items()} == dict.fromkeys(published, 500)
    new, old = (oddities(published[name]) for name in ("variant", "invariant_descriptive"))
    assert (new.repeated_answer, new.joined_answer) == (91, 22)
    assert (old.joined_answer, old.answer_in_subject) == (47, 108)
    assert new.repeated_row_id == old.repeated_row_id == 0
    both = shared(published["variant"], published["invariant_descriptive"])
    assert both == Shared(row_ids=0, documents=7, subjects=23)
    invariant = shared(published["invariant_descriptive"], published["invariant_schematic"])
    assert invariant.row_ids == 64


def test_402_published_rows_are_left_for_training_a_weighter(
    published: dict[str, list[Fact]],
) -> None:
    evaluated = published["variant"], published["invariant_descriptive"]
    left = meta_training_facts(published["invariant_schematic"], *evaluated)
    assert len(left) == 402
    for facts in evaluated:
        found = shared(left, facts)
        assert (found.row_ids, found.documents) == (0, 0)


def test_every_published_sentence_can_be_asked_and_the_answer_is_what_is_marked(
    published: dict[str, list[Fact]],
) -> None:
    tokenizer = byte_tokenizer()
    for facts in published.values():
        for fact in facts:
            assert fact.schematic == schematic_sentence(fact.subject, fact.relation, fact.answer)
            probe = make_probe(tokenizer, fact.descriptive, fact.answer, row_id=fact.row_id)
            assert bytes(int(token) - 2 for token in probe.answer_ids).decode() == fact.answer


def test_the_constant_answer_jazz_is_right_for_57_of_the_published_facts(
    published: dict[str, list[Fact]],
) -> None:
    number = {answer: n for n, answer in enumerate({f.answer: None for f in published["variant"]})}
    floor = constant_floor([[number[f.answer]] for f in published["variant"]])
    assert floor.accuracy == 57 / 500 and floor.answer == (number["jazz"],)
    assert Counter(f.relation for f in published["variant"]).most_common(1) == [("genre", 82)]
