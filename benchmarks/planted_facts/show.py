"""The planted-fact benchmark's table, its curves, and the weights over the tokens of documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

from benchmarks.planted_facts.suite import LEVELS
from seekr.statistics import mean_and_error

matplotlib.use("Agg")
from matplotlib import pyplot

Rows = Sequence[Mapping[str, Any]]
_HEADS = ("configuration", "seeds", "Top Acc", "epoch", "NF Acc", "last epoch", "NF, last")


def markdown(rows: Rows) -> str:
    """Return means and standard errors over seeds, per configuration."""
    heads = list(_HEADS)
    for level in LEVELS:
        heads += [f"steps to {level:.0%}", f"NF at {level:.0%}"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    lines += [f"| {' | '.join(line)} |" for line in _lines(rows)]
    return "\n".join(lines) + "\n"


def curves(rows: Rows, path: Path) -> None:
    """Draw accuracy on facts to learn and facts not to forget per epoch, and one against the other."""
    canvas, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.4))
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    for index, name in enumerate(names):
        own = [row for row in rows if row["configuration"] == name]
        learnt = [fmean(values) for values in zip(*(row["to_learn"] for row in own), strict=True)]
        kept = [
            fmean(values) for values in zip(*(row["not_to_forget"] for row in own), strict=True)
        ]
        colour = f"C{index}"
        left.plot(learnt, color=colour, label=name)
        middle.plot(kept, color=colour)
        right.plot(learnt, kept, color=colour, marker=".", markersize=4)
    left.set_title("facts to learn")
    middle.set_title("facts not to forget")
    right.set_title("one against the other, epoch by epoch")
    left.set_xlabel("epochs")
    middle.set_xlabel("epochs")
    right.set_xlabel("facts to learn")
    right.set_ylabel("facts not to forget")
    for axes in (left, middle, right):
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    left.legend(frameon=False)
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})
    pyplot.close(canvas)


def token_weights(examples: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw documents as bars, a token each, as high as it counts."""
    canvas, all_axes = pyplot.subplots(len(examples), 1, figsize=(13, 2.4 * len(examples)))
    for axes, example in zip(all_axes if len(examples) > 1 else [all_axes], examples, strict=True):
        tokens, weights = example["tokens"], example["weights"]
        axes.bar(range(len(tokens)), weights, color="C0")
        axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=8)
        axes.set_xlim(-0.6, len(tokens) - 0.4)
        axes.set_ylim(0, 1)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    canvas.supylabel("weight")
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})
    pyplot.close(canvas)


def _lines(rows: Rows) -> list[list[str]]:
    found: list[list[str]] = []
    for name in dict.fromkeys(row["configuration"] for row in rows):
        own = [row for row in rows if row["configuration"] == name]
        keys = ("top_accuracy", "epoch", "nf_accuracy", "final_accuracy", "final_nf_accuracy")
        scales = (100, 1, 100, 100, 100)
        cells = [_cell([row[k] for row in own], s) for k, s in zip(keys, scales, strict=True)]
        for level in LEVELS:
            for key, scale in (("steps", 1), ("not_to_forget", 100)):
                cells.append(_cell([row["reached"][str(level)][key] for row in own], scale))
        found.append([name, str(len(own)), *cells])
    return found


def _cell(values: Sequence[float | None], scale: float) -> str:
    """Return mean and standard error; how many seeds, where some never got there."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return "never"
    mean, error = mean_and_error(known)
    text = f"{mean:.1f}" if error is None else f"{mean:.1f} ± {error:.1f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"
