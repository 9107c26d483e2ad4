"""`seekr benchmark`: the command that writes the stream of a published benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def benchmark(
    name: Annotated[str, typer.Argument(help="trace, superni-seekr, superni-sapt, long-sequence.")],
    order: Annotated[str, typer.Option(help="Of the tasks, by its number in the papers.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Of the published files.")],
    model: Annotated[Path, typer.Option(metavar="DIR", help="The base model.")],
    method: Annotated[str, typer.Option(help="seekr, replay, seqft and others.")] = "seekr",
    variant: Annotated[str | None, typer.Option(help="TRACE: reasoning, 5000, 1000, 500.")] = None,
    first: Annotated[int | None, typer.Option(min=1, help="Only so many tasks.")] = None,
    without: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Leave out.")] = None,
    to: Annotated[Path, typer.Option("--out", metavar="FILE")] = Path("stream.yaml"),
) -> None:
    """Write the stream of a published benchmark: its tasks, order, epochs, metrics and prompts.

    Example: seekr benchmark trace --variant reasoning --order 1 --data TRACE --model llama --out s.yaml
    """
    from pipelines.benchmarks import benchmark_stream, stream_text
    from pipelines.export import check_target
    from pipelines.load import load_config

    found = benchmark_stream(
        name, order, data, model, method, variant=variant, first=first, without=without or ()
    )
    check_target(to, "--out")
    to.write_text(stream_text(name, found), encoding="utf-8")
    load_config(to)
    typer.echo(f"stream: {to}")
