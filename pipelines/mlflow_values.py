"""From records to what MLflow can hold: keys, cut values, points of metrics, dataset inputs.

Pure but for reading the files that a record names. Keys and values are fitted to MLflow's limits
here and nowhere else, so that no name a user chose can make a write fail. Time stamps come from the
records, never from the clock: what is written twice is then equal, and a rebuilt view is the view
that was lost.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pipelines.artifact import Artifact, StageRecord
from pipelines.lineage import rows_by_day, said_by_day
from pipelines.provenance import redact
from pipelines.results import StreamView

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

# Of mlflow.utils.validation, which also bounds what a server accepts.
MAX_VALUE: Final = 6000
MAX_KEY: Final = 250
MAX_DIGEST: Final = 36
MAX_METRICS: Final = 1000
MAX_PARAMS: Final = 100
_SOURCE_TYPES: Final = {"": "local", "file": "local", "s3": "s3", "gs": "gs"}
_FORBIDDEN: Final = re.compile(r"[^\w.\- :/]", re.ASCII)
_Item = TypeVar("_Item")


class Point(NamedTuple):
    """One value of a metric, in the order of mlflow.entities.Metric's arguments."""

    key: str
    value: float
    timestamp: int
    step: int


def key(name: str) -> str:
    """A name MLflow accepts for a param, metric or tag; a changed one ends in a hash."""
    clean = re.sub(r"/{2,}|\.{2,}", "_", _FORBIDDEN.sub("_", name)).strip("/") or "_"
    clean = re.sub(r"(?<![^/])\.(?![^/])", "_", clean)  # a lone dot between slashes is a path
    if clean == name and len(name) <= MAX_KEY:
        return name
    return f"{clean[: MAX_KEY - 9]}-{digest(name)[:8]}"


def cut(value: str) -> str:
    """A value within MLflow's limit; a cut one ends in its length and hash, so two stay two."""
    if len(value) <= MAX_VALUE:
        return value
    end = f"... ({len(value)} characters, sha256 {digest(value)[:16]})"
    return value[: MAX_VALUE - len(end)] + end


def digest(*words: str) -> str:
    """Sha256 in hex of some words, as a name without special characters."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def milliseconds(moment: str) -> int:
    """An ISO 8601 time as MLflow counts it."""
    return round(datetime.fromisoformat(moment).timestamp() * 1000)


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and text; lists are numbered, empty ones stay visible."""
    if isinstance(value, Mapping):
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(n), item) for n, item in enumerate(value)]
    else:
        return {prefix: redact(str(value))}
    if not items and prefix:
        return {prefix: "{}" if isinstance(value, Mapping) else "[]"}
    flat: dict[str, str] = {}
    for name, item in items:
        flat |= flatten(item, f"{prefix}.{name}" if prefix else name)
    return flat


def redacted(value: Any) -> Any:
    """JSON values with credentials removed from every text."""
    if isinstance(value, Mapping):
        return {str(name): redacted(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def stage_points(artifact: Artifact) -> Iterator[Point]:
    """A stage's own numbers at step 0, and the training history at its steps.

    A step is dated by itself, or evenly over the stage's time where a history has no dates.
    """
    record = artifact.record
    ended = milliseconds(record.finished_at)
    numbers: dict[str, Any] = {
        "seconds": record.seconds,
        "rows": record.rows,
        "peak_memory_bytes": record.peak_memory_bytes,
        "stored_bytes": sum(output.size for output in record.outputs),
        **{f"stats.{name}": value for name, value in flatten_numbers(record.stats).items()},
    }
    for name, value in numbers.items():
        if _is_number(value):
            yield Point(key(name), float(value), ended, 0)
    if any(output.path == "history.json" for output in record.outputs):
        yield from _history(artifact.read_json("history.json")["steps"], record)


def flatten_numbers(stats: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among free statistics, by dotted name."""
    found: dict[str, float] = {}
    for name, value in stats.items():
        if isinstance(value, Mapping):
            found |= flatten_numbers(value, f"{prefix}{name}.")
        elif _is_number(value):
            found[f"{prefix}{name}"] = value
    return found


def stream_points(view: StreamView) -> Iterator[Point]:
    """R, OP and BWT; the step is the number of tasks learnt, 0 for the base model.

    A point is dated by the evaluation that measured it, so it stays the same as the stream grows.
    """
    matrix, rows = view.matrix(), {task: i for i, task in enumerate(view.tasks)}
    for (after, task), (score, result) in view.measured().items():
        ended = milliseconds(result.record.finished_at)
        i = rows.get(after, -1)
        yield Point(key(f"acc/{task}"), score, ended, i + 1)
        if after != task:
            continue
        figures = {"OP": matrix.op(i)}
        if i > 0:
            figures |= {"BWT_T-1": matrix.bwt(i, "paper"), "BWT_T": matrix.bwt(i, "trace")}
        for name, value in figures.items():
            if value is not None:
                yield Point(name, value, ended, i + 1)


def datasets(artifact: Artifact) -> list[DatasetInput]:
    """A stage's inputs and sources as dataset inputs; no data is read.

    The context tag is the name under which the stage knows the input. An input's digest is its
    fingerprint.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    record, store = artifact.record, artifact.store
    rows = []
    for name, ref in record.inputs.items():
        uri = store.uri_for(ref.key)
        kind = _SOURCE_TYPES.get(urlsplit(uri).scheme, "local")
        rows.append((name, f"{ref.stage}/{ref.task}", ref.fingerprint, kind, {"uri": uri}))
    for name, found in record.payload["sources"].items():
        rows.append((name, f"source/{record.task}/{name}", found, "digest", {"digest": found}))
    return [
        DatasetInput(
            Dataset(
                name=label[:500],
                digest=str(value)[:MAX_DIGEST],
                source_type=kind,
                source=json.dumps(source),
            ),
            [InputTag("mlflow.data.context", name[:500])],
        )
        for name, label, value, kind, source in rows
    ]


def model_tags(artifact: Artifact) -> dict[str, str]:
    """What a model version says of its parents (inputs and sources) and of its own bytes."""
    record = artifact.record
    weights = sorted(f"{o.sha256} {o.path}" for o in record.outputs if o.path.startswith("model/"))
    tags = {
        "seekr.fingerprint": record.fingerprint,
        "seekr.task": record.task,
        "seekr.finished_at": record.finished_at,
        "seekr.model_sha256": digest(*weights),
    }
    tags |= {key(f"seekr.input.{name}"): ref.key for name, ref in record.inputs.items()}
    sources = record.payload["sources"]
    return tags | {key(f"seekr.source.{name}"): str(value) for name, value in sources.items()}


def said_of_rows(record: StageRecord) -> str:
    """How many rows were taken out of a stage's files and when, and what a model had learnt of them."""
    parts = [f"{e.rows} taken out on {e.at[:10]}" for e in record.forgotten if e.rows]
    learnt = rows_by_day(record.forgotten)
    return ", ".join([*parts, *([f"trained on {said_by_day(learnt)}"] if learnt else [])])


def chunks(items: Iterable[_Item], count: int) -> Iterator[list[_Item]]:
    """Lists of at most `count` items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, count)):
        yield chunk


def _history(steps: Sequence[Mapping[str, Any]], record: StageRecord) -> Iterator[Point]:
    started, ended = milliseconds(record.started_at), milliseconds(record.finished_at)
    for n, step in enumerate(steps, start=1):
        evenly = started + (ended - started) * n // len(steps)
        yield from step_points({"step": n} | dict(step), evenly)


def step_points(step: Mapping[str, Any], moment: int = 0) -> Iterator[Point]:
    """One training step's numbers at its own time, `at` in seconds since 1970, else at `moment`."""
    at = round(step["at"] * 1000) if "at" in step else moment
    for name, value in step.items():
        if name not in ("step", "at") and _is_number(value):
            yield Point(key(f"train/{name}"), float(value), at, int(step["step"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
