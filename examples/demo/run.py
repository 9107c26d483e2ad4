"""`make demo`: the same stream with three methods, and one table that shows what SEEKR buys.

    python -m examples.demo.run --out demo

writes the data, runs seqft, replay and seekr side by side (what they share is computed once), prints
the comparison and writes DIR/report.html. Run it again and every stage is reused.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console

from examples.demo import tasks
from pipelines.report import write_report
from pipelines.stream import open_stream, run_streams
from pipelines.tables import comparison_table, matrix_table
from pipelines.watching import Watcher

STREAM = Path(__file__).with_name("stream.yaml")
METHODS = {
    "seqft": "{name: seqft}",
    "replay": "{name: replay, replay_weight: 0.5}",
    "seekr": None,  # as the file has it
}
TRAIN_ROWS, TEST_ROWS = 1000, 100


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Run the demo.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of data and results")
    out: Path = parser.parse_args().out
    console, started = Console(), time.monotonic()
    if not (out / "data").exists():
        tasks.write(out / "data", train_rows=TRAIN_ROWS, test_rows=TEST_ROWS, seed=0)
    streams = []
    for name, method in METHODS.items():
        changes = [f"name=demo-{name}", f"data_root={out / 'data'}", f"storage={out / 'store'}"]
        if method is not None:
            changes.append(f"method={method}")
        streams.append(open_stream(STREAM, changes, writable=True))
    distinct = {stage.fingerprint for stream in streams for stage in stream.stages}
    with Watcher(console=console, num_stages=len(distinct)) as watcher:
        views = run_streams(streams, watcher, warn=console.print)
    for view in views:
        console.print(matrix_table(view))
    console.print(comparison_table(views))
    report = write_report(views, out / "report.html")
    console.print(f"report: {report}   ({time.monotonic() - started:.0f} s)", soft_wrap=True)


if __name__ == "__main__":
    main()
