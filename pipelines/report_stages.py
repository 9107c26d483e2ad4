"""The report's sections on what each stage did: heads, losses, time and memory, replay store,
origin.

Each is a function from a `StreamView` to plain values and figures; the template lays out and
escapes. A section that the stream has nothing for is None or empty, and the template says so
instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from pipelines.figures import Segment, Series, head_map, line_chart, stacked_bars
from pipelines.readable import duration, size
from pipelines.results import History, StreamView
from pipelines.svg import NUM_COLOURS, Frame

STAGE_COLOURS = {
    "ingest": 9, "sample": 6, "generate": 6, "rollout": 5, "train": 0, "fisher": 3, "score": 4, "select": 8,
    "teach": 2, "evaluate": 1,
}  # fmt: skip
PART_COLOURS = {
    "loss": 0,
    "task": 1,
    "replay": 2,
    "logits": 3,
    "attention": 4,
    "penalty": 5,
    "reflection": 2,
    "selection": 3,
}
# What a step's entry holds beside its losses; the second line is `meter`'s.
NOT_PARTS = frozenset(
    {"step", "epoch", "learning_rate", "grad_norm", "tokens", "seconds"}
    | {"tokens_per_second", "memory_bytes", "at", "mfu"}
)
DASH = "\N{EN DASH}"


def head_maps(view: StreamView) -> list[dict[str, Any]]:
    """One map a task, with how much of the selection is new."""
    maps, before = [], None
    for selection in view.selections():
        chosen, depth = selection.heads, len(selection.importance)
        total = sum(len(row) for row in selection.importance)
        layers = len({layer for layer, _ in chosen})
        caption = f"{len(chosen)} of {total} heads in {layers} of {depth} layers"
        if before:
            caption += f", {len(before & chosen)} as before"
        figure = head_map(
            selection.importance,
            chosen,
            title=f"Head importance after {selection.task}",
            width=292,
        )
        maps.append({"task": selection.task, "caption": caption, "figure": figure})
        before = chosen
    return maps


def loss_parts(histories: Sequence[History]) -> list[str]:
    """The loss parts that were logged: the known ones in order, then the method's own."""
    logged = {key for history in histories for step in history.steps for key in step}
    found = {key for key in logged - NOT_PARTS if not key.startswith("probes")}
    return [p for p in PART_COLOURS if p in found] + sorted(found - set(PART_COLOURS))


def loss_charts(view: StreamView) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """A small chart per train stage and the legend they share."""
    histories = view.histories()
    parts = loss_parts(histories)
    fresh = len(PART_COLOURS)
    colours = {part: PART_COLOURS.get(part, fresh + n) for n, part in enumerate(parts)}
    charts = []
    for history in histories:
        series = [_part(history, part, colours[part]) for part in parts]
        figure = line_chart(
            [s for s in series if s.xs],
            title=f"Loss while learning {history.task}",
            x_label="step",
            frame=Frame(width=312, height=214, left=40, right=8),
        )
        charts.append({"task": history.task, "caption": _loss_caption(history), "figure": figure})
    return charts, [{"css": f"s{colours[p] % NUM_COLOURS}", "label": p} for p in parts]


def time_chart(view: StreamView) -> tuple[Markup, list[dict[str, str]]]:
    """Seconds per task, stacked by stage; re-teaching counts for the task that caused it."""
    kinds = list(dict.fromkeys(result.stage for result in view.stages))
    colours = _stage_colours(kinds)
    tasks = _task_rows(view)
    own = {t: [r for r in view.stages if r.learnt == t] for t in tasks}
    seconds = {task: sum(result.record.seconds for result in own[task]) for task in tasks}
    unit, scale = _time_unit(max(seconds.values(), default=0.0))
    rows = []
    for task in tasks:
        segments = [
            Segment(
                label=f"{r.stage} {r.task}: {duration(r.record.seconds)} ({r.state})",
                value=r.record.seconds / scale,
                colour=colours[r.stage],
                faded=r.state == "reused",
            )
            for r in sorted(own[task], key=lambda r: kinds.index(r.stage))
        ]
        rows.append((task, segments))
    totals = [duration(seconds[task]) for task in tasks]
    legend = [{"css": f"s{colours[kind]}", "label": kind} for kind in kinds]
    if any(r.state == "reused" for r in view.stages):
        legend.append({"css": "s9 faded", "label": "pale: reused, not run again"})
    title = f"Time per task of {view.name}"
    chart = stacked_bars(rows, title=title, unit=unit, width=1036, totals=totals)
    return chart, legend


def stage_rows(view: StreamView) -> list[dict[str, Any]]:
    """The table of stages; the two shares are bar lengths in per cent of the largest."""
    slowest = max((r.record.seconds for r in view.stages), default=0.0)
    largest = max((r.record.peak_memory_bytes or 0 for r in view.stages), default=0)
    return [
        {
            "task": r.task,
            "stage": r.stage,
            "state": r.state,
            "fingerprint": r.fingerprint,
            "seconds": duration(r.record.seconds),
            "seconds_share": _share(r.record.seconds, slowest),
            "memory": size(r.record.peak_memory_bytes) if r.record.peak_memory_bytes else DASH,
            "memory_share": _share(r.record.peak_memory_bytes or 0, largest),
            "size": size(r.num_bytes),
            "rows": f"{r.record.rows:,}" if r.record.rows is not None else DASH,
            "attempts": r.record.attempts,
        }
        for r in view.stages
    ]


def replay_section(view: StreamView) -> dict[str, Any] | None:
    """The replay store by task; None for a method that keeps nothing."""
    sizes = view.replay()
    if not sizes:
        return None
    rows = []
    for s in sizes:
        row_words, target_words = size(s.row_bytes), size(s.target_bytes)
        parts = (("rows", row_words, s.row_bytes, 6), ("targets", target_words, s.target_bytes, 2))
        rows.append(
            (
                s.task,
                [
                    Segment(label=f"{kind} of {s.task}: {words}", value=value / 1024, colour=colour)
                    for kind, words, value, colour in parts
                ],
            )
        )
    count = sum(s.rows or 0 for s in sizes)
    stale = sum(s.stale_bytes for s in sizes)
    words = (
        f"{count:,} rows, {size(view.replay_bytes())} in all: what the next training reads again."
    )
    if stale:
        words += f" Another {size(stale)} are targets that a later selection replaced."
    legend = [
        {"css": "s6", "label": "rows"},
        {"css": "s2", "label": "targets (logits, attention rows)"},
    ]
    totals = [size(s.row_bytes + s.target_bytes) for s in sizes]
    title = f"Replay store of {view.name} by task"
    chart = stacked_bars(rows, title=title, unit="KiB", width=1036, totals=totals)
    return {"text": words, "chart": chart, "legend": legend}


def origin(view: StreamView) -> dict[str, list[str]]:
    """Who ran the stages, on which machines, from which commits."""
    found = {
        "git commit": _distinct(r.record.git_commit for r in view.stages),
        "host": _distinct(r.record.host for r in view.stages),
        "user": _distinct(r.record.user for r in view.stages),
    }
    return {name: values for name, values in found.items() if values}


def _part(history: History, part: str, colour: int) -> Series:
    known = [
        (n, step) for n, step in enumerate(history.steps, start=1) if step.get(part) is not None
    ]
    xs = [float(step.get("step", n)) for n, step in known]
    return Series(label=part, xs=xs, ys=[float(step[part]) for _, step in known], colour=colour)


def _loss_caption(history: History) -> str:
    steps = history.steps
    last = steps[-1].get("loss")
    words = [f"{len(steps):,} steps"]
    if last is not None:
        words.append(f"last loss {float(last):.3g}")
    tokens = sum(float(step.get("tokens") or 0) for step in steps)
    seconds = sum(float(step.get("seconds") or 0) for step in steps)
    if tokens and seconds:
        words.append(f"{tokens / seconds:,.0f} tokens/s")
    return ", ".join(words)


def _task_rows(view: StreamView) -> list[str]:
    """Rows of the time chart: the stream's order, then what only stages name (mtl's "all")."""
    found = dict.fromkeys(result.learnt for result in view.stages)
    known = [task for task in view.tasks if task in found]
    return known + [task for task in found if task not in known]


def _time_unit(longest: float) -> tuple[str, float]:
    if longest > 7200:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def _stage_colours(kinds: Sequence[str]) -> dict[str, int]:
    spare = [colour for colour in range(NUM_COLOURS) if colour not in STAGE_COLOURS.values()]
    new = [kind for kind in kinds if kind not in STAGE_COLOURS]
    return STAGE_COLOURS | {kind: spare[n % len(spare)] for n, kind in enumerate(new)}


def _share(value: float, largest: float) -> str:
    return f"{100 * value / largest:.0f}" if largest else "0"


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))
