"""`seekr cluster`: a stream on Kubernetes, from the command line. Rendering needs no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.commands import register

out = Console()
app = typer.Typer(
    help="Run a stream on Kubernetes under KubeRay, or on a Ray cluster (--address).\n\n"
    "The stream's `cluster` section says on what; how many workers there are follows from the stream itself.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
StreamPath = Annotated[Path, typer.Argument(metavar="STREAM", help="The stream's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change a field of the stream. May be repeated."
    ),
]


@app.command()
def render(
    stream: StreamPath,
    to: Annotated[Path, typer.Option("--out", metavar="FOLDER")] = Path("manifests"),
    set_: Overrides = None,
) -> None:
    """Write all manifests of a stream: a kustomize base, and an overlay per way of running it.

    Files of an earlier rendering are replaced; what you put beside them stays.

    Example: seekr cluster render stream.yaml --out manifests
    """
    from cluster.needed import needed_secrets
    from cluster.render import read_stream
    from cluster.render import render as render_stream

    config, text = read_stream(stream, set_ or ())
    manifests = render_stream(config, text)
    files = manifests.write(to)
    _say(f"{len(files)} files in {to}")
    for name in manifests.overlays:
        # As the manager that `submit` and `schedule` are: they find their own fields, and no conflict.
        _say(f"  kubectl apply --server-side --field-manager=seekr -k {to}/overlays/{name}")
    for name, keys in needed_secrets(manifests.all).items():
        _say(f"Secret {name} must exist, with {', '.join(keys)}")


register(app)


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
