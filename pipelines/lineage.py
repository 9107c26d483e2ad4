"""Where a model came from, read from the records: a graph of stages down to the digests of source
data.

The records in the store are the truth; MLflow is a view of them (`pipelines.tracking`) and is never
asked here. Stages share inputs (a replay set teaches, trains and scores), so what a model came from
is a graph and not a tree: `walk` keeps every stage once, and only the rendering unfolds it,
pointing back at what was shown.

It also says which rows a model has learnt that the store has forgotten since: its own training's, and
those of all models that it grew from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text
from rich.tree import Tree

from pipelines.artifact import RECORD, Erasure, StageRecord, StageRef
from pipelines.forgotten import FOLDER
from pipelines.store import Store
from seekr.errors import ConfigError

SHORT = 12
SHORTEST_PREFIX = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A stage in a lineage.

    Attributes:
        ref: the stage, task and fingerprint.
        inputs: what it read, by the name the stage gives it.
        sources: digests of what entered from outside the store, by name.
        finished_at: ISO 8601, or None when the record is missing.
        forgotten: what was taken out of it, and what a model has learnt of that.
    """

    ref: StageRef
    inputs: Mapping[str, StageRef]
    sources: Mapping[str, str]
    finished_at: str | None
    forgotten: tuple[Erasure, ...] = ()

    @property
    def is_missing(self) -> bool:
        """Whether a record names this stage but its own record is gone."""
        return self.finished_at is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """A stage and everything it came from; `origins` holds each stage once, by its key."""

    root: StageRef
    origins: Mapping[str, Origin]

    def sources(self) -> dict[str, str]:
        """Every source digest below the root, as {"stage/task: name": digest}."""
        return {
            f"{origin.ref.stage}/{origin.ref.task}: {name}": digest
            for origin in self.origins.values()
            for name, digest in origin.sources.items()
        }

    def forgotten(self) -> dict[str, int]:
        """How many rows the root or a model it grew from was trained on and the store has forgotten
        since, by the day of the request."""
        return rows_by_day(e for origin in self.origins.values() for e in origin.forgotten)

    def to_json(self) -> dict[str, Any]:
        """Plain values: the root's key, and every stage with its input keys and source digests.

        `trained_on_forgotten` counts rows by day; a stage of which rows were taken out, or which
        learnt some, has `forgotten`.
        """
        return {
            "root": self.root.key,
            "trained_on_forgotten": self.forgotten(),
            "stages": {
                key: {
                    "stage": origin.ref.stage,
                    "task": origin.ref.task,
                    "fingerprint": origin.ref.fingerprint,
                    "finished_at": origin.finished_at,
                    "inputs": {name: ref.key for name, ref in origin.inputs.items()},
                    "sources": dict(origin.sources),
                    "forgotten": [
                        {
                            "request": erasure.request,
                            "at": erasure.at,
                            "rows": erasure.rows,
                            "learnt": len(erasure.learnt),
                        }
                        for erasure in origin.forgotten
                    ],
                }
                for key, origin in self.origins.items()
            },
        }


def walk(
    records: Sequence[StageRecord],
    model: str,
    *,
    stream: str | None = None,
    versions: Mapping[int, str] | None = None,
) -> Lineage:
    """Follow a model back to everything it was made of.

    Args:
        records: of one stream, in graph order; more records do no harm if `model` stays
            unambiguous.
        model: a task's name (the model after it), a fingerprint or at least 6 characters of one (of
            any
            stage), or "<stream>@<version>".
        stream: the stream's name, which "<stream>@<version>" must then match.
        versions: fingerprints by version as registered (`tracking.registered_versions`). Without
            them
            version n is the n-th training of `records`, which is the order they are registered in.

    Raises:
        ConfigError: `model` names nothing or several things; the message lists what there is.
    """
    root = _resolve(records, model, stream, versions)
    by_key = {record.key: record for record in records}
    origins: dict[str, Origin] = {}
    pending = [root.ref]
    while pending:
        ref = pending.pop()
        if ref.key not in origins:
            origins[ref.key] = _origin(ref, by_key.get(ref.key))
            pending.extend(list(origins[ref.key].inputs.values())[::-1])
    return Lineage(root=root.ref, origins=origins)


def gather(store: Store, model: StageRef) -> list[StageRecord]:
    """Return a model's record and those of all it was made from, wherever in the store they are.

    For models that a stream's present settings do not lead to. Records that are gone are left out.

    Raises:
        StoreError: the model's own record is gone, or one cannot be read.
    """
    found: dict[str, StageRecord] = {model.key: StageRecord.load(store, model.key)}
    pending = list(found[model.key].inputs.values())
    while pending:
        ref = pending.pop()
        if ref.key not in found and store.stat(f"{ref.key}/{RECORD}") is not None:
            found[ref.key] = StageRecord.load(store, ref.key)
            pending += found[ref.key].inputs.values()
    return list(found.values())


def render_tree(lineage: Lineage) -> Tree:
    """The lineage for a terminal: every stage unfolded once, later mentions point back.

    Sources are leaves with their digests. Depth first, so a mention always follows its unfolding.
    """
    root = lineage.origins[lineage.root.key]
    label = _label("", root)
    inherited = lineage.forgotten()
    if inherited and inherited != rows_by_day(root.forgotten):
        words = f"  with the models it grew from: trained on {said_by_day(inherited)}"
        label.append(words, style="yellow")
    tree = Tree(label)
    shown = {lineage.root.key}
    pending: list[tuple[Tree, str, StageRef | str]] = _branches(tree, root)
    while pending:
        parent, name, what = pending.pop()
        if isinstance(what, str):
            parent.add(Text.assemble((f"{name}: ", "cyan"), (what, "green")))
            continue
        origin = lineage.origins[what.key]
        label = _label(name, origin)
        if what.key in shown:
            parent.add(label.append("  shown above", style="dim"))
            continue
        shown.add(what.key)
        pending.extend(_branches(parent.add(label), origin))
    return tree


def _branches(node: Tree, origin: Origin) -> list[tuple[Tree, str, StageRef | str]]:
    """What hangs below a node, last first, as it is taken from a stack."""
    below: list[tuple[str, StageRef | str]] = [*origin.inputs.items(), *origin.sources.items()]
    return [(node, name, what) for name, what in reversed(below)]


def _label(name: str, origin: Origin) -> Text:
    ref = origin.ref
    label = Text.assemble(
        (f"{name}: " if name else "", "cyan"),
        (f"{ref.stage}/{ref.task}", "bold"),
        (f"  {ref.fingerprint[:SHORT]}", "dim"),
    )
    if origin.is_missing:
        return label.append("  its record is missing from the store", style="red")
    label.append(f"  {str(origin.finished_at)[:16].replace('T', ' ')}", style="dim")
    if learnt := rows_by_day(origin.forgotten):
        label.append(f"  trained on {said_by_day(learnt)}", style="yellow")
    for erasure in origin.forgotten:
        if erasure.rows:
            words = f"  {_num_rows(erasure.rows)} taken out on {erasure.at[:10]}"
            label.append(words + ("" if erasure.done else ", not to its end"), style="yellow")
    return label


def learnt_and_forgotten(store: Store, record: StageRecord) -> dict[str, int]:
    """Return how many rows a model, or one it grew from, was trained on and the store has forgotten
    since, by the day of the request; from the records in the store."""
    if not store.exists(FOLDER):
        return {}
    found, pending = {record.key: record}, list(record.inputs.values())
    while pending:
        ref = pending.pop()
        if ref.key not in found and store.stat(f"{ref.key}/{RECORD}") is not None:
            found[ref.key] = StageRecord.load(store, ref.key)
            pending.extend(found[ref.key].inputs.values())
    return rows_by_day(erasure for other in found.values() for erasure in other.forgotten)


def rows_by_day(erasures: Iterable[Erasure]) -> dict[str, int]:
    """Return how many different rows models were trained on and requests have named, by their day."""
    days: dict[str, str] = {}
    for erasure in erasures:
        for mark in erasure.learnt:
            days[mark] = max(days.get(mark, ""), erasure.at[:10])
    return dict(sorted(Counter(days.values()).items()))


def said_by_day(rows: Mapping[str, int]) -> str:
    """Say such numbers in words."""
    return ", ".join(f"{_num_rows(n)} forgotten on {day}" for day, n in rows.items())


def _num_rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _origin(ref: StageRef, record: StageRecord | None) -> Origin:
    if record is None:
        return Origin(ref=ref, inputs={}, sources={}, finished_at=None)
    return Origin(
        ref=ref,
        inputs=record.inputs,
        sources=record.payload["sources"],
        finished_at=record.finished_at,
        forgotten=record.forgotten,
    )


def _resolve(
    records: Sequence[StageRecord],
    model: str,
    stream: str | None,
    versions: Mapping[int, str] | None,
) -> StageRecord:
    trained = [record for record in records if record.stage == "train"]
    name, at, version = model.rpartition("@")
    if at and version.isdigit():
        return _versioned(trained, model, name, int(version), stream, versions)
    found = [record for record in trained if record.task == model]
    if not found and len(model) >= SHORTEST_PREFIX:
        found = [record for record in records if record.fingerprint.startswith(model)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{r.stage}/{r.task} {r.fingerprint[:SHORT]}" for r in found or trained)
    problem = "names several stages" if found else "names no model of this stream"
    raise ConfigError(
        f"model {model!r} {problem}. Found: {listed or 'no trained model'}. Give a task, a "
        f"fingerprint ({SHORTEST_PREFIX} characters or more) or <stream>@<version>."
    )


def _versioned(
    trained: Sequence[StageRecord],
    model: str,
    name: str,
    version: int,
    stream: str | None,
    versions: Mapping[int, str] | None,
) -> StageRecord:
    if stream is not None and name != stream:
        raise ConfigError(
            f"model {model!r} belongs to the stream {name!r}, but this is {stream!r}. Give that "
            f"stream's YAML, or {stream}@{version}."
        )
    known = versions or {n: record.fingerprint for n, record in enumerate(trained, start=1)}
    found = [record for record in trained if record.fingerprint == known.get(version)]
    if not found:
        raise ConfigError(
            f"model {model!r}: version {version} is not among the trained models of this stream. "
            f"Known versions: {', '.join(map(str, sorted(known))) or 'none'}."
        )
    return found[0]
