"""Parallel coordinates: an axis per field of a space and per goal, and each trial a line across all of them.

A range's axis is as the range is drawn from, so the values of a logarithmic one lie as far apart as their
logarithms; choices are positions in the order in which they are listed. A field whose condition does not
hold has no value: below its axis, with a gap between, there is a position for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from pipelines import svg
from pipelines.svg import number
from tune.spaces import Range
from tune.words import short_setting

NOT_SET = "not set"
_TOP, _HEIGHT, _FLOOR = 54.0, 270.0, 46.0
_LEFT, _RIGHT, _WIDTH, _NARROWEST = 96.0, 66.0, 1036.0, 92.0
_CLOSE = 0.07  # share of an axis in which two tick labels do not both fit
_FEW = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis.

    Attributes:
        ticks: where along it, from 0 at the bottom to 1, and what is written there.
        optional: whether a trial may have no value on it.
        goal: whether it is what trials are judged by.
    """

    title: str
    ticks: tuple[tuple[float, str], ...]
    optional: bool = False
    goal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Thread:
    """A trial across the axes.

    Attributes:
        places: on each axis in order, None where it has no value; fewer than axes if it ends before.
        css: how it is drawn, such as `r7`, `chosen` or `stopped`.
    """

    places: Sequence[float | None]
    css: str
    hint: str


def place(allowed: Range, value: Any) -> float:
    """Return where a value lies along the axis of its range, from 0 to 1."""
    if allowed.choice is not None:
        return _position(allowed.coded(value), len(allowed.choice))
    low, high = allowed.corners()
    if allowed.logarithmic:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return min(max((value - low) / (high - low), 0.0), 1.0)


def axis_of(allowed: Range, title: str) -> Axis:
    """Return the axis of a field."""
    if allowed.choice is not None:
        every = math.ceil(len(allowed.choice) / 18)
        ticks = tuple(
            (_position(i, len(allowed.choice)), short_setting(value))
            for i, value in enumerate(allowed.choice)
            if i % every == 0
        )
    else:
        values = _tick_values(allowed)
        ticks = _apart([(place(allowed, value), number(value)) for value in values])
    return Axis(title=title, ticks=ticks, optional=allowed.when is not None)


def goal_axis(values: Sequence[float], title: str) -> tuple[Axis, list[float]]:
    """Return the axis of what is wanted, from the least to the greatest value, and where each lies."""
    low, high = min(values), max(values)
    wide = high > low
    inner = svg.nice_ticks(low, high, 4) if wide else []
    ends = [(low, 0.0), (high, 1.0)] if wide else [(low, 0.5)]
    ticks = [(at, number(value)) for value, at in ends]
    ticks += [((value - low) / (high - low), number(value)) for value in inner]
    places = [(value - low) / (high - low) if wide else 0.5 for value in values]
    return Axis(title=title, ticks=_apart(ticks), goal=True), places


def parallel(axes: Sequence[Axis], threads: Sequence[Thread], title: str) -> Markup:
    """Draw the axes, and the threads in their order, so that the last lies on top."""
    width = max(_WIDTH, _LEFT + _RIGHT + _NARROWEST * (len(axes) - 1))
    gap = (width - _LEFT - _RIGHT) / max(len(axes) - 1, 1)
    columns = [_LEFT + i * gap for i in range(len(axes))]
    parts = [_thread(thread, columns) for thread in threads]
    for axis, x in zip(axes, columns, strict=True):
        parts += _axis(axis, x, int(min(gap, 2 * _RIGHT) // 6.6))
    return svg.svg(width, _TOP + _HEIGHT + _FLOOR, title, parts)


def _axis(axis: Axis, x: float, limit: int) -> list[Markup]:
    css = "axisline goal" if axis.goal else "axisline"
    parts = [
        svg.rule(css, x, _TOP, x, _TOP + _HEIGHT),
        svg.text(
            "name" + (" goal" if axis.goal else ""), x, 20, svg.shorten(axis.title, limit), "middle"
        ),
    ]
    ticks = [(_row(at), text) for at, text in axis.ticks]
    if axis.optional:
        ticks.append((_row(None), NOT_SET))
    for y, text in ticks:
        parts.append(svg.rule(css, x - 4, y, x, y))
        parts.append(svg.text("tick halo", x - 7, y + 3.5, svg.shorten(text, limit), "end"))
    return parts


def _thread(thread: Thread, columns: Sequence[float]) -> Markup:
    points = list(zip(columns, map(_row, thread.places), thread.places, strict=False))
    parts: list[Markup] = []
    run: list[tuple[float, float]] = [(x, y) for x, y, _ in points[:1]]
    for (x1, y1, before), (x2, y2, after) in pairwise(points):
        if before is None or after is None:
            parts += [_line(thread, run), _line(thread, [(x1, y1), (x2, y2)], " unset")]
            run = [(x2, y2)]
        else:
            run.append((x2, y2))
    return Markup("").join([*parts, _line(thread, run)])


def _line(thread: Thread, points: Sequence[tuple[float, float]], how: str = "") -> Markup:
    if len(points) < 2:
        return Markup("")
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    mark = Markup('<polyline class="trial {}" points="{}"><title>{}</title></polyline>')
    return mark.format(thread.css + how, path, thread.hint)


def _row(at: float | None) -> float:
    return _TOP + _HEIGHT + 24 if at is None else _TOP + (1 - at) * _HEIGHT


def _position(where: int, of: int) -> float:
    return where / (of - 1) if of > 1 else 0.5


def _tick_values(allowed: Range) -> list[float]:
    low, high = allowed.corners()
    listed = allowed.listed()
    if listed is not None and len(listed) <= _FEW:
        return list(listed)
    if allowed.logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [10.0**power for power in decades if low < 10.0**power < high]
        if len(found) < 2:
            found = [m * 10.0**p for p in decades for m in (1, 2, 5) if low < m * 10.0**p < high]
        return [low, high, *found]
    inner = svg.nice_ticks(low, high, 5)
    return [low, high, *(t for t in inner if allowed.integers is None or t == int(t))]


def _apart(ticks: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """Leave out ticks that are too close to one before them in the list."""
    kept: list[tuple[float, str]] = []
    for at, text in ticks:
        if all(abs(at - other) >= _CLOSE for other, _ in kept):
            kept.append((at, text))
    return tuple(sorted(kept))
