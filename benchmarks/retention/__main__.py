"""Run the retention benchmark: `python -m benchmarks.retention --out retention`."""

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
from benchmarks.retention import suite
from benchmarks.retention.show import figure, markdown, table
from pipelines.interrupts import Interrupts
from pipelines.stream import finished_view, run_streams, status_of
from pipelines.watching import Watcher
from seekr.errors import SeekrError

CONFIGURATIONS = Path(__file__).with_name("configurations.yaml")


def main() -> None:
    """Parse the command line, run what is missing, write its rows, table and picture."""
    groups: dict[str, Any] = yaml.safe_load(CONFIGURATIONS.read_text(encoding="utf-8"))
    known = {name: changes for group in groups.values() for name, changes in group.items()}
    parser = argparse.ArgumentParser(
        description="Compare methods on six tasks that overwrite one another."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("retention"), help="data, store and results"
    )
    parser.add_argument(
        "--configurations",
        nargs="+",
        choices=known,
        metavar="NAME",
        help=f"of {', '.join(known)}; default: the table",
    )
    parser.add_argument("--group", choices=groups, default="table", help="of configurations.yaml")
    parser.add_argument("--orders", nargs="+", choices=("1", "2"), default=["1", "2"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--show", action="store_true", help="only show what is finished")
    args = parser.parse_args()
    chosen = {name: known[name] for name in args.configurations or groups[args.group]}
    console, started = Console(), time.monotonic()
    runs = suite.write_streams(args.out, chosen, args.orders, args.seeds)
    if args.show:
        runs = [
            run for run in runs if all(s.state in ("ran", "reused") for s in status_of(run.stream))
        ]
        views = [finished_view(run.stream) for run in runs]
    else:
        distinct = {stage.fingerprint for run in runs for stage in run.stream.stages}
        with (
            Interrupts(tell=console.print) as interrupts,
            Watcher(console=console, num_stages=len(distinct)) as watcher,
        ):
            views = run_streams(
                [run.stream for run in runs], watcher, warn=console.print, interrupts=interrupts
            )
    rows = [suite.raw_row(run, view) for run, view in zip(runs, views, strict=True)]
    name = "chosen" if args.configurations else args.group
    files = [args.out / f"{name}.{kind}" for kind in ("jsonl", "md", "svg")]
    suite.write_rows(files[0], rows)
    (args.out / "machine.json").write_text(json.dumps(describe(), indent=1) + "\n")
    files[1].write_text(markdown(rows), encoding="utf-8")
    figure(rows, files[2])
    console.print(table(rows))
    written = ", ".join(str(file) for file in files)
    console.print(f"{written}  ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    try:
        main()
    except SeekrError as error:
        sys.exit(str(error))
