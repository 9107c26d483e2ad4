"""Ledgers made by hand, entry by entry, and what is read off the report that they make."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import stdev
from typing import Any

from tests.pages import Page
from tune.ledger import Entry, Result
from tune.measures import Value


def figures(op: Sequence[float], **others: Sequence[float]) -> dict[str, Value]:
    return {name: Value.of(values) for name, values in {"op": op, **others}.items()}


def trial(number: int, ops: Sequence[Sequence[float]], **fields: Any) -> Entry:
    """Return a trial with the OP of each seed after each task."""
    lr = fields.pop("lr", 0.001)
    others = fields.pop("others", {})
    stages = fields.pop("stages", ())
    ran = fields.pop("ran", ())
    settings = {"train.learning_rate": lr, "method.head_budget": 2, "method.query_budget": 8}
    known = {
        "key": f"trial-{number:04d}",
        "kind": "trial",
        "number": number,
        "settings": settings,
        "seeds": tuple(range(len(ops[0]))) if ops else (0,),
        "learnt": (settings,) * len(ops),
        "results": tuple(
            Result(tasks=k, figures=figures(op, **others), stages=tuple(stages), ran=tuple(ran))
            for k, op in enumerate(ops, start=1)
        ),
        "state": "finished" if len(ops) == 3 else "stopped" if ops else "failed",
    }
    return Entry(**(known | fields))


def confirm(number: int, ops: Sequence[float], **fields: Any) -> Entry:
    name = "stream" if number < 0 else f"trial-{number}"
    known = {"key": f"confirm-{name}-x", "kind": "confirm", "order": ("first", "reverse", "upper")}
    return trial(number, [ops] * 3, **(known | {"seeds": (7, 8, 9)[: len(ops)]} | fields))


def spread(values: Sequence[float]) -> float:
    """The standard error of a mean, said anew."""
    return stdev(values) / math.sqrt(len(values))


def section(page: str, title: str) -> str:
    """Return the text of a section."""
    found = re.search(rf"<h2>{re.escape(title)}</h2>(.*?)</section>", page, re.S)
    assert found, title
    return Page(found[1]).text


def tile(page: str, label: str) -> str:
    """Return the text of a tile after its label."""
    found = re.search(rf'<div class="label">{label}</div>(.*?)</div></div>', page, re.S)
    assert found, label
    return Page(f"{found[1]}</div>").text


def rows(page: str, title: str) -> list[list[str]]:
    """Return the cells of a section's tables, row by row."""
    found = re.search(rf"<h2>{re.escape(title)}</h2>(.*?)</section>", page, re.S)
    assert found, title
    bodies = re.findall(r"<tr[^>]*>(.*?)</tr>", found[1], re.S)
    return [
        [Page(cell).text for cell in re.findall(r"<td[^>]*>(.*?)</td>", body, re.S)]
        for body in bodies
        if "<td" in body
    ]


def told_once(entry: Entry) -> Entry:
    first, *others = entry.results
    fields = {name: getattr(entry, name) for name in entry.__slots__}
    quiet = [Result(tasks=r.tasks, figures=r.figures, stages=r.stages, ran=()) for r in others]
    return Entry(**(fields | {"results": (first, *quiet)}))


THREE = [
    trial(0, [[0.9, 0.8], [0.6, 0.7], [0.50, 0.54]], lr=0.01),
    trial(1, [[0.9, 0.9], [0.8, 0.8], [0.61, 0.67]], lr=0.001),
    trial(2, [[0.5, 0.5], [0.4, 0.4]], lr=0.0001, reason="not among the best of 3"),
]
