"""The words and tables of a search's report: what was wanted, what is best, whether it holds, who tried what.

Functions from a `View` of the search to plain values; the template lays out and escapes. A number that is
not known is a dash, never a zero.
"""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from tune.ledger import Entry, State
from tune.measures import Value
from tune.plan import Plan
from tune.population import Population
from tune.rules import Halving
from tune.search_config import SearchConfig
from tune.sharing import Sharing
from tune.words import (
    DASH,
    PLUS_MINUS,
    Wanted,
    count,
    field_names,
    goal_words,
    setting_change,
    short_setting,
    wanted_of,
    written,
)

STATES: tuple[State, ...] = ("finished", "stopped", "failed", "refused", "open")
_ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}
SHOWN = {"open": "still open"}
_BY = {
    "grid": "all of a grid",
    "random": "settings drawn at random",
    "tpe": "settings proposed by TPE",
}


@dataclass(frozen=True, kw_only=True)
class View:
    """A search as its report reads it; everything is looked up once."""

    plan: Plan

    @cached_property
    def search(self) -> SearchConfig:
        """Its YAML."""
        return self.plan.search

    @cached_property
    def trials(self) -> list[Entry]:
        """All trials by number."""
        return self.plan.ledger.of("trial")

    @cached_property
    def finished(self) -> list[Entry]:
        """Trials that learnt all tasks and whose goal is known."""
        return [e for e in self.trials if e.state == "finished" and self.values(e) is not None]

    @cached_property
    def best(self) -> list[Entry]:
        """Those that may be chosen, the best first."""
        return self.plan.best()

    @cached_property
    def wanted(self) -> tuple[Wanted, ...]:
        """What the goal wants."""
        return wanted_of(self.search.goal, self.plan.directions)

    @cached_property
    def names(self) -> dict[str, str]:
        """Short names of the space's fields."""
        return field_names(self.search.space)

    @cached_property
    def sharing(self) -> Sharing:
        """The account of compute."""
        return Sharing.of_ledger(self.plan.ledger)

    def values(self, entry: Entry) -> list[Value] | None:
        """Return what an entry reached of all that is wanted; None if some of it is not known."""
        found = [one.of(entry.figures) for one in self.wanted]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else None

    def first(self, entry: Entry) -> Value | None:
        """Return what an entry reached of what is wanted first."""
        return self.wanted[0].of(entry.figures)

    def hint(self, entry: Entry) -> str:
        """Return what stands beside an entry's mark when pointed at."""
        value = self.first(entry)
        after = (
            ""
            if entry.state == "finished"
            else f" after {count(entry.tasks, 'task')}, {entry.state}"
        )
        far = f": {self.wanted[0].title} {self.wanted[0].written(value)}{after}" if value else after
        own = ", ".join(
            f"{self.names.get(f, f)} {short_setting(v)}" for f, v in entry.settings.items()
        )
        return f"trial {entry.number}{far}; {own}"


def header(view: View) -> dict[str, Any]:
    """Return what the search is, what it wants, and how far it is."""
    search, config = view.search, view.plan.courses.base.config
    states = Counter(entry.state for entry in view.trials)
    told = [f"{states[state]} {SHOWN.get(state, state)}" for state in STATES]
    begun = len(view.trials)
    return {
        "name": search.name,
        "wanted": goal_words(search.goal, view.wanted, view.plan.measures),
        "constraints": [constraint.text for constraint in search.constraints],
        "stream": config.name,
        "method": config.method.name,
        "tasks": count(len(config.tasks), "task"),
        "how": "; ".join([_BY[search.search.by], *_scheduler(search)]),
        "seeds": count(len(search.seeds), "seed"),
        "begun": f"{begun} of {search.num_trials} trials begun" if begun < search.num_trials
        else count(begun, "trial"),
        "states": ", ".join(told),
    }  # fmt: skip


def tiles(view: View) -> list[dict[str, str]]:
    """Return the numbers a reader wants first."""
    best = view.best[0] if view.best else None
    rows = confirmed(view)
    one = view.wanted[0]
    states = Counter(entry.state for entry in view.trials)
    ours, plain = (rows[0], rows[1]) if rows else (None, None)
    shared = view.sharing
    spent = sum(shared.spent.values())
    not_yet = "not confirmed yet" if view.search.confirm.seeds else "no confirmation asked for"
    return [
        _tile(
            f"Best {one.title}",
            one.written(view.first(best)) if best else DASH,
            f"trial {best.number}, {_over(best)}" if best else "no trial may be chosen yet",
        ),
        _tile(
            "Best, confirmed",
            one.written(ours and view.first(ours)),
            f"trial {ours.number}, {_over(ours)}" if ours else not_yet,
        ),
        _tile(
            "Stream as it is",
            one.written(plain and view.first(plain)),
            f"confirmed the same way, {_over(plain)}" if plain else not_yet,
        ),
        _tile("Trials", str(len(view.trials)), f"{states['finished']} learnt all tasks"),
        _tile(
            "Compute saved",
            DASH if shared.saved is None else written("op", shared.saved),
            "by sharing stages",
        ),
        _tile("Compute time", written("seconds", spent), "each stage counted once"),
    ]


def confirmed(view: View) -> tuple[Entry, Entry] | None:
    """Return the confirmations of the best trial and of the stream as it is, once both are known."""
    if not view.best:
        return None
    for group in confirmations(view):
        found = {e.number: e for e in group if e.state == "finished" and view.first(e) is not None}
        if view.best[0].number in found and -1 in found:
            return found[view.best[0].number], found[-1]
    return None


def confirmations(view: View) -> list[list[Entry]]:
    """Return what was run once more, by order and seeds, those that the YAML asks for now first."""
    asked = view.search.confirm.seeds

    def where(entry: Entry) -> tuple[bool, tuple[str, ...], tuple[int, ...]]:
        return entry.seeds != asked, entry.order or (), entry.seeds

    ranks = {entry.number: rank for rank, entry in enumerate(view.best)} | {-1: -1}
    entries = sorted(
        view.plan.ledger.of("confirm"),
        key=lambda e: (where(e), ranks.get(e.number, len(ranks)), e.number),
    )
    return [list(group) for _, group in groupby(entries, key=where)]


def best_settings(view: View) -> dict[str, Any] | None:
    """Return the best trial's settings beside what the stream has; None if no trial may be chosen."""
    if not view.best:
        return None
    best, search = view.best[0], view.search
    own = view.plan.courses.base.config.model_dump(mode="json")
    by_task = best.settings_by_task(view.plan.steps) if best.copied else [best.settings]
    rows = [
        {
            "field": field,
            "name": view.names[field],
            "values": [short_setting(s[field]) if field in s else "not set" for s in by_task],
            "stream": _of_stream(own, field),
            "allowed": _allowed(view, field),
        }
        for field in search.space
    ]
    lines = [setting_change(f, v) for f, v in {**search.changes, **best.settings}.items()]
    tasks = [task.name for task in view.plan.courses.base.config.tasks]
    return {
        "number": best.number,
        "copied": [f"trial {c.source} after {count(c.tasks, 'task')}" for c in best.copied],
        "columns": tasks[: len(by_task)] if best.copied else ["value"],
        "rows": rows,
        "lines": [f"--set {shlex.quote(line)}" for line in lines],
    }


def no_best(view: View) -> str:
    """Return why there is no best trial."""
    if not any(entry.state == "finished" for entry in view.trials):
        return "No trial has learnt all tasks yet, so there is no best one."
    return "No trial that learnt all tasks meets all constraints, so none may be chosen."


def _scheduler(search: SearchConfig) -> list[str]:
    rule = search.scheduler
    if rule is None:
        return []
    after = f"after each task from the {_ORDINALS.get(rule.first, f'{rule.first}th')} on"
    if isinstance(rule, Population):
        share = f"{100 * rule.quantile:g} %"
        return [f"{after}, the worst {share} go on from the best (PBT)"]
    if isinstance(rule, Halving):
        return [f"{after}, one in {rule.reduction:g} goes on (ASHA)"]
    return [f"{after}, those below the median are stopped"]


def _of_stream(config: Any, field: str) -> str:
    for part in field.split("."):
        if isinstance(config, list) and part.isdecimal() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, dict) and part in config:
            config = config[part]
        else:
            return DASH
    return short_setting(config)


def _allowed(view: View, field: str) -> str:
    allowed = view.search.space[field]
    if allowed.choice is not None:
        words = "one of " + ", ".join(short_setting(value) for value in allowed.choice)
    else:
        low, high = allowed.corners()
        steps = f" by {allowed.step}" if allowed.step > 1 else ""
        way = ", logarithmic" if allowed.logarithmic else ""
        words = f"{short_setting(low)} to {short_setting(high)}{steps}{way}"
    return f"{words}; if {allowed.when}" if allowed.when else words


def _over(entry: Entry) -> str:
    return f"mean of {len(entry.seeds)} seeds" if len(entry.seeds) > 1 else "one seed"


def _tile(label: str, value: str, hint: str) -> dict[str, str]:
    mean, mark, error = value.partition(PLUS_MINUS)
    return {"label": label, "value": mean.strip(), "error": f"{mark}{error}", "hint": hint}
