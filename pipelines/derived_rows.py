"""Rows that were made of other rows: whose text they have in them, under an id of their own.

A borrowed row has a new task's input inside an earlier row's instruction; a generated one may say by
heart what its generator was trained on. Both are looked for without a tokenizer: by text, and by the
tokens that two prompts share at their ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.artifact import StageRecord
from pipelines.forgotten import mark_of
from pipelines.inventory import ROW_ID, Inventory, Marks, parquet_names, read_columns
from seekr.prompts import row_id_of

_COLUMNS = (ROW_ID, "input", "references", "input_ids", "prompt_length")
Prompt = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What forgotten rows say: texts of inputs, and tokens of prompts."""

    texts: frozenset[str]
    prompts: frozenset[tuple[int, ...]]


def content_of(inventory: Inventory, marks: Marks) -> Content:
    """Return what the ingested rows with these marks say; of a document there is no prompt."""
    texts: set[str] = set()
    prompts: set[tuple[int, ...]] = set()
    for record in _of(inventory, "ingest"):
        for row in _rows(inventory, record):
            if mark_of(row[ROW_ID]) in marks and row["input"]:
                texts.add(row["input"])
                prompts.add(tuple(_prompt(row)))
    return Content(texts=frozenset(texts), prompts=frozenset(prompts))


def derived_from(inventory: Inventory, marks: Marks) -> frozenset[str]:
    """Return the marks of rows that were made of the rows with the given marks."""
    content = content_of(inventory, marks)
    found: set[str] = set()
    for record in (*_of(inventory, "borrow"), *_of(inventory, "generate")):
        for row in _rows(inventory, record):
            if row["input"] in content.texts or tuple(_prompt(row)) in content.prompts:
                found.add(mark_of(row[ROW_ID]))
    for record in _of(inventory, "borrow"):
        found |= _under_forgotten_instructions(inventory, record, marks)
    return frozenset(found - marks)


def _under_forgotten_instructions(
    inventory: Inventory, record: StageRecord, marks: Marks
) -> set[str]:
    """Return marks of borrowed rows whose instruction may be a forgotten row's and no other's.

    Which kept row's instruction was borrowed is not written down. It is taken to be a forgotten one's if
    that shares more tokens with the borrowed prompt, at both ends, than every row that stays. As a
    rule a task's rows have one instruction; then this finds only rows that begin or end like the
    forgotten one by chance, which no later training needs anyhow.
    """
    found: set[str] = set()
    for name, ref in record.inputs.items():
        kept = inventory.records.get(ref.key)
        if kept is None or not name.startswith("replay."):
            continue
        rows = list(_rows(inventory, kept))
        gone = [_prompt(row) for row in rows if mark_of(row[ROW_ID]) in marks]
        stay = [_prompt(row) for row in rows if mark_of(row[ROW_ID]) not in marks]
        task = name.removeprefix("replay.")
        for row in _rows(inventory, record) if gone else ():
            if row[ROW_ID] == row_id_of(row["input"], [task], "borrowed"):
                prompt = _prompt(row)
                if _shared(prompt, gone) > _shared(prompt, stay):
                    found.add(mark_of(row[ROW_ID]))
    return found


def _shared(prompt: Prompt, others: Sequence[Prompt]) -> int:
    """Return the most tokens that a prompt has in common with another, from both ends."""
    return max((_same(prompt, o) + _same(prompt[::-1], o[::-1]) for o in others), default=-1)


def _same(first: Prompt, second: Prompt) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _of(inventory: Inventory, stage: str) -> list[StageRecord]:
    return [record for record in inventory.records.values() if record.stage == stage]


def _rows(inventory: Inventory, record: StageRecord) -> Iterator[dict[str, Any]]:
    for name in parquet_names(record):
        path = f"{record.key}/{name}"
        table = read_columns(inventory.store, path, _COLUMNS)
        yield from (table or pa.table({ROW_ID: pa.array([], pa.string())})).to_pylist()


def _prompt(row: dict[str, Any]) -> Prompt:
    return row["input_ids"][: row["prompt_length"]]
