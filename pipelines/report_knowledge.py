"""The report's sections on facts: what was learnt and forgotten per epoch, and what tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.figures import Series, line_chart
from pipelines.knowledge import ProbeCurve, knowledge_figures, probe_curves
from pipelines.readable import percent
from pipelines.results import EXAMPLES, StreamView
from pipelines.svg import Frame

FIGURES = {
    "top_accuracy": "Top Acc",
    "epoch": "Epoch",
    "nf_accuracy": "NF Acc",
    "total_knowledge": "Total",
    "final_accuracy": "Last epoch",
    "final_nf_accuracy": "NF, last",
    "constant_floor": "Constant answer",
}


def knowledge_section(view: StreamView) -> dict[str, Any] | None:
    """Return a stream's curves, and the figures where it has facts to learn and facts to keep."""
    curves = probe_curves(view)
    if not curves:
        return None
    series = [_series(curve.name, curve, colour) for colour, curve in enumerate(curves)]
    rows = [
        {
            "name": curve.name,
            "role": curve.role.replace("_", " "),
            "rows": f"{curve.rows:,}",
            "before": percent(curve.accuracy[0]),
            "after": percent(curve.accuracy[-1]),
            "nll": f"{curve.nll[0]:.2f} -> {curve.nll[-1]:.2f}",
            "floor": percent(curve.floor),
        }
        for curve in curves
    ]
    figures = knowledge_figures(view)
    return {
        "chart": _chart(series, f"Facts known by {view.name} after each epoch"),
        "rows": rows,
        "figures": None if figures is None else _cells(figures),
        "heads": list(FIGURES.values()),
    }


def knowledge_comparison(views: Sequence[StreamView]) -> dict[str, Any] | None:
    """Return figures and curves of several streams side by side; None if fewer than two have them."""
    found = [(view, figures) for view in views if (figures := knowledge_figures(view)) is not None]
    if len(found) < 2:
        return None
    charts = []
    for key, title in (("to_learn", "Facts to learn"), ("not_to_forget", "Facts not to forget")):
        series = [
            Series(label=view.name, xs=list(range(len(ys))), ys=ys, colour=colour)
            for colour, (view, figures) in enumerate(found)
            for ys in [figures[key]]
        ]
        charts.append({"title": title, "figure": _chart(series, f"{title}, per epoch")})
    rows = [
        {"name": view.name, "method": view.method, "cells": _cells(figures)}
        for view, figures in found
    ]
    return {"rows": rows, "heads": list(FIGURES.values()), "charts": charts}


def weighed_documents(view: StreamView) -> list[dict[str, Any]]:
    """Return documents as tokens with what each counts, from 0 to 1 of the document's largest."""
    documents: list[dict[str, Any]] = []
    for result in view.of("weights"):
        if result.record.payload["config"]["by"] == "reference":
            continue
        for example in result.read_json(EXAMPLES) or ():
            most = max(example["weights"], default=0.0) or 1.0
            tokens = [
                {"text": text, "share": round(weight / most, 3)}
                for text, weight in zip(example["tokens"], example["weights"], strict=True)
            ]
            documents.append({"task": result.task, "tokens": tokens})
    return documents


def figure_cell(name: str, value: float) -> str:
    """Return a figure as people read it: an epoch's number, a sum of shares, a percentage."""
    if name == "epoch":
        return str(value)
    return f"{value:.3f}" if name == "total_knowledge" else percent(value)


def _cells(figures: dict[str, Any]) -> list[str]:
    return [figure_cell(name, figures[name]) for name in FIGURES]


def _series(label: str, curve: ProbeCurve, colour: int) -> Series:
    return Series(
        label=label, xs=list(range(len(curve.accuracy))), ys=curve.accuracy, colour=colour
    )


def _chart(series: list[Series], title: str) -> Any:
    return line_chart(
        series,
        title=title,
        x_label="epochs",
        frame=Frame(width=1036, height=300, left=88, right=190),
        y_range=(0.0, 1.0),
        percent=True,
        end_labels=True,
        markers=True,
    )
