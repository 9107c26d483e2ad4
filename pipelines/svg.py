"""The marks that figures are made of: text, rules, axes and polylines as escaped SVG.

Kept apart from `pipelines.figures` so that a chart reads as what it shows. A mark carries CSS
classes and coordinates only; the report's style sheet decides how it looks in each theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

NUM_COLOURS = 10
LABEL_PITCH = 14.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Size of a chart in CSS pixels and the margins around its plot area."""

    width: int
    height: int
    left: int = 44
    right: int = 12
    top: int = 10
    bottom: int = 38

    @property
    def plot_width(self) -> int:
        return self.width - self.left - self.right

    @property
    def plot_height(self) -> int:
        return self.height - self.top - self.bottom


def shorten(text: str, limit: int) -> str:
    """Cut in the middle, since task names often share their head and differ in their tail."""
    if len(text) <= limit:
        return text
    head = (limit - 1) * 2 // 3
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (limit - 1 - head) :]}"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def number(value: float) -> str:
    """A tick label: three significant digits, no trailing zeros."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def svg(width: float, height: float, title: str, parts: Sequence[Markup]) -> Markup:
    """The element; it shrinks with the page but never grows, so that text keeps its size."""
    head = Markup('<svg role="img" viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" height="{:.0f}">')
    label = Markup("<title>{}</title>").format(title)
    return (
        head.format(width, height, width, height)
        + label
        + Markup("").join(parts)
        + Markup("</svg>")
    )


def text(css: str, x: float, y: float, content: str, anchor: str = "start") -> Markup:
    """One line of text; `content` is escaped."""
    mark = '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
    return Markup(mark).format(css, x, y, anchor, content)


def rule(css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    """A straight line."""
    mark = '<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'
    return Markup(mark).format(css, x1, y1, x2, y2)


def box(css: str, x: float, y: float, width: float, height: float, hint: str = "") -> Markup:
    """A rectangle, with an optional hover text."""
    mark = '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>'
    inner = Markup("<title>{}</title>").format(hint) if hint else ""
    return Markup(mark).format(css, x, y, width, height, inner)


def y_axis(frame: Frame, ticks: Sequence[tuple[float, float]], percent: bool) -> Markup:
    """Grid lines with their values at the left; ticks are (pixel, value)."""
    parts = []
    for y, value in ticks:
        label = f"{100 * value:.3g} %" if percent else number(value)
        parts.append(rule("grid", frame.left, y, frame.width - frame.right, y))
        parts.append(text("tick", frame.left - 7, y + 3.5, label, "end"))
    return Markup("").join(parts)


def x_axis(
    frame: Frame, label: str, ticks: Sequence[tuple[float, str]], at_x: Callable[[float], float]
) -> Markup:
    """The base line, tick names and the axis label; ticks are (value, name)."""
    floor = frame.height - frame.bottom
    parts = [rule("base", frame.left, floor, frame.width - frame.right, floor)]
    for value, name in ticks:
        x, half = at_x(value), 3.2 * len(name)
        outside = x - half < 0
        parts.append(
            text("tick", 0 if outside else x, floor + 16, name, "start" if outside else "middle")
        )
    middle = frame.left + frame.plot_width / 2
    parts.append(text("axis", middle, frame.height - 5, label, "middle"))
    return Markup("").join(parts)


def series_class(colour: int) -> str:
    """The colour class; past the palette's end lines are dashed, so that line 11 is not line 1."""
    return f"s{colour % NUM_COLOURS}" + (" dashed" if colour >= NUM_COLOURS else "")


def polyline(
    label: str, colour: int, points: Sequence[tuple[float, float]], markers: bool
) -> Markup:
    """A line through pixel positions, with optional round markers and its name as hover text."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    css = series_class(colour)
    parts = [Markup('<polyline class="line {}" points="{}">').format(css, path)]
    parts.append(Markup("<title>{}</title></polyline>").format(label))
    if markers:
        dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>')
        parts += [dot.format(css, x, y) for x, y in points]
    return Markup("").join(parts)


def spread(positions: Sequence[float], pitch: float, low: float, high: float) -> list[float]:
    """Move positions apart to at least `pitch`, as little as possible, inside [low, high] where
    they fit.

    Positions that touch are merged into a block that is centred on its members' mean (the pool-
    adjacent- violators rule), so labels stay in the order of their lines.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    blocks: list[tuple[float, int]] = []
    for index in order:
        block = (positions[index], 1)
        while blocks and block[0] - blocks[-1][0] < pitch * (block[1] + blocks[-1][1]) / 2:
            centre, size = blocks.pop()
            total = size + block[1]
            block = ((centre * size + block[0] * block[1]) / total, total)
        blocks.append(block)
    flat = [c + pitch * (i - (size - 1) / 2) for c, size in blocks for i in range(size)]
    for i in range(len(flat)):
        flat[i] = max(flat[i], low if i == 0 else flat[i - 1] + pitch)
    ceiling = high
    for i in reversed(range(len(flat))):
        flat[i] = min(flat[i], ceiling)
        ceiling = flat[i] - pitch
    moved = [0.0] * len(positions)
    for place, index in enumerate(order):
        moved[index] = flat[place]
    return moved


def end_labels(frame: Frame, ends: Sequence[tuple[float, float, str, int]]) -> Markup:
    """Names at the right of the plot, joined to the last point; ends are (x, y, label, colour)."""
    edge = frame.width - frame.right
    places = spread([y for _, y, _, _ in ends], LABEL_PITCH, frame.top, frame.height - frame.bottom)
    limit = max(6, (frame.right - 20) // 7)
    parts = []
    for (x, y, label, colour), place in zip(ends, places, strict=True):
        parts.append(rule(f"leader {series_class(colour)}", x + 5, y, edge + 10, place))
        parts.append(
            text(f"ends {series_class(colour)}", edge + 14, place + 4, shorten(label, limit))
        )
    return Markup("").join(parts)
