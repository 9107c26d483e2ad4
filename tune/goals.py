"""What a search is for: one figure, a weighted sum of some, or several at once; and what must hold.

A goal turns figures into numbers of which more is better. Constraints compare a figure with a number, or
with a share of what a reference (another stream on the same data, such as plain fine-tuning) reached; how
far they are missed is what samplers that know constraints learn from, and what sets a trial apart from
those that may be chosen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import field_validator, model_validator

from pipelines.section import Section
from tune.measures import Direction, Figures, Measure, Value

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_CONSTRAINT = re.compile(
    rf"\s*(?P<measure>[A-Za-z][\w.-]*)\s*(?P<how>>=|<=)\s*(?:(?P<factor>{_NUMBER})\s*\*\s*)?"
    rf"(?:(?P<number>{_NUMBER})|(?P<reference>[A-Za-z][\w-]*))\s*"
)


class Goal(Section):
    """What more is wanted of: metric, weights or pareto."""

    metric: str | None = None
    """One figure, such as op."""
    weights: dict[str, float] | None = None
    """A sum of figures, each times its weight; of the sum more is better."""
    pareto: tuple[str, ...] | None = None
    """Several figures, each of them better upwards or downwards as it is its nature."""

    @model_validator(mode="after")
    def _one_kind(self) -> Goal:
        given = [name for name in ("metric", "weights", "pareto") if getattr(self, name)]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"one of metric, weights and pareto is needed; found {found}")
        if self.pareto is not None and len(set(self.pareto)) < 2:
            raise ValueError("pareto weighs different figures: name two or more")
        return self

    @property
    def measures(self) -> tuple[str, ...]:
        """The figures that it is made of."""
        return tuple(self.pareto or self.weights or (self.metric or "",))

    @property
    def title(self) -> str:
        """What tables and axes call it; of several figures the first."""
        if self.weights is None:
            return self.measures[0]
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())

    def directions(self, measures: Mapping[str, Measure]) -> tuple[Direction, ...]:
        """Return which way each of its values is better."""
        if self.weights is not None:
            return ("max",)
        return tuple(measures[name].better for name in self.measures)

    def values(self, figures: Figures) -> tuple[float, ...] | None:
        """Return its values, one or as many as there are figures in `pareto`; None before all are known."""
        found = self._over_seeds(figures)
        return None if found is None else tuple(value.mean for value in found)

    def error(self, figures: Figures) -> float | None:
        """Return the standard error of the first value over seeds; None with one seed."""
        found = self._over_seeds(figures)
        return None if found is None else found[0].error

    def _over_seeds(self, figures: Figures) -> tuple[Value, ...] | None:
        if self.weights is not None:
            total = weighted(self.weights, figures)
            return None if total is None else (total,)
        if any(name not in figures for name in self.measures):
            return None
        return tuple(figures[name] for name in self.measures)


def weighted(weights: Mapping[str, float], figures: Figures) -> Value | None:
    """Return a sum of figures, each times its weight, seed by seed; None before all are known."""
    if any(name not in figures for name in weights):
        return None
    seeds = zip(*(figures[name].values for name in weights), strict=True)
    return Value.of(
        [sum(w * v for w, v in zip(weights.values(), values, strict=True)) for values in seeds]
    )


class Constraint(Section):
    """What a figure must not miss: `measure >= number`, or a share of a reference's own figure."""

    text: str

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value

    @field_validator("text")
    @classmethod
    def _is_understood(cls, text: str) -> str:
        if _CONSTRAINT.fullmatch(text) is None:
            raise ValueError(
                "a constraint is a figure, >= or <=, and a number or a share of a reference, such as "
                "new_task_score >= 0.95 * seqft"
            )
        return text

    @property
    def _parts(self) -> dict[str, str | None]:
        found = _CONSTRAINT.fullmatch(self.text)
        assert found is not None
        return found.groupdict()

    @property
    def measure(self) -> str:
        """The figure that is compared."""
        return self._parts["measure"] or ""

    @property
    def reference(self) -> str | None:
        """The stream it is compared with, if with any."""
        return self._parts["reference"]

    def missed_by(self, figures: Figures, references: Mapping[str, Figures]) -> float:
        """Return by how much it is missed, at most 0 where it holds; infinite while something is unknown."""
        parts = self._parts
        known = figures if self.reference is None else references.get(self.reference, {})
        if self.measure not in figures or (self.reference and self.measure not in known):
            return float("inf")
        bound = known[self.measure].mean if self.reference else float(parts["number"] or 0)
        bound *= float(parts["factor"] or 1)
        short = bound - figures[self.measure].mean
        return short if parts["how"] == ">=" else -short


def on_front(points: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[bool]:
    """Return which points no other one is at least as good as everywhere, and better somewhere."""
    signs = [1 if direction == "max" else -1 for direction in directions]
    signed = [[s * v for s, v in zip(signs, point, strict=True)] for point in points]

    def beaten(own: list[float]) -> bool:
        return any(
            other != own and all(a >= b for a, b in zip(other, own, strict=True))
            for other in signed
        )

    return [not beaten(own) for own in signed]
