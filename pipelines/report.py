"""The report: one self-contained HTML file that says what a stream learnt, forgot, cost and came
from.

It is a pure function of the views: no clock, no network, no script, so the same records give the
same bytes. Figures are inline SVG and styles are inline CSS; a content policy in the page forbids
loading anything. All text goes through Jinja's autoescape, since task names, settings and paths are
written by users.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from pipelines.figures import MAX_POINTS
from pipelines.readable import breakable, config_yaml, duration, metric_name
from pipelines.report_accuracy import comparison, forgetting_curves, matrix_table, tiles
from pipelines.report_blocks import shared_attention
from pipelines.report_erasure import erased_rows
from pipelines.report_knowledge import (
    knowledge_comparison,
    knowledge_section,
    weighed_documents,
)
from pipelines.report_promotion import arrivals_section, promotion_section
from pipelines.report_stages import (
    head_maps,
    loss_charts,
    origin,
    replay_section,
    stage_rows,
    time_chart,
)
from pipelines.report_statistics import general_ability, measured_tasks
from pipelines.results import StreamView
from pipelines.svg import shorten
from seekr.metrics import AccuracyMatrix

TEMPLATES = Path(__file__).parent / "templates"


def render_report(views: StreamView | Sequence[StreamView]) -> str:
    """The report of one stream, or of several with a comparison on top.

    Args:
        views: at least one stream with at least one finished stage each.

    Returns:
        A complete HTML document.

    Raises:
        ValueError: no view was given.
    """
    streams = [views] if isinstance(views, StreamView) else list(views)
    if not streams:
        raise ValueError("a report needs at least one stream, got none")
    matrices = [view.matrix() for view in streams]
    several = len(streams) > 1
    return page_template(TEMPLATES / "report.html.j2").render(
        title=" / ".join(view.name for view in streams),
        comparison=comparison(streams, matrices) if several else None,
        knowledge=knowledge_comparison(streams),
        streams=[_sections(view, matrix) for view, matrix in zip(streams, matrices, strict=True)],
        max_points=MAX_POINTS,
        footer=_last_commit(streams),
    )


def write_report(views: StreamView | Sequence[StreamView], path: Path) -> Path:
    """Render and write; the file appears under its name only when it is whole.

    Args:
        views: see `render_report`.
        path: where to write; missing folders are made.

    Returns:
        `path`.
    """
    return write_page(render_report(views), path)


def page_template(path: Path) -> Template:
    """Open the template of a page; everything put in is escaped, and `css` is the reports' style."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shorten": shorten, "breakable": breakable}
    environment.globals["css"] = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(path.name)


def write_page(html: str, path: Path) -> Path:
    """Write a page that appears under its name only when it is whole; returns `path`, whose missing
    folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".tmp-{path.name}")
    unfinished.write_text(html, encoding="utf-8")
    unfinished.replace(path)
    return path


def _sections(view: StreamView, matrix: AccuracyMatrix) -> dict[str, Any]:
    losses, loss_legend = loss_charts(view)
    chart, time_legend = time_chart(view)
    return {
        "name": view.name,
        "method": view.method,
        "model": view.model,
        "tasks": view.tasks,
        "state": _state(view, matrix),
        "tiles": tiles(view, matrix),
        "metrics": ", ".join(dict.fromkeys(map(metric_name, view.metrics_of_tasks().values()))),
        "matrix": matrix_table(view, matrix),
        "curves": forgetting_curves(view, matrix),
        "no_curves": _no_curves(view),
        "heads": head_maps(view),
        "losses": losses,
        "loss_legend": loss_legend,
        "time_text": _time_text(view),
        "time_chart": chart,
        "time_legend": time_legend,
        "stages": stage_rows(view),
        "replay": replay_section(view),
        "measured": measured_tasks(view),
        "blocks": shared_attention(view),
        "knowledge": knowledge_section(view),
        "weighed": weighed_documents(view),
        "general": general_ability(view),
        "promotion": promotion_section(view),
        "arrivals": arrivals_section(view),
        "benchmark": view.config.get("benchmark"),
        "held_out": view.config.get("evaluate", {}).get("split") == "validation",
        "forgotten": erased_rows(view),
        "sources": view.sources(),
        "versions": view.versions(),
        "origin": origin(view),
        "config": config_yaml(view.config),
    }


def _state(view: StreamView, matrix: AccuracyMatrix) -> str:
    last = view.learnt(matrix)
    split = view.config.get("evaluate", {}).get("split")
    untested = all(task.get("test") is None for task in view.config.get("tasks", ()))
    if last is None and untested and split != "validation":
        return "No task has a test set: what is known of facts is below."
    if last is None:
        return "No task has been evaluated yet."
    if last + 1 < len(view.tasks):
        return f"So far {last + 1} of {len(view.tasks)} are learnt and evaluated."
    return "All of them are learnt and evaluated."


def _no_curves(view: StreamView) -> str:
    if len(view.tasks) == 1:
        return "With a single task there is nothing to forget yet."
    return "One model is measured so far, so there is no forgetting curve yet."


def _time_text(view: StreamView) -> str:
    ran = sum(result.state == "ran" for result in view.stages)
    words = (
        f"{duration(view.seconds())} of wall-clock time in {len(view.stages)} stages, summed up."
    )
    if ran == len(view.stages):
        return f"{words} All of them ran now."
    now = duration(view.seconds(ran_only=True))
    return f"{words} This run did {ran} of them in {now} and reused the rest."


def _last_commit(views: Sequence[StreamView]) -> str:
    times = [result.record.finished_at for view in views for result in view.stages]
    return f"Last stage committed {max(times)[:19].replace('T', ' ')} UTC." if times else ""
