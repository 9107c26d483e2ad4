"""From a search to its pictures: which trials each one shows, how strong they are drawn, and in what unit.

Every function returns the picture with what its caption needs, or why there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.figures import Segment, stacked_bars
from pipelines.readable import percent
from tune.charts import WIDTH, Mark, Spot, Tried, Way, by_task, history, levels, plane
from tune.coordinates import Thread, axis_of, goal_axis, parallel, place
from tune.goals import on_front
from tune.importance import FEWEST, importances, too_little
from tune.ledger import Entry
from tune.report_tables import View
from tune.words import Wanted, on_axis

_WAYS = {"max": ("up", "right"), "min": ("down", "left")}
_NONE_YET = "No value is known yet."
_NONE_FINISHED = "No trial has learnt all tasks yet."
Picture = dict[str, Any]


def history_picture(view: View) -> Picture:
    """Return every trial's newest value against its number."""
    one = view.wanted[0]
    factor, unit = _scale(view, one)
    tried: list[Tried] = []
    for entry in view.trials:
        value = None if entry.state == "refused" else view.first(entry)
        tried.append(
            Tried(
                number=entry.number,
                value=None if value is None else value.mean * factor,
                error=None if value is None or value.error is None else value.error * factor,
                mark=_mark(view, entry),
                hint=view.hint(entry),
            )
        )
    if all(trial.value is None for trial in tried):
        return {"why": _NONE_YET}
    chart = history(tried, one.better, f"{one.title} of each trial")
    return {
        "why": "",
        "chart": chart,
        "unit": f", in {unit}" if unit else "",
        "failed": any(t.mark == "none" for t in tried),
    }


def tasks_picture(view: View) -> Picture:
    """Return what each trial was worth after each task."""
    if view.plan.steps < 2:
        return {"why": "There is one step to learn, so there is nothing between the tasks to show."}
    one = view.wanted[0]
    factor, unit = _scale(view, one)
    css = _strength(view)

    def after(entry: Entry, tasks: int) -> float | None:
        result = entry.after(tasks)
        value = None if result is None else one.of(result.figures)
        return None if value is None else value.mean * factor

    members = {entry.number: entry for entry in view.trials}
    ways: list[Way] = []
    for entry in _weakest_first(view, view.trials):
        known = [(tasks, after(entry, tasks)) for tasks in range(1, view.plan.steps + 1)]
        jumps = [
            (c.tasks, after(members[c.source], c.tasks))
            for c in entry.copied
            if c.source in members
        ]
        ways.append(
            Way(
                values=[(tasks, value) for tasks, value in known if value is not None],
                jumps=[(tasks, value) for tasks, value in jumps if value is not None],
                css=css[entry.key],
                hint=view.hint(entry),
            )
        )
    if not any(way.values for way in ways):
        return {"why": _NONE_YET}
    names = [task.name for task in view.plan.courses.base.config.tasks]
    chart = by_task(ways, names, f"{one.title} of each trial after each task")
    copied = any(entry.copied for entry in view.trials)
    said = f", in {unit}" if unit else ""
    return {"why": "", "chart": chart, "unit": said, "copied": copied}


def parallel_picture(view: View) -> Picture:
    """Return every trial across all fields, to what it reached."""
    if not view.finished:
        return {"why": _NONE_FINISHED}
    space, css = view.search.space, _strength(view)
    axes = [axis_of(allowed, view.names[field]) for field, allowed in space.items()]
    reached: dict[str, list[float]] = {entry.key: [] for entry in view.finished}
    for i, one in enumerate(view.wanted):
        factor, unit = _scale(view, one)
        values = [(view.values(entry) or [])[i].mean * factor for entry in view.finished]
        axis, places = goal_axis(values, _title(one, unit))
        axes.append(axis)
        for entry, at in zip(view.finished, places, strict=True):
            reached[entry.key].append(at)
    shown = [entry for entry in view.trials if entry.state == "stopped"] + view.finished
    threads = [
        Thread(
            places=[
                *(
                    place(allowed, entry.settings[field]) if field in entry.settings else None
                    for field, allowed in space.items()
                ),
                *reached.get(entry.key, []),
            ],
            css=css[entry.key],
            hint=view.hint(entry),
        )
        for entry in _weakest_first(view, shown)
    ]
    return {
        "why": "",
        "chart": parallel(axes, threads, "Settings of each trial, and what it reached"),
        "stopped": len(shown) > len(view.finished),
        "conditions": any(axis.optional for axis in axes),
        "logarithmic": [
            view.names[field] for field, allowed in space.items() if allowed.logarithmic
        ],
    }


def importance_picture(view: View) -> Picture:
    """Return how much each field decides."""
    one = view.wanted[0]
    values = [value.mean * one.sign for e in view.finished if (value := view.first(e))]
    why = too_little(values)
    if why:
        return {"why": why}
    shares = importances(view.search.space, [e.settings for e in view.finished], values)
    if not shares:
        return {"why": "The best trials chose all fields as the others did, so none stands out."}
    rows = [
        (
            view.names[field],
            [Segment(label=f"{field}: {percent(share)} %", value=100 * share, colour=0)],
        )
        for field, share in shares.items()
    ]
    chart = stacked_bars(
        rows,
        title="Importance of each field",
        unit="per cent of all fields together",
        width=WIDTH,
        totals=[f"{percent(share)} %" for share in shares.values()],
    )
    copied = any(entry.copied for entry in view.finished)
    return {"why": "", "chart": chart, "trials": len(values), "few": len(values) < 3 * FEWEST,
            "copied": copied, "title": one.title}  # fmt: skip


def front_picture(view: View) -> Picture:
    """Return finished trials in the plane of the first two figures that are wanted, or of the goal and
    compute time."""
    if not view.finished:
        return {"why": _NONE_FINISHED}
    y, x = _pair(view)
    (up, y_unit), (along, x_unit) = _scale(view, y), _scale(view, x)
    css, spots = _strength(view), []
    for entry in _weakest_first(view, view.finished):
        down, right = y.of(entry.figures), x.of(entry.figures)
        if down is not None and right is not None:
            spots.append(
                Spot(
                    number=entry.number,
                    x=right.mean * along,
                    y=down.mean * up,
                    css=css[entry.key],
                    hint=f"trial {entry.number}: {y.title} {y.written(down)}, {x.title} {x.written(right)}",
                )
            )
    front = on_front([(spot.x, spot.y) for spot in spots], (x.better, y.better))
    on = sorted(spot.number for spot, good in zip(spots, front, strict=True) if good)
    title = f"{y.title} against {x.title}"
    chart = plane(
        spots,
        (x.better, y.better),
        x_label=_title(x, x_unit),
        y_label=_title(y, y_unit),
        title=title,
    )
    return {
        "why": "" if spots else f"{title}: not both are known of any trial.",
        "chart": chart,
        "title": title,
        "ways": f"Better is {_WAYS[y.better][0]} and to the {_WAYS[x.better][1]}",
        "front": ", ".join(map(str, on)),
        "pareto": view.search.goal.pareto is not None,
        "missed": len(view.best) < len(view.finished),
    }


def _pair(view: View) -> tuple[Wanted, Wanted]:
    """Return what lies upwards and what to the right."""
    one, *others = view.wanted
    if others:
        return one, others[0]
    cost = Wanted(measure="seconds", better="min")
    if one.measure == cost.measure and "op" in view.plan.measures:
        one = Wanted(measure="op", better="max")
    return one, cost


def _scale(view: View, one: Wanted) -> tuple[float, str]:
    """Return by what a figure is multiplied so that all trials fit an axis, and its unit there."""
    known = [one.of(result.figures) for entry in view.trials for result in entry.results]
    return on_axis(one.measure, [value.mean for value in known if value is not None])


def _title(one: Wanted, unit: str) -> str:
    return f"{one.title}, {unit}" if unit else one.title


def _mark(view: View, entry: Entry) -> Mark:
    if entry.state == "finished":
        return "good" if entry in view.best else "missed"
    if entry.state in ("failed", "refused"):
        return "none"
    return "stopped" if entry.state == "stopped" else "open"


def _strength(view: View) -> dict[str, str]:
    """Return how each trial is drawn: finished ones by value, others faint, those that are best apart."""
    one = view.wanted[0]
    means = [value.mean for entry in view.finished if (value := view.first(entry)) is not None]
    css = {entry.key: "stopped" for entry in view.trials}
    css |= {e.key: level for e, level in zip(view.finished, levels(means, one.better), strict=True)}
    points = [[value.mean for value in view.values(entry) or []] for entry in view.best]
    front = on_front(points, view.plan.directions)
    chosen = [entry.key for entry, on in zip(view.best, front, strict=True) if on]
    return css | dict.fromkeys(chosen if view.search.goal.pareto else chosen[:1], "chosen")


def _weakest_first(view: View, entries: Sequence[Entry]) -> list[Entry]:
    css = _strength(view)
    rank = {"stopped": -1, "chosen": 10} | {f"r{level}": level for level in range(10)}
    return sorted(entries, key=lambda entry: (rank[css[entry.key]], entry.number))
