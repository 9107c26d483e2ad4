"""Draws docs/attention.svg (`python docs/draw_attention.py`): what docs/attention.md explains.

Left, an invented map of one head with the rows and tiles that distillation visits and the entries that a
teacher keeps. Middle and right, measured: read from benchmarks/results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
INK, MUTED, LINE = "#1f2933", "#66727f", "#d5dbe1"
BLUE, ORANGE, GREEN, RED = "#2a6fb0", "#d9822b", "#3d9970", "#b5394c"
TOKENS, ROWS, TILES = 32, (3, 6, 9, 11, 14, 17, 20, 23, 25, 27, 30), ((0, 4), (4, 8), (8, 11))


def main() -> None:
    matplotlib.rcParams |= {
        "svg.hashsalt": "seekr",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.edgecolor": LINE,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.1), layout="constrained")
    draw_map(left)
    draw_store(middle, json.loads((RESULTS / "teacher_store.json").read_text()))
    draw_cost(right, json.loads((RESULTS / "step_cost.json").read_text()))
    figure.savefig(HERE / "attention.svg", metadata={"Date": None})


def draw_map(axes: Axes) -> None:
    """A causal map: chosen query rows, the tiles that hold them, the largest entries."""
    generator = np.random.default_rng(3)
    axes.add_patch(Polygon([(0, 0), (0, TOKENS), (TOKENS, TOKENS)], color="#f2f4f6", lw=0))
    for start, stop in TILES:
        rows = ROWS[start:stop]
        axes.add_patch(
            Rectangle(
                (0, rows[0]), rows[-1] + 1, rows[-1] - rows[0] + 1, fc="#e3eef8", ec=BLUE, lw=1.2
            )
        )
    for row in ROWS:
        axes.add_patch(Rectangle((0, row), row + 1, 1, color="#9cc2e6", lw=0))
        weights = generator.gamma(0.25, size=row + 1) + 3.0 * (np.arange(row + 1) == 0)
        weights /= weights.sum()
        kept = np.flatnonzero(weights > 0.06)
        axes.scatter(
            kept + 0.5, np.full(len(kept), row + 0.5), s=90 * weights[kept] + 6, color=ORANGE
        )
    axes.set(xlim=(-0.5, TOKENS + 0.5), ylim=(TOKENS + 0.5, -0.5), aspect="equal")
    axes.set(xlabel="key", ylabel="query", xticks=[], yticks=[])
    axes.set_title("What is visited of a head's map")
    notes = [(BLUE, "tiles, formed and forgotten"), ("#6fa5d6", "chosen query rows")]
    notes += [(ORANGE, "entries the teacher keeps"), (MUTED, "never computed: all else")]
    for index, (color, text) in enumerate(notes):
        axes.text(TOKENS, 1.5 + 2.3 * index, text, color=color, ha="right", va="center")
    for side in axes.spines.values():
        side.set_visible(False)


def draw_store(axes: Axes, result: dict[str, Any]) -> None:
    """Bytes per replay row against what is lost of the gradient's direction."""
    names = result["cells"][0]["cosine"]
    name = next(text for text in names if text.startswith("whole: SEEKR"))
    kinds = {"attention_kept": (BLUE, "o-", "largest of all rows"),
             "same number in every row": (RED, "s--", "as many in each row")}  # fmt: skip
    for kind, (color, style, label) in kinds.items():
        cells = [
            cell for cell in result["cells"] if cell["kind"] == kind and cell["attention_kept"]
        ]
        sizes = [cell["bytes"] / 1e6 for cell in cells]
        lost = [max(1.0 - cell["cosine"][name], 1e-9) for cell in cells]
        axes.plot(sizes, lost, style, color=color, label=label, ms=4, lw=1.4)
        for cell, x, y in zip(cells, sizes, lost, strict=True):
            if kind == "attention_kept" and cell["attention_kept"] in (8, 24, 64):
                axes.annotate(f"{cell['attention_kept']} a row", (x, y), (5, 4), color=color,
                              textcoords="offset points")  # fmt: skip
    axes.axhline(1e-3, color=MUTED, lw=0.8, ls=":")
    axes.axvline(1.0, color=MUTED, lw=0.8, ls=":")
    axes.set(xlabel="MB per replay row", ylabel="1 - cosine to the exact gradient", yscale="log")
    axes.set_title("What a small store loses")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw_cost(axes: Axes, result: dict[str, Any]) -> None:
    """Time of a replay step over plain replay."""
    kinds = {
        "rows_100": (GREEN, "100 query rows"),
        "rows_all": (BLUE, "all query rows"),
        "materialised": (RED, "with maps, as usual"),
    }
    for variant, (color, label) in kinds.items():
        cells = [cell for cell in result["cells"] if cell["variant"] == variant and "ratio" in cell]
        tokens = [cell["tokens"] for cell in cells]
        ratios = [cell["ratio"] for cell in cells]
        axes.plot(tokens, ratios, "o-", color=color, label=label, ms=4, lw=1.4)
        axes.annotate(f"{ratios[-1]:.2f}", (tokens[-1], ratios[-1]), (4, 4), color=color,
                      textcoords="offset points")  # fmt: skip
    ticks = sorted({cell["tokens"] for cell in result["cells"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="tokens of the row", ylabel="time over plain replay", ylim=(0.9, None))
    axes.axhline(1.0, color=MUTED, lw=0.8, ls=":")
    axes.set_title("What distillation adds to a step")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
