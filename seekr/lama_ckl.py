"""Rows of LAMA-ckl and of TemporalWiki: what is read, what is asked, and what is odd about them.

A LAMA-ckl row is a fact with a document that holds it (`evidence`) and two sentences that state it, one
in words (`task_descriptive`) and one as a form (`task_schematic`). The benchmark trains on documents and asks
the sentences (Seo et al., NeurIPS 2024; facts and sentences of LAMA's T-REx, Petroni et al., EMNLP 2019). A
TemporalWiki probe is subject, relation and object alone, asked as a form.

The files have quirks that bear on results; they are counted here and not mended: an answer that stands in
its own subject can be copied, and a document in two sets is trained on where it should only be asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seekr.errors import DataError
from seekr.fact_probes import occurrences

Form = Literal["descriptive", "schematic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One row.

    Attributes:
        row_id: The row's uuid.
        document: What is trained on; it contains the answer.
        descriptive, schematic: Sentences that contain the answer; the last occurrence is asked for.
        relation: In words, such as "field of work".
    """

    row_id: str
    document: str
    descriptive: str
    schematic: str
    subject: str
    relation: str
    answer: str

    def sentence(self, form: Form) -> str:
        """Return the sentence of a form."""
        return self.descriptive if form == "descriptive" else self.schematic


def schematic_sentence(subject: str, relation: str, answer: str) -> str:
    """Return a statement as a form, as LAMA-ckl's files and TemporalWiki's scoring have it."""
    return (
        f"Guess the object. \n  subject is {subject} , relation is {relation} , object is {answer}"
    )


def parse_fact(record: object, where: str) -> Fact:
    """Check and read one row of LAMA-ckl.

    Args:
        record: A JSON value; fields that are not needed are not looked at.
        where: File and line, for messages.

    Raises:
        DataError: it is no object, a field is missing, no text or empty, or the answer is not in the
            document or in one of the sentences.
    """
    fact = Fact(
        row_id=_text(record, "uuid", where),
        document=_text(record, "evidence", where),
        descriptive=_text(record, "task_descriptive", where),
        schematic=_text(record, "task_schematic", where),
        subject=_text(record, "subject", where),
        relation=_text(record, "relation_label", where),
        answer=_text(record, "object", where),
    )
    texts = {"evidence": fact.document, "task_descriptive": fact.descriptive}
    for field, text in (texts | {"task_schematic": fact.schematic}).items():
        if fact.answer not in text:
            raise DataError(
                f"{where}: the object {fact.answer!r} is not in {field} {text[:80]!r}; it has to be "
                "there letter by letter: mend the row or leave it out"
            )
    return fact


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A TemporalWiki probe. `sentence` ends with the answer, whose last occurrence is asked for."""

    subject: str
    relation: str
    answer: str

    @property
    def sentence(self) -> str:
        return schematic_sentence(self.subject, self.relation, self.answer)


def parse_statement(record: object, where: str) -> Statement:
    """Check and read one row of TemporalWiki's probes: subject, relation, object.

    Raises:
        DataError: it is no object, or a field is missing, no text or empty.
    """
    return Statement(
        subject=_text(record, "subject", where),
        relation=_text(record, "relation", where),
        answer=_text(record, "object", where),
    )


def _text(record: object, field: str, where: str) -> str:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: the row is {type(record).__name__}; a JSON object is needed")
    if field not in record:
        known = ", ".join(sorted(str(name) for name in record))
        raise DataError(f"{where}: the row has no field {field!r}, but {known}; mend the row")
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: {field} is {value!r}; text that is not empty is needed: mend the row"
        )
    return value


def read_facts(path: Path) -> list[Fact]:
    """Read a file of LAMA-ckl, one JSON object per line.

    Raises:
        DataError: the file is missing or empty, a line is no JSON, or a row is not as `parse_fact` has it.
    """
    return [parse_fact(record, where) for where, record in _records(path)]


def read_statements(path: Path) -> list[Statement]:
    """Read a file of TemporalWiki's probes, one JSON object per line.

    Raises:
        DataError: as `read_facts`.
    """
    return [parse_statement(record, where) for where, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield file and line, and what stands there."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as text: {error}; a JSON Lines file is needed"
        ) from error
    if not any(line.strip() for line in lines):
        raise DataError(f"{path} has no rows; one JSON object per line is needed")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where} is malformed JSON: {error.msg} at column {error.colno}; mend the line"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Oddities:
    """How many rows of a set are odd.

    Attributes:
        repeated_answer: The answer stands in the document more than once.
        joined_answer: No occurrence in the document comes right after white space, so a tokenizer
            may have it in other pieces than alone.
        answer_in_subject: The answer is part of the subject: copying is enough.
        repeated_sentence_answer: The answer stands in the descriptive sentence more than once.
        repeated_document: An earlier row of the set has the same document.
        repeated_row_id: An earlier row of the set has the same uuid.
    """

    repeated_answer: int
    joined_answer: int
    answer_in_subject: int
    repeated_sentence_answer: int
    repeated_document: int
    repeated_row_id: int


def oddities(facts: Sequence[Fact]) -> Oddities:
    """Count what is odd within a set."""
    return Oddities(
        repeated_answer=sum(len(occurrences(f.document, f.answer)) > 1 for f in facts),
        joined_answer=sum(not _after_space(f) for f in facts),
        answer_in_subject=sum(f.answer in f.subject for f in facts),
        repeated_sentence_answer=sum(len(occurrences(f.descriptive, f.answer)) > 1 for f in facts),
        repeated_document=len(facts) - len({f.document for f in facts}),
        repeated_row_id=len(facts) - len({f.row_id for f in facts}),
    )


def _after_space(fact: Fact) -> bool:
    found = occurrences(fact.document, fact.answer)
    return any(first > 0 and fact.document[first - 1].isspace() for first, _ in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """How many distinct values two sets have in common."""

    row_ids: int
    documents: int
    subjects: int


def shared(one: Iterable[Fact], other: Iterable[Fact]) -> Shared:
    """Count what two sets share."""
    pairs = [(f.row_id, f.document, f.subject) for f in one]
    others = [(f.row_id, f.document, f.subject) for f in other]
    row_ids, documents, subjects = (
        len({values[field] for values in pairs} & {values[field] for values in others})
        for field in range(3)
    )
    return Shared(row_ids=row_ids, documents=documents, subjects=subjects)


def meta_training_facts(candidates: Iterable[Fact], *evaluated: Iterable[Fact]) -> list[Fact]:
    """Return the facts that a weighter of tokens may be trained on, in order.

    The benchmark's own set for this is not in its repository. Its third evaluation file,
    `invariant_schematic`, can stand in, without the rows that share a uuid or a document with what is
    evaluated. They may still share a subject.
    """
    known = [fact for facts in evaluated for fact in facts]
    row_ids, documents = {f.row_id for f in known}, {f.document for f in known}
    return [f for f in candidates if f.row_id not in row_ids and f.document not in documents]
