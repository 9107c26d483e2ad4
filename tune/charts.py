"""Pictures of a search's trials: value against number, value after each task, one figure against another.

They are made of the same marks as a stream's report: CSS classes and coordinates, no colour of their own.
A value is drawn the stronger the better it is (`r0`..`r9` along the page's ramp); the best trial has the
accent's colour. Every function is pure, takes values as they are to be read on the axes, and escapes text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

from pipelines import svg
from pipelines.svg import Frame, number
from tune.goals import on_front
from tune.measures import Direction

LEVELS = 10
WIDTH = 1036
Mark = Literal["good", "missed", "stopped", "open", "none"]
_NOTHING = Markup('<p class="note">Nothing to draw: no value is known yet.</p>')


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A trial in the history.

    Attributes:
        value: its last one; None if it has none.
        mark: `good` if it may be chosen, `missed` if it misses a constraint, `none` if it failed or was
            refused.
    """

    number: int
    value: float | None
    error: float | None
    mark: Mark
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A trial's way through the tasks.

    Attributes:
        values: after how many tasks, and the value.
        jumps: after how many tasks it went on from another trial, and that one's value there.
        css: how it is drawn, such as `r7`, `chosen` or `stopped`.
    """

    values: Sequence[tuple[int, float]]
    jumps: Sequence[tuple[int, float]]
    css: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A trial in a plane."""

    number: int
    x: float
    y: float
    css: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Where values lie on a picture."""

    frame: Frame
    xs: tuple[float, float]
    ys: tuple[float, float]

    def at_x(self, x: float) -> float:
        """Return the pixel column of a value."""
        low, high = self.xs
        share = (x - low) / (high - low) if high > low else 0.5
        return self.frame.left + share * self.frame.plot_width

    def at_y(self, y: float) -> float:
        """Return the pixel row of a value."""
        low, high = self.ys
        return self.frame.top + (high - y) / (high - low) * self.frame.plot_height

    def y_axis(self) -> Markup:
        """Return grid lines with their values."""
        ticks = [(self.at_y(tick), tick) for tick in svg.nice_ticks(*self.ys, 5)]
        return svg.y_axis(self.frame, ticks, percent=False)


def levels(values: Sequence[float], better: Direction) -> list[str]:
    """Return the class of each value, `r0` for the worst to `r9` for the best."""
    signed = [value if better == "max" else -value for value in values]
    low, high = min(signed, default=0.0), max(signed, default=0.0)
    shares = [(value - low) / (high - low) if high > low else 1.0 for value in signed]
    return [f"r{round(share * (LEVELS - 1))}" for share in shares]


def running_best(points: Sequence[tuple[int, float]], better: Direction) -> list[tuple[int, float]]:
    """Return the best value up to each number, in the order of numbers."""
    best: list[tuple[int, float]] = []
    choose = max if better == "max" else min
    for place, value in sorted(points):
        best.append((place, choose(value, best[-1][1]) if best else value))
    return best


def history(trials: Sequence[Tried], better: Direction, title: str) -> Markup:
    """Draw each trial's value against its number, and the best so far as a line of steps."""
    known = [(one, one.value) for one in trials if one.value is not None]
    if not known:
        return _NOTHING
    ends = [value + side * (one.error or 0.0) for one, value in known for side in (-1, 1)]
    last = max(one.number for one in trials)
    plot = Plot(
        frame=Frame(width=WIDTH, height=300, left=56, top=14),
        xs=(-0.5, last + 0.5),
        ys=_limits(ends),
    )
    ticks = [tick for tick in svg.nice_ticks(0, max(last, 1), 12) if tick == int(tick) <= last]
    parts = [
        plot.y_axis(),
        svg.x_axis(plot.frame, "trial", [(tick, number(tick)) for tick in ticks], plot.at_x),
    ]
    good = [(one.number, value) for one, value in known if one.mark == "good"]
    if steps := running_best(good, better):
        parts.append(_steps(plot, [*steps, (last, steps[-1][1])]))
    for one, value in known:
        x, y = plot.at_x(one.number), plot.at_y(value)
        if one.mark == "none":
            parts.append(_cross(x, y, one.hint))
            continue
        if one.error:
            up, down = plot.at_y(value + one.error), plot.at_y(value - one.error)
            parts.append(svg.rule(f"whisker {one.mark}", x, up, x, down))
        parts.append(_circle(f"mark {one.mark}", x, y, 4, one.hint))
    floor = plot.frame.height - plot.frame.bottom
    for one in trials:
        if one.value is None and one.mark == "none":
            parts.append(_cross(plot.at_x(one.number), floor - 7, one.hint))
    return svg.svg(plot.frame.width, plot.frame.height, title, parts)


def by_task(ways: Sequence[Way], tasks: Sequence[str], title: str) -> Markup:
    """Draw each trial's value over the tasks that it has learnt; copies are jumps with a mark.

    Args:
        tasks: the tasks' names in order.
    """
    known = [value for way in ways for _, value in (*way.values, *way.jumps)]
    if not known:
        return _NOTHING
    frame = Frame(width=WIDTH, height=320, left=56, right=30, top=14)
    plot = Plot(frame=frame, xs=(1.0, float(max(len(tasks), 2))), ys=_limits(known))
    room = int(frame.plot_width / max(len(tasks) - 1, 1) // 7)
    names = [
        (float(i), f"{i}: {svg.shorten(name, room - 3)}" if room > 9 else str(i))
        for i, name in enumerate(tasks, start=1)
    ]
    parts = [plot.y_axis(), svg.x_axis(frame, "tasks learnt", names, plot.at_x)]
    for way in ways:
        parts.append(_way(plot, way))
    return svg.svg(frame.width, frame.height, title, parts)


def plane(
    spots: Sequence[Spot],
    directions: tuple[Direction, Direction],
    *,
    x_label: str,
    y_label: str,
    title: str,
) -> Markup:
    """Draw trials in the plane of two figures, with those joined that nothing beats in both.

    Args:
        directions: which way x and y are better.
    """
    if not spots:
        return _NOTHING
    frame = Frame(width=WIDTH, height=360, left=56, right=40, top=34)
    plot = Plot(frame=frame, xs=_limits([s.x for s in spots]), ys=_limits([s.y for s in spots]))
    ticks = [(tick, number(tick)) for tick in svg.nice_ticks(*plot.xs, 8)]
    parts = [
        svg.text("axis", 4, 14, y_label),
        plot.y_axis(),
        svg.x_axis(frame, x_label, ticks, plot.at_x),
    ]
    front = on_front([(s.x, s.y) for s in spots], directions)
    line = sorted({(s.x, s.y) for s, on in zip(spots, front, strict=True) if on})
    if len(line) > 1:
        parts.append(_line("front", [(plot.at_x(x), plot.at_y(y)) for x, y in line], "the front"))
    labels: list[Markup] = []
    for spot, on in sorted(zip(spots, front, strict=True), key=lambda pair: pair[1]):
        x, y = plot.at_x(spot.x), plot.at_y(spot.y)
        css = f"mark {spot.css}" + (" front" if on else "")
        parts.append(_circle(css, x, y, 5 if on else 4, spot.hint))
        if on:
            labels.append(svg.text("tick halo", x + 8, y - 7, str(spot.number)))
    return svg.svg(frame.width, frame.height, title, [*parts, *labels])


def _way(plot: Plot, way: Way) -> Markup:
    jumps = dict(way.jumps)
    segments: list[list[tuple[float, float]]] = [[]]
    marks: list[Markup] = []
    for tasks, value in sorted(way.values):
        x, y = plot.at_x(tasks), plot.at_y(value)
        segments[-1].append((x, y))
        if tasks in jumps:
            there = plot.at_y(jumps[tasks])
            marks.append(svg.rule(f"jump {way.css}", x, y, x, there))
            marks.append(_diamond(x, there, way.css, way.hint))
            segments.append([(x, there)])
    lines = [_line(f"trial {way.css}", points, way.hint) for points in segments if len(points) > 1]
    ends = sorted(way.values)[-1:]
    dots = [_circle(f"end {way.css}", plot.at_x(x), plot.at_y(y), 2.6, way.hint) for x, y in ends]
    return Markup("").join([*lines, *marks, *dots])


def _steps(plot: Plot, points: Sequence[tuple[int, float]]) -> Markup:
    path: list[tuple[float, float]] = [(plot.at_x(points[0][0]), plot.at_y(points[0][1]))]
    for (_, before), (place, value) in pairwise(points):
        path.append((plot.at_x(place), plot.at_y(before)))
        if value != before:
            path.append((plot.at_x(place), plot.at_y(value)))
    return _line("running", path, "the best so far")


def _line(css: str, points: Sequence[tuple[float, float]], hint: str) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    mark = Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>')
    return mark.format(css, path, hint)


def _circle(css: str, x: float, y: float, radius: float, hint: str) -> Markup:
    mark = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>'
    return Markup(mark).format(css, x, y, radius, hint)


def _diamond(x: float, y: float, css: str, hint: str) -> Markup:
    mark = '<path class="copied {}" d="M{:.1f} {:.1f}l5 5l-5 5l-5 -5z"><title>{}</title></path>'
    return Markup(mark).format(css, x, y - 5, hint)


def _cross(x: float, y: float, hint: str) -> Markup:
    mark = '<path class="cross" d="M{:.1f} {:.1f}l7 7m0 -7l-7 7"><title>{}</title></path>'
    return Markup(mark).format(x - 3.5, y - 3.5, hint)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    air = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    assert math.isfinite(air)
    return (0.0 if 0 <= low < 0.2 * high else low - air), high + air
