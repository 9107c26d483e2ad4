"""How a search's figures, fields and settings are called and written, in its report and on the terminal.

A figure knows its unit by its name: scores are shares and written in per cent, times and sizes for people,
anything else (a weighted sum, another program's metric) as a plain number. Differences carry a sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

from pipelines.readable import MINUS, duration, size
from pipelines.svg import shorten
from tune.goals import Goal, weighted
from tune.measures import Direction, Figures, Measure, Value

PLUS_MINUS: Final = "\N{PLUS-MINUS SIGN}"
DASH: Final = "\N{EN DASH}"
_NAMES: Final = {
    "op": "OP",
    "bwt": "BWT",
    "fwt": "FWT",
    "new_task_score": "new-task score",
    "top_accuracy": "Top Acc",
    "nf_accuracy": "NF Acc",
    "seconds": "compute time",
    "replay_bytes": "replay store",
}
_SHARES: Final = {
    "op", "bwt", "fwt", "forgetting", "new_task_score", "top_accuracy", "nf_accuracy",
    "total_knowledge", "final_total",
}  # fmt: skip
_LONGEST = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One of the numbers that are wanted.

    Attributes:
        measure: the figure's name; of a weighted sum the sum's text.
        weights: the sum's parts.
    """

    measure: str
    better: Direction
    weights: Mapping[str, float] | None = None

    @property
    def title(self) -> str:
        """What people call it."""
        return self.measure if self.weights is not None else figure_name(self.measure)

    @property
    def sign(self) -> int:
        """1 if more is better, -1 if less is."""
        return 1 if self.better == "max" else -1

    def of(self, figures: Figures) -> Value | None:
        """Return its value, summed up seed by seed; None if it is not known, or not a finite number."""
        weights = self.weights
        found = weighted(weights, figures) if weights else figures.get(self.measure)
        return found if found is not None and math.isfinite(found.mean) else None

    def written(self, value: Value | None) -> str:
        """Return a value with its standard error."""
        if value is None:
            return DASH
        return with_error(self.measure, value.mean, value.error)


def wanted_of(goal: Goal, directions: Sequence[Direction]) -> tuple[Wanted, ...]:
    """Return what a goal wants, one or as many as there are figures in `pareto`."""
    if goal.weights is not None:
        return (Wanted(measure=goal.title, better="max", weights=goal.weights),)
    pairs = zip(goal.measures, directions, strict=True)
    return tuple(Wanted(measure=name, better=better) for name, better in pairs)


def goal_words(goal: Goal, wanted: Sequence[Wanted], measures: Mapping[str, Measure]) -> str:
    """Return what is wanted, as a part of a sentence."""
    if goal.weights is not None:
        return f"more of {goal.title}"
    parts = [
        f"{'more' if one.better == 'max' else 'less'} {one.title} ({measures[one.measure].says})"
        for one in wanted
    ]
    return ", and ".join(parts) + (" at once" if len(parts) > 1 else "")


def figure_name(name: str) -> str:
    """Return a figure's name as papers write it."""
    for prefix, words in (("score.", "score on"), ("general.", "general ability on")):
        if name.startswith(prefix):
            return f"{words} {name.removeprefix(prefix)}"
    return _NAMES.get(name, name.replace("_bytes", "").replace("_", " "))


def field_names(fields: Iterable[str]) -> dict[str, str]:
    """Return short names of fields, all different: `method.head_budget` is head budget, `replay.ratio`
    replay ratio."""
    names = {field: _field_name(field) for field in fields}
    known = list(names.values())
    return {field: name if known.count(name) == 1 else field for field, name in names.items()}


def setting(value: Any) -> str:
    """Return a setting as YAML on one line."""
    if isinstance(value, float):
        value = float(f"{value:.6g}")
    return _yaml(value)


def setting_change(field: str, value: Any) -> str:
    """Return what lays a setting over a stream, exactly: `field=value` with a YAML value."""
    return f"{field}={_yaml(value)}"


def short_setting(value: Any) -> str:
    """Return a setting for a table's cell."""
    return shorten(_number(value) if isinstance(value, float) else setting(value), _LONGEST)


def on_axis(name: str, values: Iterable[float]) -> tuple[float, str]:
    """Return by what a figure's values are multiplied for an axis that holds them all, and its unit there."""
    largest = max(map(abs, values), default=0.0)
    if _is_share(name):
        return 100.0, "%"
    if name.endswith("_bytes"):
        return (1 / 2**30, "GiB") if largest > 2**30 else (1 / 2**20, "MiB")
    if name != "seconds":
        return 1.0, ""
    if largest > 7200:
        return 1 / 3600, "h"
    return (1 / 60, "min") if largest > 120 else (1.0, "s")


def with_error(name: str, mean: float, error: float | None) -> str:
    """Return a figure with its standard error."""
    if error is None:
        return written(name, mean)
    if _is_share(name):
        return f"{_signless(100 * mean)} {PLUS_MINUS} {100 * error:.1f} %"
    return f"{written(name, mean)} {PLUS_MINUS} {written(name, error)}"


def written(name: str, value: float) -> str:
    """Return a figure with its unit."""
    if value < 0:
        return MINUS + written(name, -value)
    if _is_share(name):
        return f"{100 * value:.1f} %"
    if name.endswith("_bytes"):
        return size(value)
    return duration(value) if name == "seconds" else f"{value:.4g}"


def difference(name: str, value: float, error: float | None = None) -> str:
    """Return by how much a figure is larger, signed, with the standard error; of shares in points."""
    unit = " points" if _is_share(name) else ""

    def plain(number: float) -> str:
        return f"{100 * number:.1f}" if unit else written(name, number)

    sign = "+" if value > 0 else MINUS if value < 0 else ""
    spread = "" if error is None else f" {PLUS_MINUS} {plain(error)}"
    return f"{sign}{plain(abs(value))}{spread}{unit}"


def count(number: int, thing: str) -> str:
    """Return how many there are of something: 1 trial, 2 trials."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _is_share(name: str) -> bool:
    return name in _SHARES or name.startswith("score.")


def _signless(value: float) -> str:
    return f"{value:.1f}".replace("-", MINUS)


def _field_name(field: str) -> str:
    parts = field.split(".")
    shown = parts[-1:] if "_" in parts[-1] or len(parts) == 1 else parts[-2:]
    return " ".join(shown).replace("_", " ")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
