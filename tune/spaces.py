"""What a search may choose: a range or a list per field of the stream, some of them only under a condition.

A space is ordered. Fields are chosen one after the other, so a condition speaks of fields above its own;
a field whose condition does not hold is left as the stream has it. Choices are drawn by whoever proposes
(`proposals`), through the define-by-run calls of an Optuna trial.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import optuna
import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import Field, field_validator, model_validator

from pipelines.section import Section

_COMPARE: Final = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(?P<field>[\w.-]+)\s*(?P<how>==|!=|>=|<=|>|<)\s*(?P<value>\S.*?)\s*")
Settings = Mapping[str, Any]


class Range(Section):
    """What a field may be: one of uniform, log_uniform, integers and choice."""

    uniform: tuple[float, float] | None = None
    """Any number from the first to the second."""
    log_uniform: tuple[float, float] | None = None
    """The same, each order of magnitude as likely as the next."""
    integers: tuple[int, int] | None = None
    """Whole numbers from the first to the second, both included."""
    step: int = Field(default=1, ge=1)
    """Between integers."""
    choice: tuple[Any, ...] | None = None
    """One of these, whatever a field takes: numbers, words, null, whole sections."""
    when: str | None = None
    """Only if this holds of a field above, such as `replay.batch_ratio < 1`."""

    @field_validator("uniform", "log_uniform", "integers")
    @classmethod
    def _has_room(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and ends[0] >= ends[1]:
            state = "empty" if ends[0] == ends[1] else "reversed"
            raise ValueError(
                f"the range is {state}; write the smaller number first, or a choice of one value"
            )
        return ends

    @field_validator("log_uniform")
    @classmethod
    def _has_logarithm(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and ends[0] <= 0:
            raise ValueError("a logarithmic range begins above 0; use uniform, or a larger number")
        return ends

    @field_validator("choice")
    @classmethod
    def _has_different_values(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if values is not None:
            shown = [repr(value) for value in values]
            twice = next((text for text in shown if shown.count(text) > 1), None)
            if not values or twice is not None:
                what = f"has {twice} twice" if values else "is empty"
                raise ValueError(f"the choice {what}; list each value once")
        return values

    @field_validator("when")
    @classmethod
    def _is_a_condition(cls, text: str | None) -> str | None:
        if text is not None and _CONDITION.fullmatch(text) is None:
            raise ValueError(
                "a condition is a field above, one of == != > >= < <=, and a value, such as "
                "replay.batch_ratio < 1"
            )
        return text

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"one of {', '.join(_KINDS)} is needed; found {found}")
        if self.step != 1 and self.integers is None:
            raise ValueError("step is only for integers; remove it")
        return self

    def draw(self, field: str, trial: optuna.Trial) -> Any:
        """Return what an Optuna trial proposes for a field."""
        if self.uniform is not None:
            return trial.suggest_float(field, *self.uniform)
        if self.log_uniform is not None:
            return trial.suggest_float(field, *self.log_uniform, log=True)
        if self.integers is not None:
            return trial.suggest_int(field, *self._steps(self.integers), step=self.step)
        assert self.choice is not None
        # By position: a choice may hold what a database of trials does not, such as a section.
        return self.choice[trial.suggest_categorical(field, list(range(len(self.choice))))]

    def distribution(self) -> BaseDistribution:
        """Return what `draw` draws from, as Optuna writes it."""
        if self.uniform is not None:
            return FloatDistribution(*self.uniform)
        if self.log_uniform is not None:
            return FloatDistribution(*self.log_uniform, log=True)
        if self.integers is not None:
            return IntDistribution(*self._steps(self.integers), step=self.step)
        return CategoricalDistribution(list(range(len(self.choice or ()))))

    def coded(self, value: Any) -> Any:
        """Return a value as `draw` has Optuna see it: a choice by its position.

        Choices are compared as a ledger holds them, so true is not 1 and a tuple is a list.
        """
        if self.choice is None:
            return value
        return [_held(one) for one in self.choice].index(_held(value))

    def corners(self) -> tuple[Any, ...]:
        """Return values by which a field is tried before anything runs: the ends, or all choices."""
        return self.choice or self.uniform or self.log_uniform or self.integers or ()

    def listed(self) -> tuple[Any, ...] | None:
        """Return all values, or None if there is no end of them."""
        if self.integers is not None:
            return tuple(range(self.integers[0], self.integers[1] + 1, self.step))
        return self.choice

    def moved(self, value: Any, factor: float, up: bool) -> Any:
        """Return a value a little further up or down: scaled within a range, the next of a choice."""
        values = self.choice
        if values is not None:
            where = self.coded(value) + (1 if up else -1)
            return values[min(max(where, 0), len(values) - 1)]
        low, high = self.corners()
        moved = value * factor if up else value / factor
        if self.integers is not None:
            stepped = low + round((moved - low) / self.step) * self.step
            if stepped == value:
                stepped = value + (self.step if up else -self.step)
            return min(max(stepped, low), self._steps(self.integers)[1])
        return min(max(moved, low), high)

    def _steps(self, ends: tuple[int, int]) -> tuple[int, int]:
        """Return the first and the last integer that steps from the first one reach."""
        return ends[0], ends[0] + (ends[1] - ends[0]) // self.step * self.step

    @property
    def logarithmic(self) -> bool:
        """Whether a picture's axis is."""
        return self.log_uniform is not None

    def holds(self, settings: Settings) -> bool:
        """Return whether the field is to be chosen, given what was chosen above it."""
        if self.when is None:
            return True
        field, how, value = condition(self.when)
        if field not in settings:  # its own condition does not hold
            return False
        return bool(_COMPARE[how](settings[field], value))


_KINDS = ("uniform", "log_uniform", "integers", "choice")
Space = Mapping[str, Range]


def condition(text: str) -> tuple[str, str, Any]:
    """Return the parts of a condition: field, comparison, value."""
    found = _CONDITION.fullmatch(text)
    assert found is not None
    return found["field"], found["how"], yaml.safe_load(found["value"])


def draw(space: Space, trial: optuna.Trial) -> dict[str, Any]:
    """Return the settings that an Optuna trial proposes, in the space's order."""
    settings: dict[str, Any] = {}
    for field, allowed in space.items():
        if allowed.holds(settings):
            settings[field] = allowed.draw(field, trial)
    return settings


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """Yield all settings there are, the last field changing fastest; conditions hold in each.

    Every field must be `listed`.
    """
    seen: set[str] = set()
    for values in itertools.product(*(allowed.listed() or () for allowed in space.values())):
        settings: dict[str, Any] = {}
        for (field, allowed), value in zip(space.items(), values, strict=True):
            if allowed.holds(settings):
                settings[field] = value
        if repr(settings) not in seen:
            seen.add(repr(settings))
            yield settings


def grid_size(space: Space) -> int:
    """Return how many combinations there are before conditions are looked at."""
    return math.prod(len(allowed.listed() or ()) for allowed in space.values())


def satisfying(space: Space, field: str) -> dict[str, Any] | None:
    """Return settings of the fields above one that let it be chosen; None if none of those tried do."""
    above = list(itertools.takewhile(lambda name: name != field, space))
    fixed: dict[str, Any] = {}
    needed = space[field].when
    while needed is not None:  # walk up the conditions
        name, how, value = condition(needed)
        if name not in above:
            return None
        tried = space[name].listed() or space[name].corners()
        good = next((v for v in tried if _comparable(v, how, value)), None)
        if good is None:
            return None
        fixed[name] = good
        needed = space[name].when
    return fixed


def _held(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _comparable(found: Any, how: str, value: Any) -> bool:
    try:
        return bool(_COMPARE[how](found, value))
    except TypeError:
        return False
