"""What the pipeline costs on top of the work itself.

    python -m benchmarks.overhead --out benchmarks/results/overhead.json

The demo's SEEKR stream, through the whole pipeline on a warm Ray against `benchmarks.bare_loop`, which
makes the same forward and backward passes in one process with no Ray, no storage and no restart.
Both sides run in this one call, in turn, with one thread per model. Per kind of stage the table gives
seconds per stage, the part of it that is work (what the bare loop needs for the same), and the rest.

Prediction: workers and actors are fresh processes that import torch and transformers, 3-4 s of CPU each,
so a train stage (controller and worker) pays twice that and a scoring, teaching or evaluating stage once;
two stages at a time hide part of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import bare_loop
from examples.demo import tasks
from pipelines.session import ray_session
from pipelines.stream import open_stream, records_of, run_streams

STREAM = Path(__file__).parents[1] / "examples" / "demo" / "stream.yaml"
GOAL_RATIO, GOAL_SECONDS = 1.15, 3.0


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Measure the pipeline's overhead.")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seekr-overhead-") as folder:
        found = measure(Path(folder), args.rounds)
    print(json.dumps(found, indent=2))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Run both sides in turn; returns medians, ratios and the cost per kind of stage."""
    tasks.write(folder / "data", train_rows=1000, test_rows=100, seed=0)
    changes = [f"data_root={folder / 'data'}", "tracking.uri='off'"]
    first = open_stream(STREAM, [*changes, f"storage={folder / 'none'}"])
    settings = bare_loop.Settings(tasks_dir=folder / "data", threads=1)
    sides: dict[str, list[float]] = {"pipeline": [], "bare": []}
    kinds: dict[str, list[float]] = {}
    work: dict[str, float] = {}
    with ray_session([first.config]):
        _warm_up(folder)
        for index in range(rounds):
            stream = open_stream(
                STREAM, [*changes, f"storage={folder / str(index)}"], writable=True
            )
            started = time.monotonic()
            view = run_streams([stream], lambda *_: None, warn=print)[0]
            sides["pipeline"].append(time.monotonic() - started)
            for stage, record in records_of(stream).items():
                kinds.setdefault(stage.name, []).append(record.seconds)
            started = time.monotonic()
            result = bare_loop.run("seekr", settings)
            sides["bare"].append(time.monotonic() - started)
            work = result.seconds
    per_kind = {
        name: {
            "stages": len(seconds) // rounds,
            "seconds_per_stage": round(statistics.mean(seconds), 2),
            "work_per_stage": round(work.get(name, 0.0) * rounds / len(seconds), 2),
            "fixed_per_stage": round(
                statistics.mean(seconds) - work.get(name, 0.0) * rounds / len(seconds), 2
            ),
        }
        for name, seconds in kinds.items()
    }
    medians = {name: round(statistics.median(values), 1) for name, values in sides.items()}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} x {platform.machine()}, {platform.system()}",
        "seconds": medians,
        "ratio": round(medians["pipeline"] / medians["bare"], 2),
        "goal_ratio": GOAL_RATIO,
        "goal_seconds_per_stage": GOAL_SECONDS,
        "kinds": per_kind,
        "op": {"pipeline": view.matrix().op(), "bare": result.matrix.op()},
    }


def _warm_up(folder: Path) -> None:
    """Run two stages of a one-task stream, so that Ray's own actors and the file cache are there."""
    changes = [f"data_root={folder / 'data'}", f"storage={folder / 'warm'}", "tracking.uri='off'"]
    changes += ["data.train_rows=8", "data.test_rows=8", "method={name: seqft}", "train.epochs=1"]
    stream = open_stream(STREAM, changes, writable=True)
    short = stream.config.model_copy(update={"tasks": stream.config.tasks[:1]})
    stages = [stage for stage in stream.stages if stage.task == short.tasks[0].name]
    run_streams([_with(stream, short, stages)], lambda *_: None, warn=print)


def _with(stream: Any, config: Any, stages: list[Any]) -> Any:
    from dataclasses import replace

    return replace(stream, config=config, stages=tuple(stages))


if __name__ == "__main__":
    main()
