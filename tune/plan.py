"""What a search does next: a pure function of its YAML, its stream and its ledger.

References come first, then trials, then what is confirmed. A step takes one entry to a task further on,
or to the end; who takes the step, and how many are on their way, is not known here. Because the ledger is
all that is remembered, a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from seekr.errors import SeekrError
from tune.courses import Course, Courses
from tune.goals import Goal, on_front
from tune.ledger import Copied, Entry, Ledger, Result
from tune.measures import Measure, figures_of
from tune.population import Population, copies
from tune.proposals import Outcome, Proposals
from tune.rules import decide
from tune.words import count

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is to be run: an entry's courses, from where they are to after `tasks` tasks."""

    entry: Entry
    tasks: int
    courses: tuple[Course, ...]


class Plan:
    """Decides; the entries it speaks of are the ledger's.

    Args:
        lag: how many trials run side by side.
        tell: told of everything that happens, a line each.
    """

    def __init__(self, courses: Courses, ledger: Ledger, *, lag: int, tell: Tell) -> None:
        self.courses, self.ledger, self._tell = courses, ledger, tell
        self.search = courses.search
        self.steps = courses.steps
        self.measures: dict[str, Measure] = courses.measures
        self.directions = self.search.goal.directions(self.measures)
        self._busy: set[str] = set()
        self._proposals = Proposals(
            self.search.space,
            self.search.search.by,
            self.directions,
            seed=self.search.seed,
            startup=self.search.search.startup,
            lag=lag,
            constrained=bool(self.search.constraints),
        )

    def begin(self) -> None:
        """Give entries that failed another try; what was refused stays so."""
        for entry in list(self.ledger.entries.values()):
            if entry.state == "failed":
                self.ledger.put(entry.ended_as("open"))

    def next(self) -> Step | None:
        """Return a step that can be taken now; None if there is none before others are done."""
        references = self._references()
        for entry in references:
            if (step := self._step(entry, self.steps)) is not None:
                return step
        if self.search.search.by == "tpe" and any(not entry.ended for entry in references):
            return None
        if (step := self._next_trial()) is not None:
            return step
        if all(entry.ended for entry in self._trials()) and self._complete():
            for entry in self._confirmations():
                if (step := self._step(entry, self.steps)) is not None:
                    return step
        return None

    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        if self._busy or not self._complete():
            return False
        entries = [*self._references(), *self._trials()]
        return all(entry.ended for entry in entries) and all(
            entry.ended for entry in self._confirmations()
        )

    def record(self, step: Step, ran: Sequence[str], error: str | None) -> Entry:
        """Note what came of a step.

        Args:
            ran: keys of the stages that were computed in it.
            error: what stopped it.
        """
        entry = step.entry
        self._busy.discard(entry.key)
        if error is not None:
            self._tell(f"{title(entry)}: failed: {error}")
            return self.ledger.put(entry.ended_as("failed", error))
        results = list(entry.results)
        for learnt in range(entry.tasks + 1, step.tasks + 1):
            views = [course.view(self.ledger.store, learnt) for course in step.courses]
            keys = {stage.key for course in step.courses for stage in course.until(learnt)}
            new = keys - {key for result in results for key in result.stages}
            results.append(
                Result(
                    tasks=learnt,
                    figures=figures_of(self.measures, views),
                    stages=tuple(sorted(keys)),
                    ran=tuple(sorted(new & set(ran))),
                )
            )
        learnt_with = entry.settings_by_task(step.tasks)
        entry = replace(entry, results=tuple(results), learnt=tuple(learnt_with))
        if step.tasks == self.steps:
            entry = entry.ended_as("finished")
        self._tell(f"{title(entry)}: {progress(entry, self.search.goal, self.steps)}")
        return self.ledger.put(entry)

    def missed(self, entry: Entry) -> tuple[float, ...]:
        """Return by how much each constraint is missed."""
        known = {e.key.removeprefix("reference-"): e.figures for e in self.ledger.of("reference")}
        return tuple(c.missed_by(entry.figures, known) for c in self.search.constraints)

    def best(self) -> list[Entry]:
        """Return the finished trials that meet all constraints, the best first; on the front, if several
        figures count, first those that nothing beats."""
        able = [
            entry
            for entry in self._trials()
            if entry.state == "finished"
            and self.search.goal.values(entry.figures) is not None
            and all(short <= 0 for short in self.missed(entry))
        ]
        points = [self.search.goal.values(entry.figures) or () for entry in able]
        front = on_front(points, self.directions)
        order = sorted(
            range(len(able)), key=lambda i: (not front[i], -self._signed(able[i]), able[i].number)
        )
        return [able[i] for i in order]

    def _trials(self) -> list[Entry]:
        return self.ledger.of("trial")

    def _complete(self) -> bool:
        return len(self._trials()) >= self.search.num_trials

    def _references(self) -> list[Entry]:
        found: list[Entry] = []
        for name, settings in self.search.references.items():
            key = f"reference-{name}"
            if key not in self.ledger.entries:
                self._add(Entry(key=key, kind="reference", number=-1, settings=settings,
                                seeds=self.search.seeds))  # fmt: skip
            found.append(self.ledger.entries[key])
        return found

    def _confirmations(self) -> list[Entry]:
        """Return what is run once more: the best trials, and the stream as it is."""
        asked = self.search.confirm
        if not asked.seeds:
            return []
        tasks = [task.name for task in self.courses.base.config.tasks]
        order = asked.order or tuple(reversed(tasks))
        wanted: list[tuple[str, int, dict[str, Any]]] = [("stream", -1, {})]
        wanted += [(f"trial-{e.number}", e.number, e.settings) for e in self.best()[: asked.best]]
        where = "-".join(order) + "-" + "-".join(map(str, asked.seeds))
        found: list[Entry] = []
        for name, number, settings in wanted:
            key = f"confirm-{name}-{where}"
            if key not in self.ledger.entries:
                self._add(Entry(key=key, kind="confirm", number=number, settings=settings,
                                seeds=asked.seeds, order=order))  # fmt: skip
            found.append(self.ledger.entries[key])
        return found

    def _next_trial(self) -> Step | None:
        if isinstance(self.search.scheduler, Population) and self._complete():
            self._exploit(self.search.scheduler)
        for number in range(self.search.num_trials):
            entry = self.ledger.entries.get(f"trial-{number:04d}") or self._propose(number)
            if entry is None:
                return None
            if entry.ended or entry.key in self._busy:
                continue
            entry = self._decide(entry)
            if entry.ended or entry.decided < entry.tasks:
                continue
            if (step := self._step(entry, self._rung(entry.tasks))) is not None:
                return step
        return None

    def _propose(self, number: int) -> Entry | None:
        outcomes = {entry.number: self._outcome(entry) for entry in self._trials() if entry.ended}
        begun = {
            entry.number: entry.learnt[0] if entry.learnt else entry.settings
            for entry in self._trials()
        }
        settings = self._proposals.settings(number, outcomes, begun)
        if settings is None:
            return None
        key = f"trial-{number:04d}"
        return self._add(Entry(key=key, kind="trial", number=number, settings=settings,
                               seeds=self.search.seeds))  # fmt: skip

    def _outcome(self, entry: Entry) -> Outcome:
        failed = entry.state in ("failed", "refused")
        return Outcome(
            values=None if failed else self.search.goal.values(entry.figures),
            tasks=entry.tasks,
            whole=entry.state == "finished",
            missed=tuple(min(short, 1e9) for short in self.missed(entry)),
        )

    def _rung(self, tasks: int) -> int:
        """Return after how many tasks an entry is looked at next."""
        rule = self.search.scheduler
        if rule is None:
            return self.steps
        return min(self.steps, max(rule.first, tasks + 1))

    def _decide(self, entry: Entry) -> Entry:
        """Return the entry with the decision after its newest task made, if it can be."""
        rule = self.search.scheduler
        # Without a rule there is nothing to decide, and a population decides for all members at once.
        if rule is None or isinstance(rule, Population) or entry.decided == entry.tasks:
            return entry
        lower = [e for e in self._trials() if e.number < entry.number]
        if len(lower) < entry.number:
            return entry
        earlier = [self._value_after(other, entry.tasks) for other in lower]
        own = self._value_after(entry, entry.tasks)
        assert own is not None
        decision = decide(rule, entry.tasks, own, earlier)
        if decision == "wait":
            return entry
        entry = replace(entry, decided=entry.tasks)
        if decision == "stop":
            known = sum(value is not None and not math.isnan(value) for value in earlier)
            why = f"{rule.reason(known)} after {count(entry.tasks, 'task')} ({rule.by})"
            self._tell(f"{title(entry)}: stopped, {why}")
            entry = entry.ended_as("stopped", why)
        return self.ledger.put(entry)

    def _exploit(self, rule: Population) -> None:
        """Once all members have learnt as many tasks, let the worst go on from the best."""
        members = self._trials()
        furthest = max(entry.decided for entry in members)
        for entry in members:  # one that failed and was tried again comes after the others
            if not entry.ended and entry.decided < entry.tasks <= furthest:
                self.ledger.put(replace(entry, decided=entry.tasks))
        members = self._trials()
        alive = [entry for entry in members if not entry.ended]
        tasks = min((entry.tasks for entry in alive), default=0)
        waiting = [entry for entry in alive if entry.decided < tasks]
        if tasks == 0 or not waiting or any(entry.key in self._busy for entry in alive):
            return
        if any(entry.tasks != tasks for entry in alive):
            return
        values = [self._value_after(e, tasks) if not e.ended else math.nan for e in members]
        found = copies(
            rule,
            self.search.space,
            [math.nan if value is None else value for value in values],
            [entry.learnt[tasks - 1] if entry.tasks >= tasks else {} for entry in members],
            seed=self.search.seed,
            tasks=tasks,
        )
        for entry in waiting:
            copy = found.get(entry.number)
            after = replace(entry, decided=tasks)
            if copy is not None:
                source = members[copy.source]
                self._tell(
                    f"{title(entry)}: goes on from trial {source.number} after {tasks} tasks"
                )
                after = replace(
                    after,
                    settings=copy.settings,
                    learnt=source.learnt,
                    copied=(*entry.copied, Copied(tasks=tasks, source=source.number)),
                )
            self.ledger.put(after)

    def _value_after(self, entry: Entry, tasks: int) -> float | None:
        """Return a trial's value after some tasks, more is better; NaN if it has ended before, None if
        it may still get there."""
        result = entry.after(tasks)
        if result is None:
            return math.nan if entry.ended else None
        values = self.search.goal.values(result.figures)
        if values is None:
            return -math.inf
        return values[0] * (1 if self.directions[0] == "max" else -1)

    def _signed(self, entry: Entry) -> float:
        return self._value_after(entry, entry.tasks) or 0.0

    def _add(self, entry: Entry) -> Entry:
        """Put a new entry in the ledger; refused at once if the stream cannot be run like that."""
        try:
            self._open(entry)
        except SeekrError as error:
            self._tell(f"{title(entry)}: refused: {error}")
            entry = entry.ended_as("refused", str(error))
        return self.ledger.put(entry)

    def _open(self, entry: Entry) -> tuple[Course, ...]:
        by_task = entry.settings_by_task(len(self.courses.base.config.tasks))
        return tuple(self.courses.open(by_task, seed, entry.order) for seed in entry.seeds)

    def _step(self, entry: Entry, tasks: int) -> Step | None:
        if entry.ended or entry.key in self._busy:
            return None
        self._busy.add(entry.key)
        return Step(entry=entry, tasks=tasks, courses=self._open(entry))


def title(entry: Entry) -> str:
    """Return what people call an entry."""
    if entry.kind == "reference":
        return f"reference {entry.key.removeprefix('reference-')}"
    name = "the stream as it is" if entry.number < 0 else f"trial {entry.number}"
    return name if entry.kind == "trial" else f"confirming {name}"


def progress(entry: Entry, goal: Goal, tasks: int) -> str:
    """Return how far an entry is, and how good."""
    values, error = goal.values(entry.figures), goal.error(entry.figures)
    far = "all tasks learnt" if entry.tasks == tasks else f"{entry.tasks} of {tasks} tasks learnt"
    if values is None:
        return far
    spread = "" if error is None else f" ± {error:.4g}"
    shown = ", ".join(f"{value:.4g}" for value in values)
    return (
        f"{far}, {', '.join(goal.measures) if goal.weights is None else goal.title} {shown}{spread}"
    )
