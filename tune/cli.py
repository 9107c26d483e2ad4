"""`seekr tune`: searches on the command line. `seekr tune search.yaml` runs one; the rest looks at one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from typer.core import TyperGroup

from seekr.errors import ConfigError

out = Console()
err = Console(stderr=True)


class _RunsByDefault(TyperGroup):
    """`seekr tune search.yaml` means `seekr tune run search.yaml`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put `run` before a first word that is no command."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_RunsByDefault,
    help="Search settings of a stream: `seekr tune search.yaml`.\n\n"
    "A search is a YAML file: a stream, what may be chosen in it, and what is wanted. Trials are streams, "
    "so what they have in common is computed once. A search that was killed goes on where it was.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
SearchPath = Annotated[Path, typer.Argument(metavar="SEARCH", help="The search's YAML file.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change a field of the search. May be repeated."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@app.command()
def run(search: SearchPath, set_: Changes = None, as_json: AsJson = False) -> None:
    """Run what is missing of a search, and show what came out. Safe to repeat.

    Example: seekr tune search.yaml --set concurrent=4
    """
    _run(search, set_, begin=True, as_json=as_json)


@app.command()
def resume(search: SearchPath, set_: Changes = None, as_json: AsJson = False) -> None:
    """Go on with a search that was stopped or killed; trials that failed are tried again.

    Example: seekr tune resume search.yaml
    """
    _run(search, set_, begin=False, as_json=as_json)


@app.command()
def status(search: SearchPath, set_: Changes = None, as_json: AsJson = False) -> None:
    """Show every trial: what it tries, how far it is and what it has reached.

    Example: seekr tune status search.yaml
    """
    from tune.search import open_search

    _show(open_search(search, set_ or ()).plan(), as_json=as_json)


@app.command()
def report(
    search: SearchPath,
    to: Annotated[Path, typer.Option("--out", metavar="FILE")] = Path("search.html"),
    set_: Changes = None,
) -> None:
    """Write one self-contained HTML file about a search.

    Example: seekr tune report search.yaml --out search.html
    """
    from pipelines.export import check_target
    from tune.report import write_search_report
    from tune.search import open_search

    opened = open_search(search, set_ or ())
    check_target(to, "--out")
    _say(f"report: {write_search_report(opened.plan(), to)}")


@app.command()
def best(
    search: SearchPath,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the stream with them, ready to run.")
    ] = None,
    set_: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Show the settings of the best trial that has learnt all tasks and meets the constraints.

    Example: seekr tune best search.yaml --write stream.yaml
    """
    from pipelines.export import check_target
    from tune.search import open_search
    from tune.write import best_stream

    plan = open_search(search, set_ or ()).plan()
    found = plan.best()
    if not found:
        raise ConfigError(
            f"search {plan.search.name}: no trial has learnt all tasks and met the constraints; see "
            f"seekr tune status {search}"
        )
    entry = found[0]
    if write is not None:
        check_target(write, "--write")
        write.write_text(best_stream(plan, entry, write), encoding="utf-8")
    if as_json:
        print(json.dumps({"key": entry.key, "settings": entry.settings}, indent=2))
        return
    _say(f"trial {entry.number} of search {plan.search.name}:")
    _say(yaml.safe_dump(entry.settings, sort_keys=False).rstrip())
    if write is not None:
        _say(f"stream: {write}; run it: seekr run {write}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a search's YAML, for editors and for reading.

    Example: seekr tune schema > search.schema.json
    """
    from tune.search_config import SearchConfig

    print(json.dumps(SearchConfig.model_json_schema(), indent=2))


def _run(path: Path, changes: list[str] | None, *, begin: bool, as_json: bool) -> None:
    from pipelines.tracking import tracking_uri
    from tune.ledger import REPORT
    from tune.report import render_search
    from tune.running import run_search
    from tune.search import open_search
    from tune.tracking import SearchTracker

    search = open_search(path, changes or (), begin=begin, writable=True)
    console = err if as_json else out
    store, base = search.ledger.store, search.courses.base
    uri = tracking_uri(base.config.tracking.uri, store)
    tracker = SearchTracker(uri, search=search.config.name, store=store, warn=_warn)
    for text in base.facts.warnings:
        _warn(text)

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        run_search(
            search,
            tell=tell,
            note=lambda: tracker.note(search.ledger.entries),
            running=lambda text: console.print(
                text, style="dim", markup=False, highlight=False, soft_wrap=True
            ),
        )
    finally:
        tracker.note(search.ledger.entries)
        tracker.close()
    plan = search.plan()
    where = f"{search.ledger.folder}/{REPORT}"
    store.write_bytes(where, render_search(plan).encode())
    _show(plan, as_json=as_json)
    if not as_json:
        _say(f"report: {store.uri_for(where)}")


def _show(plan: Any, *, as_json: bool) -> None:
    from tune.sharing import Sharing
    from tune.tables import confirmation_table, sharing_line, summary, trials_table

    if as_json:
        print(json.dumps(summary(plan), indent=2))
        return
    out.print(trials_table(plan))
    if (confirmed := confirmation_table(plan)) is not None:
        out.print(confirmed)
    if plan.ledger.entries:
        _say(sharing_line(Sharing.of_ledger(plan.ledger)))


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _warn(text: str) -> None:
    err.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
