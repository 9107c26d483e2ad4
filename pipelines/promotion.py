"""Promotion by hand: a person names the champion, or goes back to a former one, and says why.

Both are decisions like the gate's, in the same journal. A model is promoted only if its files are whole;
MLflow's alias follows, and if MLflow is out of reach a warning says how to let it follow later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.artifact import StageRecord, StageRef, verify
from pipelines.decisions import Decision, DecisionLog, Decisions, Kind, resolve
from pipelines.gate import scores_of
from pipelines.labels import CHAMPION
from pipelines.lease import Lease
from pipelines.lineage import Lineage, gather, walk
from pipelines.stream import Stream, records_of, view_of
from pipelines.tracking import Tracker, tracking_uri
from seekr.errors import ConfigError, StoreError

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a promotion or rollback came to: the champion, and the decision unless it was that already."""

    champion: StageRef
    decision: Decision | None


def promote(stream: Stream, model: str | None, reason: str, warn: Warn) -> Change:
    """Make a model of the stream the champion.

    Args:
        model: a task's name, or a fingerprint; the newest one unless given.
        reason: for the record.
        warn: told if MLflow cannot follow.

    Raises:
        ConfigError: no such model, or not trained yet.
        StoreError: its files are not what its record says.
    """
    records = list(records_of(stream).values())
    ref = walk(records, model or stream.last_model, stream=stream.config.name).root
    if ref.stage != "train":
        raise ConfigError(
            f"model {model!r} is the stage {ref.stage}/{ref.task}, which is no model; name a task"
        )
    return _change(stream, "promote", lambda _: ref, reason, warn)


def roll_back(stream: Stream, to: str | None, reason: str, warn: Warn) -> Change:
    """Make a former champion the champion again.

    Args:
        to: its task, or the beginning of its fingerprint; the one before the present one unless given.
        reason: for the record.
        warn: told if MLflow cannot follow.

    Raises:
        ConfigError: there is no such champion.
        StoreError: its files are not what its record says.
    """
    return _change(stream, "rollback", lambda past: resolve(past.champions, to), reason, warn)


def champion_of(stream: Stream) -> StageRef:
    """Return the stream's champion.

    Raises:
        ConfigError: nothing was promoted yet.
    """
    champion = DecisionLog(stream.store, stream.config.name).read().champion
    if champion is None:
        raise ConfigError(
            f"stream {stream.path} has no {CHAMPION} yet: no model was promoted; set a gate and run it, "
            f"or promote one by hand: seekr promote {stream.path} --reason ..."
        )
    return champion


def model_lineage(stream: Stream, model: str | None) -> Lineage:
    """Return what a model was made of: of a task, fingerprint or version, the newest one, or `champion`.

    Raises:
        ConfigError: `model` names nothing or several things.
    """
    name = stream.config.name
    if model == CHAMPION:
        champion = champion_of(stream)
        return walk(gather(stream.store, champion), champion.fingerprint, stream=name)
    return walk(list(records_of(stream).values()), model or stream.last_model, stream=name)


def _change(
    stream: Stream, kind: Kind, choose: Callable[[Decisions], StageRef], reason: str, warn: Warn
) -> Change:
    if not reason.strip():
        raise ConfigError("--reason is empty; say why, for those who will ask")
    log = DecisionLog(stream.store, stream.config.name)
    with Lease(stream.store, log.folder) as lease:
        past = log.read()
        ref = choose(past)
        if ref == past.champion:
            return Change(champion=ref, decision=None)
        verify(stream.store, _record(stream, ref), "sizes")
        known = {result.record.ref: result for result in view_of(stream).of("train")}
        decision = Decision(
            kind=kind,
            model=ref,
            champion=ref,
            previous=past.champion,
            reason=reason.strip(),
            scores=scores_of(view_of(stream), known[ref]) if ref in known else past.scores_of(ref),
        )
        decision = log.add(decision, past, lease)
    _follow(stream, warn)
    return Change(champion=ref, decision=decision)


def _record(stream: Stream, ref: StageRef) -> StageRecord:
    try:
        return StageRecord.load(stream.store, ref.key)
    except StoreError as error:
        raise StoreError(
            f"the model after {ref.task} ({ref.fingerprint[:12]}) cannot be promoted: {error}"
        ) from error


def _follow(stream: Stream, warn: Warn) -> None:
    """Let MLflow show the decision; a failure costs the view and not the decision."""
    view = view_of(stream)
    uri = tracking_uri(stream.config.tracking.uri, stream.store)
    if not view.stages:
        return
    tracker = Tracker(uri, stream=stream.config.name, store=stream.store, warn=warn)
    tracker.finish(view)
    tracker.close()
