"""Planted-fact data: what is where, that sets share no subject, and that every word has a token."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.planted_facts.data import Row, fact_span, planted_facts, write
from benchmarks.planted_facts.model import word_tokenizer, write_model
from benchmarks.planted_facts.words import META, RELATIONS, SIDES, TEST, Side
from seekr.fact_probes import answer_tokens, make_probe
from seekr.lama_ckl import oddities, parse_fact, read_facts
from seekr.models import load_model, load_tokenizer
from seekr.prompts import check_vocabulary

SETS = planted_facts(known=121, lessons=3, to_learn=90, meta=80, seed=5)
PARTS: dict[str, tuple[Row, ...]] = {
    name: getattr(SETS, name) for name in ("lessons", "known", "to_learn", "meta")
}
EVERY = [row for rows in PARTS.values() for row in rows]


LITTLE = set(re.findall(r"\S+", "the a and at of in by to for was had were been it ."))


def content_words(side: Side) -> set[str]:
    """What only this side may say: its names, its filler, and what fills that."""
    slots = [word for words in side.slots.values() for word in words]
    fillers = " ".join(re.sub(r"\{\w+\}", " ", text) for text in side.fillers).split()
    return {*side.first_names, *side.last_names, *slots, *fillers} - LITTLE


def test_sets_have_the_sizes_asked_for_and_depend_on_the_seed_alone() -> None:
    sizes = {name: len(rows) for name, rows in PARTS.items()}
    assert sizes == {"lessons": 363, "known": 121, "to_learn": 90, "meta": 80}
    assert planted_facts(known=121, lessons=3, to_learn=90, meta=80, seed=5) == SETS
    assert planted_facts(known=121, lessons=3, to_learn=90, meta=80, seed=6) != SETS


def test_no_subject_and_no_document_is_in_two_sets() -> None:
    subjects = [{row["subject"] for row in PARTS[name]} for name in ("known", "to_learn", "meta")]
    assert [len(names) for names in subjects] == [121, 90, 80]
    assert len(set.union(*subjects)) == 291
    assert len({row["evidence"] for row in EVERY}) == len(EVERY)
    assert len({row["uuid"] for row in EVERY}) == len(EVERY)


def test_lessons_teach_the_known_facts_and_nothing_else() -> None:
    facts = sorted((row["task_descriptive"], row["object"]) for row in SETS.known)
    assert sorted((row["task_descriptive"], row["object"]) for row in SETS.lessons) == sorted(
        3 * facts
    )


def test_what_a_weighter_is_trained_on_has_no_content_word_of_the_test_side() -> None:
    assert content_words(TEST) & content_words(META) == set()
    objects = [
        {word for relation in RELATIONS for word in relation.objects[side]} for side in (0, 1)
    ]
    assert objects[0] & objects[1] == set()
    for rows, other in ((SETS.to_learn, META), (SETS.meta, TEST)):
        said = {word for row in rows for word in row["evidence"].split()}
        assert said & content_words(other) == set()
        assert said & objects[rows is SETS.to_learn] == set()


def test_known_facts_use_every_object_and_the_names_of_both_sides() -> None:
    sets = planted_facts(known=96, lessons=1, to_learn=1, meta=1)
    objects = {word for relation in RELATIONS for side in relation.objects for word in side}
    assert {row["object"] for row in sets.known} == objects
    names = {name for row in sets.known for name in row["subject"].split()}
    assert names == {name for side in SIDES for name in (*side.first_names, *side.last_names)}


def test_rows_are_those_of_lama_ckl_and_the_answer_stands_once_after_a_blank() -> None:
    facts = [parse_fact(row, "a row") for row in EVERY]
    found = oddities(facts)
    assert (found.repeated_answer, found.joined_answer, found.answer_in_subject) == (0, 0, 0)
    for row in EVERY:
        filled = row["masked_evidence"].replace("[MASK]", row["object"])
        assert filled == row["evidence"] and row["evidence_length"] == len(filled)
        assert row["task_descriptive"] in row["evidence"]
        assert row["subject"] in row["task_descriptive"]
        assert row["position"] * len(row["masked_evidence"]) == pytest.approx(
            row["masked_evidence"].index("[MASK]")
        )


def test_the_span_is_the_object_and_its_token_the_one_that_is_marked() -> None:
    tokenizer = word_tokenizer()
    for row in EVERY:
        first, last = fact_span(row)
        assert row["evidence"][first:last] == row["object"]
        marked = answer_tokens(tokenizer, row["evidence"], row["object"])
        assert np.flatnonzero(marked).tolist() == [row["evidence"][:first].count(" ")]


def test_the_fact_stands_first_between_and_last_and_documents_are_short() -> None:
    places = {row["evidence"].count(" . ", 0, fact_span(row)[0]) for row in SETS.to_learn}
    assert places == {0, 1, 2}
    lengths = [len(row["evidence"].encode()) for row in EVERY]
    assert 100 < np.mean(lengths) < 200 and max(lengths) < 260


def test_every_word_has_one_token_and_none_is_unknown() -> None:
    tokenizer = word_tokenizer()
    for row in EVERY:
        for field in ("evidence", "task_descriptive", "task_schematic"):
            ids = tokenizer(row[field]).input_ids
            assert len(ids) == len(row[field].split())
            assert tokenizer.unk_token_id not in ids
        probe = make_probe(tokenizer, row["task_descriptive"], row["object"])
        assert tokenizer.decode(probe.answer_ids) == row["object"]


def test_files_hold_the_sets_and_are_read_as_facts(tmp_path: Path) -> None:
    write(tmp_path, SETS)
    for name, rows in PARTS.items():
        path = tmp_path / f"{name}.jsonl"
        assert tuple(json.loads(line) for line in path.read_text().splitlines()) == rows
        assert [fact.row_id for fact in read_facts(path)] == [row["uuid"] for row in rows]


def test_the_model_belongs_to_the_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path, layers=1, hidden=16)
    tokenizer = load_tokenizer(tmp_path)
    check_vocabulary(tokenizer, load_model(tmp_path, dtype=torch.float32).config)
    text = SETS.meta[0]["evidence"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_more_subjects_than_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"401 subjects .* 400 names"):
        planted_facts(known=2, to_learn=400)
