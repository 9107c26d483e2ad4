"""Run the planted-fact benchmark: `python -m benchmarks.planted_facts --out planted-facts`.

Claim: weights that Train-Attention gives find the tokens that matter, so facts are learnt in fewer steps
than by plain training and RHO-1, and less of what was known is lost by then; weights on the facts' own
tokens (oracle) bound what weights can do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.planted_facts import show, suite
from pipelines.interrupts import Interrupts
from pipelines.knowledge import knowledge_figures
from pipelines.results import StreamView
from pipelines.stream import Stream, run_streams
from pipelines.tables import knowledge_table
from pipelines.watching import Watcher
from pipelines.weights import EXAMPLES
from seekr.errors import SeekrError


def main() -> None:
    """Parse the command line, run what is missing, write rows, table and pictures."""
    known: dict[str, Any] = yaml.safe_load((suite.HERE / "configurations.yaml").read_text())
    parser = argparse.ArgumentParser(description="Compare what methods learn and forget of facts.")
    parser.add_argument("--out", type=Path, default=Path("planted-facts"))
    parser.add_argument("--configurations", nargs="+", choices=known, default=list(known))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    console, started = Console(), time.monotonic()
    lessons = suite.write_lessons(args.out, args.seeds)
    _run(lessons, console)
    taught = {s: suite.taught_model(stream) for s, stream in zip(args.seeds, lessons, strict=True)}
    runs = suite.write_streams(args.out, {n: known[n] for n in args.configurations}, taught)
    views = _run([run.stream for run in runs], console)
    rows = [_row(run, view) for run, view in zip(runs, views, strict=True)]
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    (args.out / "rows.jsonl").write_text(text)
    (args.out / "machine.json").write_text(json.dumps(describe(), indent=1) + "\n")
    (args.out / "table.md").write_text(show.markdown(rows), encoding="utf-8")
    show.curves(rows, args.out / "curves.svg")
    if examples := _examples(views):
        show.token_weights(examples, args.out / "weights.svg")
    console.print(knowledge_table(views))
    console.print(
        f"{args.out}/table.md, curves.svg, weights.svg  ({time.monotonic() - started:.0f} s)"
    )


def _run(streams: list[Stream], console: Console) -> list[StreamView]:
    distinct = {stage.fingerprint for stream in streams for stage in stream.stages}
    with (
        Interrupts(tell=console.print) as interrupts,
        Watcher(console=console, num_stages=len(distinct)) as watcher,
    ):
        return run_streams(streams, watcher, warn=console.print, interrupts=interrupts)


def _row(run: suite.Run, view: StreamView) -> dict[str, Any]:
    figures = knowledge_figures(view)
    assert figures is not None
    steps = sum(len(history.steps) for history in view.histories())
    epochs = len(figures["to_learn"]) - 1
    return suite.row_of(run, figures, steps // epochs, view.seconds())


def _examples(views: list[StreamView]) -> list[dict[str, Any]]:
    """Return documents with the weights that Train-Attention gave them, those of the first seed."""
    for view in views:
        for result in view.of("weights"):
            if result.record.payload["config"]["by"] == "train_attention":
                return result.read_json(EXAMPLES)
    return []


if __name__ == "__main__":
    try:
        main()
    except SeekrError as error:
        sys.exit(str(error))
