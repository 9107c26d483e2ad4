"""Why a stage would run: the difference between what is wanted and the nearest thing that exists.

Records keep the payload their fingerprint was taken over, so drift can be named field by field.
When an input differs, the question moves to that input, until a field is found that somebody
changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipelines.artifact import StageRecord, StageRef
from pipelines.fingerprint import ABSENT, Change, diff
from pipelines.stage import Stage, find
from pipelines.store import Store
from pipelines.workspace import FAILURE
from seekr.errors import StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One reason: a field of one stage that differs. `stage` is where the field belongs."""

    stage: str
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What would happen to one stage, and why.

    Attributes:
        stage: the stage asked about.
        record: its record if it is in the store; then it is reused.
        nearest: else the earlier record of the same kind and task that differs least, if any.
        causes: root causes, own fields first.
        failure: what `failure.json` of an earlier attempt says, if there is one.
    """

    stage: Stage
    record: StageRecord | None = None
    nearest: StageRecord | None = None
    causes: tuple[Cause, ...] = ()
    failure: dict[str, Any] | None = None

    def __str__(self) -> str:
        if self.record is not None:
            when, host = self.record.finished_at, self.record.host
            return f"{self.stage}: reused, computed at {when} on host {host}"
        if self.nearest is None:
            text = f"{self.stage} would run: nothing of this kind and task is in the store"
        else:
            text = f"{self.stage} would run: because {self._because()}"
        if self.failure is not None:
            text += (
                f" (attempt {self.failure.get('attempt')} failed at {self.failure.get('time')}: "
                f"{self.failure.get('error')}: {self.failure.get('message')})"
            )
        return text

    def _because(self) -> str:
        by_stage: dict[str, list[str]] = {}
        for cause in self.causes:
            by_stage.setdefault(cause.stage, []).append(str(cause.change))
        own = by_stage.pop(str(self.stage), [])
        parts = [", ".join(own)] if own else []
        parts += [f"{stage} changed: {', '.join(changes)}" for stage, changes in by_stage.items()]
        return "; ".join(parts)


def explain(store: Store, stages: Iterable[Stage]) -> list[Explanation]:
    """Says for each stage whether it would be reused, and if not, what changed since the last time.

    Args:
        store: where earlier results are.
        stages: what is wanted, in any order.
    """
    history = _History(store=store)
    return [_explain(store, stage, history) for stage in stages]


@dataclass(frozen=True, slots=True, kw_only=True)
class _History:
    """Earlier records, each read once."""

    store: Store
    _records: dict[str, StageRecord | None] = field(default_factory=dict)

    def get(self, key: str) -> StageRecord | None:
        """The record in a folder; None if there is none that can be read.

        A damaged record of some other result is no obstacle to explaining this one.
        """
        if key not in self._records:
            try:
                self._records[key] = StageRecord.load(self.store, key)
            except StoreError:
                self._records[key] = None
        return self._records[key]

    def nearest(self, stage: Stage) -> StageRecord | None:
        """The record of the same name and task with the fewest differences; of equals the
        latest."""
        folder = f"{stage.name}/{stage.task}"
        found = [self.get(f"{folder}/{child}") for child in self.store.children(folder)]
        records = [record for record in found if record is not None]
        records.sort(key=lambda record: record.finished_at, reverse=True)
        return min(records, key=lambda r: len(diff(r.payload, stage.payload)), default=None)


def _explain(store: Store, stage: Stage, history: _History) -> Explanation:
    record = find(store, stage)
    if record is not None:
        return Explanation(stage=stage, record=record)
    failed = f"{stage.key}/{FAILURE}"
    nearest = history.nearest(stage)
    causes = _causes(stage, nearest, history, set()) if nearest else []
    return Explanation(
        stage=stage,
        nearest=nearest,
        causes=tuple(causes),
        failure=store.read_json(failed) if store.stat(failed) else None,
    )


def _causes(
    stage: Stage, old: StageRecord, history: _History, seen: set[tuple[str, str]]
) -> list[Cause]:
    """Root causes of the difference between a stage and an earlier record, own fields first.

    Stages share inputs, so a pair that was compared once (`seen`) is not entered again: the number
    of ways through the graph doubles with every task.
    """
    if (stage.key, old.key) in seen:
        return []
    seen.add((stage.key, old.key))
    own: list[Cause] = []
    inherited: list[Cause] = []
    for change in diff(_without_inputs(old.payload), _without_inputs(stage.payload)):
        path = change.path.removeprefix("config.")
        own.append(
            Cause(stage=str(stage), change=Change(path=path, old=change.old, new=change.new))
        )
    for name in sorted(stage.inputs.keys() | old.inputs.keys()):
        new_input, old_input = stage.inputs.get(name), old.inputs.get(name)
        if new_input and old_input and new_input.fingerprint == old_input.fingerprint:
            continue
        earlier = history.get(old_input.key) if old_input else None
        if new_input and earlier and _same_kind(new_input, earlier):
            inherited += _causes(new_input, earlier, history, seen)
        else:
            change = Change(path=f"inputs.{name}", old=_name(old_input), new=_name(new_input))
            own.append(Cause(stage=str(stage), change=change))
    return own + inherited


def _same_kind(stage: Stage, record: StageRecord) -> bool:
    return (stage.name, stage.task) == (record.stage, record.task)


def _without_inputs(payload: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in payload.items() if key != "inputs"}


def _name(ref: Stage | StageRef | None) -> Any:
    """How an input is shown where its own fields cannot be compared."""
    if ref is None:
        return ABSENT
    kind = ref.name if isinstance(ref, Stage) else ref.stage
    return f"{kind}/{ref.task}@{ref.fingerprint[:8]}"
