"""What the commands have in common: their arguments, and how they speak."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

StreamPath = Annotated[Path, typer.Argument(metavar="STREAM", help="The stream's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field, such as train.epochs=2 or tasks.0.train_rows=100. Paths are relative "
        "to where you are. May be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
HeldBackOk = Annotated[
    bool,
    typer.Option(
        "--held-back-ok",
        help="End with 0, not 3, where the gate has held the newest model back, and say so in the last "
        "line: for schedulers that take every other code for a failure.",
    ),
]


def print_json(value: Any) -> None:
    """Print a value for a program to read; nothing else may go to stdout then."""
    print(json.dumps(value, indent=2, sort_keys=False))


def say(text: str, console: Console = out) -> None:
    """Print a sentence as it is, on one line however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print what does not stop the command."""
    err.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
