"""The gate: may the newest model take the champion's place?

`judge` is a pure function of figures and bounds. Forgetting of a task is a reference score less the
model's. The reference is the best score of any model since the task was learnt, itself included (Chaudhry
et al., as in `seekr.metrics`), which catches many small losses in a row; or the champion's own, which
forgives what was promoted by hand. A bound that has nothing to compare with is not applied and says so:
nothing was learnt before a first task, and no champion precedes the first one. A figure that ought to
exist and does not, or that was measured otherwise, fails: nobody knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.config import StreamConfig
from pipelines.continual_config import GateConfig
from pipelines.decisions import Check, Decision, DecisionLog, Decisions, Score
from pipelines.labels import BASE
from pipelines.lease import Lease
from pipelines.results import StageResult, StreamView
from pipelines.store import Store
from seekr.metrics import AccuracyMatrix

# Two scores are means of the same rows, so what differs by less is rounding.
TOLERANCE = 1e-9


# What the harness's figures are called where less of them is better.
_LESS_IS_BETTER = ("perplexity", "bits_per_byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """A figure of general ability, of the base model and of the newest one."""

    base: float | None
    now: float | None
    less_is_better: bool = False

    @property
    def loss(self) -> float | None:
        """By how much it got worse; None if one of the two was not measured."""
        if self.base is None or self.now is None:
            return None
        return self.now - self.base if self.less_is_better else self.base - self.now


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known when the newest model is judged; it has learnt all tasks of `matrix`.

    Attributes:
        matrix: R[i][j].
        scores: of the newest model, with what they were measured by.
        champion: the same of the champion when it was decided about; None before the first.
        general: by harness task.
    """

    matrix: AccuracyMatrix
    scores: Mapping[str, Score]
    champion: Mapping[str, Score] | None = None
    general: Mapping[str, Ability] = field(default_factory=dict)


def judge(gate: GateConfig, evidence: Evidence) -> tuple[Check, ...]:
    """Return every bound that is set, for everything it is about."""
    found: list[Check] = []
    if gate.min_new_score is not None:
        found += _new_scores(gate.min_new_score, evidence)
    if gate.min_new_gain is not None:
        found += _new_gains(gate.min_new_gain, evidence)
    if gate.max_forgetting is not None or gate.max_mean_forgetting is not None:
        found += _forgetting(gate, evidence)
    if gate.max_general_loss is not None:
        found += _general_losses(gate.max_general_loss, evidence.general)
    return tuple(found)


def _new_tasks(evidence: Evidence) -> Iterator[tuple[int, str]]:
    """Yield what the champion has not learnt; without one, everything."""
    known = evidence.champion or {}
    return ((j, task) for j, task in enumerate(evidence.matrix.tasks) if task not in known)


def _new_scores(limit: float, evidence: Evidence) -> Iterator[Check]:
    last = len(evidence.matrix.tasks) - 1
    for j, task in _new_tasks(evidence):
        score = evidence.matrix.score(last, j)
        yield _at_least("min_new_score", task, score, limit, "its score")


def _new_gains(limit: float, evidence: Evidence) -> Iterator[Check]:
    matrix, last = evidence.matrix, len(evidence.matrix.tasks) - 1
    for j, task in _new_tasks(evidence):
        if j == 0:
            why = "nothing is scored before the stream's first task"
            yield Check(
                bound="min_new_gain", of=task, figure=None, limit=limit, holds=None, why=why
            )
            continue
        score, before = matrix.score(last, j), matrix.score(j - 1, j)
        gain = None if score is None or before is None else score - before
        yield _at_least(
            "min_new_gain",
            task,
            gain,
            limit,
            f"{_shown(score)}, before it was learnt {_shown(before)}",
        )


def _forgetting(gate: GateConfig, evidence: Evidence) -> Iterator[Check]:
    losses: dict[str, float | None] = {}
    words: dict[str, str] = {}
    if gate.against == "best":
        nothing = "no task was learnt before this one"
        losses = evidence.matrix.forgetting()
        last = len(evidence.matrix.tasks) - 1
        for j, (task, loss) in enumerate(losses.items()):
            now = evidence.matrix.score(last, j)
            best = None if loss is None or now is None else now + loss
            words[task] = f"{_shown(now)}, at best {_shown(best)} since it was learnt"
    else:
        nothing = "there is no champion whose scores are known"
        for task, then in (evidence.champion or {}).items():
            now = evidence.scores.get(task)
            alike = now is not None and now.measure == then.measure
            losses[task] = then.score - now.score if now is not None and alike else None
            words[task] = f"{_shown(now and now.score)}, the champion had {_shown(then.score)}" + (
                "" if alike else ", measured on other rows or in another way"
            )
    if gate.max_forgetting is not None:
        for task, loss in losses.items():
            yield _at_most("max_forgetting", task, loss, gate.max_forgetting, words[task])
        if not losses:
            yield _without("max_forgetting", gate.max_forgetting, nothing)
    if gate.max_mean_forgetting is not None and losses:
        known = [loss for loss in losses.values() if loss is not None]
        mean = math.fsum(known) / len(known) if len(known) == len(losses) else None
        of = f"over {len(losses)} task{'' if len(losses) == 1 else 's'}"
        yield _at_most("max_mean_forgetting", "", mean, gate.max_mean_forgetting, of)
    elif gate.max_mean_forgetting is not None:
        yield _without("max_mean_forgetting", gate.max_mean_forgetting, nothing)


def _general_losses(limit: float, general: Mapping[str, Ability]) -> Iterator[Check]:
    for task, found in general.items():
        why = f"{_shown(found.now)}, the base model had {_shown(found.base)}"
        yield _at_most("max_general_loss", task, found.loss, limit, why)
    if not general:
        yield Check(
            bound="max_general_loss",
            figure=None,
            limit=limit,
            holds=False,
            why="nothing was measured",
        )


def _at_least(bound: str, of: str, figure: float | None, limit: float, why: str) -> Check:
    holds = figure is not None and figure >= limit - TOLERANCE
    why = why if figure is not None else f"not known: {why}"
    return Check(bound=bound, of=of, figure=figure, limit=limit, holds=holds, why=why)


def _at_most(bound: str, of: str, figure: float | None, limit: float, why: str) -> Check:
    holds = figure is not None and figure <= limit + TOLERANCE
    why = why if figure is not None else f"not known: {why}"
    return Check(bound=bound, of=of, figure=figure, limit=limit, holds=holds, why=why)


def _without(bound: str, limit: float, why: str) -> Check:
    return Check(bound=bound, figure=None, limit=limit, holds=None, why=why)


def _shown(score: float | None) -> str:
    return "no score" if score is None else f"{score:.4f}"


def decide(store: Store, config: StreamConfig, view: StreamView) -> Decision | None:
    """Let the gate judge a stream's newest model, once, and record what it says.

    Args:
        view: of the finished stream.

    Returns:
        The decision; None without a gate, or if the model was judged by these bounds before.
    """
    newest = next(reversed(list(view.of("train"))), None)
    if config.gate is None or newest is None:
        return None
    log, gate = DecisionLog(store, config.name), config.gate.model_dump(mode="json")
    model = newest.record.ref
    if log.read().has_judged(model, gate):
        return None
    with Lease(store, log.folder) as lease:
        past = log.read()
        if past.has_judged(model, gate):
            return None
        checks = judge(config.gate, evidence_of(view, past))
        failed = [check for check in checks if check.holds is False]
        champion = past.champion if failed else model
        decision = Decision(
            kind="gate",
            model=model,
            champion=champion,
            previous=past.champion,
            reason=_reason(checks, failed, first=past.champion is None),
            checks=checks,
            scores=scores_of(view, newest),
            gate=gate,
        )
        return log.add(decision, past, lease)


def evidence_of(view: StreamView, past: Decisions) -> Evidence:
    """Gather what the newest model of a finished stream is judged by."""
    newest = next(reversed(list(view.of("train"))))
    measured = view.general()
    base, last = measured.get(BASE, {}), measured.get(newest.task, {})
    return Evidence(
        matrix=view.matrix(),
        scores=scores_of(view, newest),
        champion=None if past.champion is None else past.scores_of(past.champion),
        general={task: _ability(base.get(task), last.get(task)) for task in base | last},
    )


def scores_of(view: StreamView, model: StageResult) -> dict[str, Score]:
    """Return a model's scores by task, each with a name of the rows and the metric behind it."""
    found: dict[str, Score] = {}
    for result in view.of("evaluate"):
        used = result.record.inputs.get(f"model.{model.task}")
        if used != model.record.ref:
            continue
        for cell in (result.read_json("scores.json") or {}).get("cells", ()):
            data = result.record.inputs.get(f"data.{cell['task']}")
            if cell["model_after"] == model.task and data is not None:
                measure = f"{cell['metric']} on {data.fingerprint}"
                found.setdefault(cell["task"], Score(score=float(cell["score"]), measure=measure))
    return found


def _ability(base: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Ability:
    """Of two measurements; figures under two names do not compare, so the later one is dropped."""
    named = {str(found["metric"]) for found in (base, now) if found is not None}
    comparable = now is not None and len(named) == 1
    return Ability(
        base=None if base is None else float(base["value"]),
        now=float(now["value"]) if now is not None and comparable else None,
        less_is_better=any(word in name for name in named for word in _LESS_IS_BETTER),
    )


def _reason(checks: Sequence[Check], failed: Sequence[Check], *, first: bool) -> str:
    applied = [check for check in checks if check.holds is not None]
    if failed:
        return f"{len(failed)} of {len(applied)} bounds fail: " + "; ".join(map(str, failed))
    words = f"all {len(applied)} bounds hold" if applied else "no bound could be applied"
    skipped = len(checks) - len(applied)
    words += f", {skipped} could not be applied" if skipped and applied else ""
    return f"{words}; it is the first champion" if first else words
