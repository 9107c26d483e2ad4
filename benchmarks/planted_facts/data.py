"""Documents with one planted fact each, in the fields of LAMA-ckl's rows.

A document is filler with one sentence that states a fact about an invented subject, so which words
matter is known. There are four sets, all a pure function of their sizes and the seed:

- `lessons`: what a base model is taught first, several documents for each known fact, on both sides;
- `known`: one row per fact of the lessons, to ask what has been forgotten (NOT-TO-FORGET);
- `to_learn`: new subjects on the test side (TO-LEARN);
- `meta`: new subjects on the meta side, for training a weighter of tokens.

The lessons use the words of both sides. From 96 known facts on, a model that was taught them has met every
name and every object of the other sets, but no subject of theirs.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.planted_facts.words import RELATIONS, SIDES, Relation, Side
from seekr.lama_ckl import schematic_sentence

Row = dict[str, Any]
# Sentences beside the fact, which stands before, between or after them.
_FILLERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """Rows by set; what each set is for is in the module's docstring."""

    lessons: tuple[Row, ...]
    known: tuple[Row, ...]
    to_learn: tuple[Row, ...]
    meta: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class _Fact:
    side: int
    relation: Relation
    subject: str
    object: str


def planted_facts(
    *, known: int = 120, lessons: int = 4, to_learn: int = 100, meta: int = 100, seed: int = 0
) -> Sets:
    """Draw the sets.

    Args:
        known: Facts that a base model is taught, half of them on either side.
        lessons: Documents for each of them.
        to_learn, meta: Facts, with one document each.

    Raises:
        ValueError: more subjects are asked for than there are names.
    """
    draw = random.Random(f"planted facts/{seed}")
    halves = known - known // 2, known // 2
    wanted = halves[0] + to_learn, halves[1] + meta
    test, other = (_facts(draw, side, count) for side, count in enumerate(wanted))
    taught = test[: halves[0]] + other[: halves[1]]
    documents = [[_row(draw, fact, False) for fact in taught] for _ in range(lessons)]
    return Sets(
        lessons=tuple(row for rows in documents for row in rows),
        known=tuple(_row(draw, fact, True) for fact in taught),
        to_learn=tuple(_row(draw, fact, False) for fact in test[halves[0] :]),
        meta=tuple(_row(draw, fact, False) for fact in other[halves[1] :]),
    )


def _facts(draw: random.Random, side: int, count: int) -> list[_Fact]:
    """Return facts about distinct subjects, relations and their objects taking turns."""
    subjects = _subjects(draw, SIDES[side])
    if count > len(subjects):
        raise ValueError(
            f"{count} subjects are asked for on a side that has {len(subjects)} names; ask for fewer"
        )
    turns = {
        relation.code: draw.sample(relation.objects[side], len(relation.objects[side]))
        for relation in RELATIONS
    }
    found: list[_Fact] = []
    for index, subject in enumerate(subjects[:count]):
        turn, place = divmod(index, len(RELATIONS))
        objects = turns[RELATIONS[place].code]
        found.append(_Fact(side, RELATIONS[place], subject, objects[turn % len(objects)]))
    return found


def _subjects(draw: random.Random, side: Side) -> list[str]:
    """Return all pairs of names, so that each name comes once before any comes again."""
    firsts, lasts = (
        draw.sample(names, len(names)) for names in (side.first_names, side.last_names)
    )
    found: list[str] = []
    for _ in range(len(firsts)):
        turn = [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
        found += draw.sample(turn, len(turn))
        lasts = lasts[1:] + lasts[:1]
    return found


def _row(draw: random.Random, fact: _Fact, invariant: bool) -> Row:
    side, relation = SIDES[fact.side], fact.relation
    told = relation.sentence.format(subject=fact.subject, object=fact.object)
    sentences = [_filler(draw, side) for _ in range(_FILLERS)]
    sentences.insert(draw.randrange(_FILLERS + 1), told)
    evidence = " ".join(sentences)
    start = evidence.index(told) + told.rindex(fact.object)
    masked = evidence[:start] + "[MASK]" + evidence[start + len(fact.object) :]
    return {
        "relation_code": relation.code,
        "uuid": str(uuid.UUID(int=draw.getrandbits(128))),
        "task_descriptive": told,
        "task_schematic": schematic_sentence(fact.subject, relation.label, fact.object),
        "subject": fact.subject,
        "relation_label": relation.label,
        "object": fact.object,
        "masked_evidence": masked,
        "evidence": evidence,
        "position": start / len(masked),
        "evidence_length": len(evidence),
        "invariant": invariant,
    }


def _filler(draw: random.Random, side: Side) -> str:
    words = {name: draw.choice(choices) for name, choices in side.slots.items()}
    return draw.choice(side.fillers).format(**words)


def fact_span(document: Row) -> tuple[int, int]:
    """Return (first, last + 1) characters of the object in a row's `evidence`."""
    told = str(document["task_descriptive"])
    start = str(document["evidence"]).index(told) + told.rindex(str(document["object"]))
    return start, start + len(document["object"])


def write(folder: Path, sets: Sets) -> None:
    """Write `folder/{lessons,known,to_learn,meta}.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Sequence[Row]] = {
        name: getattr(sets, name) for name in ("lessons", "known", "to_learn", "meta")
    }
    for name, rows in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="ascii")
