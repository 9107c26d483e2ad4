"""Plots as inline SVG text: line charts, head maps, stacked bars.

A report is one file that is read on a light screen, on a dark one and on paper, so its figures
carry no colour of their own: every mark names a CSS class (`s0`..`s9` for a series, `cell` for a
heat map) and the page's style sheet gives the colour for each theme. That is why these are SVG and
not raster images. Every function is pure and returns `Markup`; text that comes from a user is
escaped by `pipelines.svg`. Values that are not finite are left out of a figure, never drawn as
zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from pipelines import svg
from pipelines.svg import Frame, number

MAX_POINTS = 400
HEAT_LEVELS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart; `colour` indexes the palette."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of a stacked bar. `faded` marks work that this run reused instead of doing."""

    label: str
    value: float
    colour: int
    faded: bool = False


def thin(series: Series, limit: int = MAX_POINTS) -> Series:
    """Drop points that are not finite; average neighbours until at most `limit` are left."""
    points = [
        (float(x), float(y))
        for x, y in zip(series.xs, series.ys, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if len(points) > limit:
        size = math.ceil(len(points) / limit)
        groups = [points[i : i + size] for i in range(0, len(points), size)]
        points = [(_mean([x for x, _ in g]), _mean([y for _, y in g])) for g in groups]
    return replace(series, xs=[x for x, _ in points], ys=[y for _, y in points])


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    frame: Frame,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    x_names: Sequence[str] | None = None,
    end_labels: bool = False,
    markers: bool = False,
) -> Markup:
    """Lines over a common x axis.

    Args:
        series: lines; those without a finite point are left out.
        title: read out by a screen reader, not drawn.
        x_label: text under the axis.
        frame: size; with `end_labels` the right margin holds the labels.
        y_range: fixed limits, else from the data with some air.
        percent: y is a share, its ticks are shown as per cent.
        x_names: tick names for x = 1, 2, ... (numbers where they have no room), else round
            numbers.
        end_labels: write each label beside its line's last point, kept from overlapping.
        markers: draw the points; for short series.

    Returns:
        An `<svg>` element, or a note when there is nothing finite to draw.
    """
    lines = [line for line in (thin(s) for s in series) if line.xs]
    if not lines:
        return Markup('<p class="note">Nothing to draw: no finite value was recorded.</p>')
    xs = [x for line in lines for x in line.xs]
    left, right = (1.0, float(len(x_names))) if x_names else (min(xs), max(xs))
    low, high = y_range or _padded([y for line in lines for y in line.ys])

    def at_x(x: float) -> float:
        share = (x - left) / (right - left) if right > left else 0.5
        return frame.left + share * frame.plot_width

    def at_y(y: float) -> float:
        return frame.top + (high - y) / (high - low) * frame.plot_height

    ticks = _name_ticks(x_names, frame) if x_names else _number_ticks(left, right, frame)
    parts = [
        svg.y_axis(frame, [(at_y(t), t) for t in svg.nice_ticks(low, high, 4)], percent),
        svg.x_axis(frame, x_label, ticks, at_x),
    ]
    ends: list[tuple[float, float, str, int]] = []
    for line in lines:
        points = [(at_x(x), at_y(y)) for x, y in zip(line.xs, line.ys, strict=True)]
        show = markers or len(points) == 1
        parts.append(svg.polyline(line.label, line.colour, points, show))
        ends.append((*points[-1], line.label, line.colour))
    if end_labels:
        parts.append(svg.end_labels(frame, ends))
    return svg.svg(frame.width, frame.height, title, parts)


def head_map(
    importance: Sequence[Sequence[float]],
    selected: Collection[tuple[int, int]],
    *,
    title: str,
    width: int,
) -> Markup:
    """Layers downwards, heads to the right; stronger colour is more important, outlined is
    selected.

    Colour follows the square root of importance over the map's maximum: importance is heavy-tailed,
    and a linear scale would show one cell. Cells of one shade share a path, so that a 40 x 40 map
    stays small.

    Args:
        importance: [L][H], non-negative.
        selected: (layer, head) pairs to outline.
        title: accessible name.
        width: the most it may take, in CSS pixels.
    """
    num_layers, num_heads = len(importance), max((len(row) for row in importance), default=0)
    if not num_heads:
        return Markup('<p class="note">No head was scored.</p>')
    left, top = 24.0, 2.0
    cell = min((width - left - 2) / num_heads, 24.0)
    parts: list[Markup] = [svg.box("mapbox", left, top, cell * num_heads, cell * num_layers)]
    parts += _shades(importance, cell, left, top)
    stroke = min(2.0, cell / 6)
    parts.append(Markup('<g stroke-width="{:.1f}">').format(stroke))
    for layer, head in sorted(selected):
        x, y = left + head * cell + stroke / 2, top + layer * cell + stroke / 2
        hint = f"layer {layer}, head {head}: importance {number(importance[layer][head])}"
        parts.append(svg.box("chosen", x, y, cell - stroke, cell - stroke, hint))
    parts.append(Markup("</g>"))
    parts += _map_axes(num_layers, num_heads, cell, left, top)
    return svg.svg(left + cell * num_heads + 2, top + cell * num_layers + 30, title, parts)


def stacked_bars(
    rows: Sequence[tuple[str, Sequence[Segment]]],
    *,
    title: str,
    unit: str,
    width: int,
    totals: Sequence[str],
) -> Markup:
    """One horizontal bar a row, all from zero on one scale, with its written total at the end.

    Args:
        rows: (row name, segments from left to right).
        title: accessible name.
        unit: text under the axis.
        width: outer width in CSS pixels.
        totals: what stands at the end of each bar.
    """
    peak = max((sum(s.value for s in segments) for _, segments in rows), default=0.0)
    if peak <= 0:
        return Markup('<p class="note">Nothing to draw: every value is zero.</p>')
    pitch, bar = 27, 17
    widest = max(len(svg.shorten(name, 28)) for name, _ in rows)
    frame = Frame(
        width=width, height=pitch * len(rows) + 50, left=20 + 7 * widest, right=92, bottom=42
    )
    scale = frame.plot_width / peak
    floor = frame.height - frame.bottom
    parts: list[Markup] = []
    for tick in svg.nice_ticks(0, peak, 6):
        x = frame.left + tick * scale
        parts.append(svg.rule("grid", x, frame.top - 4, x, floor))
        parts.append(svg.text("tick", x, floor + 15, number(tick), "middle"))
    middle = frame.left + frame.plot_width / 2
    parts.append(svg.text("axis", middle, frame.height - 6, unit, "middle"))
    for index, (name, segments) in enumerate(rows):
        x, y = float(frame.left), frame.top + index * pitch
        parts.append(svg.text("name", frame.left - 10, y + 13, svg.shorten(name, 28), "end"))
        for segment in segments:
            css = f"bar s{segment.colour % svg.NUM_COLOURS}" + (" faded" if segment.faded else "")
            parts.append(svg.box(css, x, y, segment.value * scale, bar, segment.label))
            x += segment.value * scale
        parts.append(svg.text("value", x + 8, y + 13, totals[index]))
    return svg.svg(width, frame.height, title, parts)


def _shades(
    importance: Sequence[Sequence[float]], cell: float, left: float, top: float
) -> list[Markup]:
    finite = [v for row in importance for v in row if math.isfinite(v)]
    peak = max(finite, default=0.0)
    shades: dict[int, list[str]] = {}
    for layer, row in enumerate(importance):
        for head, value in enumerate(row):
            if not math.isfinite(value):
                continue
            share = math.sqrt(max(value, 0.0) / peak) if peak > 0 else 0.0
            corner = f"M{left + head * cell:.1f} {top + layer * cell:.1f}"
            square = f"{corner}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z"
            shades.setdefault(round(share * HEAT_LEVELS), []).append(square)
    mark = Markup('<path class="cell" fill-opacity="{:.2f}" d="{}"/>')
    return [
        mark.format(0.02 + 0.98 * level / HEAT_LEVELS, "".join(squares))
        for level, squares in sorted(shades.items())
    ]


def _map_axes(
    num_layers: int, num_heads: int, cell: float, left: float, top: float
) -> list[Markup]:
    floor = top + cell * num_layers
    parts = []
    for layer in range(0, num_layers, _stride(num_layers, cell, 14)):
        y = top + (layer + 0.5) * cell + 3.5
        parts.append(svg.text("tick", left - 5, y, str(layer), "end"))
    for head in range(0, num_heads, _stride(num_heads, cell, 22)):
        x = left + (head + 0.5) * cell
        parts.append(svg.text("tick", x, floor + 13, str(head), "middle"))
    parts.append(svg.text("axis", left + num_heads * cell / 2, floor + 26, "head", "middle"))
    return parts


def _stride(count: int, cell: float, room: float) -> int:
    fit = next((s for s in (1, 2, 4, 5, 8, 10, 16) if s * cell >= room), 32)
    return min(fit, max(count - 1, 1))


def _name_ticks(names: Sequence[str], frame: Frame) -> list[tuple[float, str]]:
    room = frame.plot_width / max(len(names) - 1, 1)
    if room < 22:
        every = math.ceil(22 / room)
        return [(float(i), str(i)) for i in range(1, len(names) + 1, every)]
    limit = min(24, int(room // 7))
    if limit < 12:
        return [(float(i), str(i)) for i in range(1, len(names) + 1)]
    return [(float(i), svg.shorten(name, limit)) for i, name in enumerate(names, start=1)]


def _number_ticks(left: float, right: float, frame: Frame) -> list[tuple[float, str]]:
    ticks = svg.nice_ticks(left, right, max(2, frame.plot_width // 70))
    return [(tick, number(tick)) for tick in ticks]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    floor = 0.0 if 0 <= low < 0.4 * high else low - air
    return floor, high + air


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
