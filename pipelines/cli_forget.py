"""`seekr rows` and `seekr forget`: which rows a store has, and taking some of them out of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from seekr.errors import ConfigError

out = Console()
err = Console(stderr=True)

_StreamPath = Annotated[Path, typer.Argument(metavar="STREAM", help="The stream's YAML file.")]
_Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field. May be repeated."),
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
_SHOWN_CHARS = 80


def rows(
    stream: _StreamPath,
    find: Annotated[
        str | None, typer.Option(metavar="TEXT", help="In a row's input or answers.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="FILE:LINE", help="In a source of the stream.")
    ] = None,
    set_: _Overrides = None,
    as_json: _AsJson = False,
) -> None:
    """Find rows of the store by their text, or by their place in a source file; their ids come out.

    All streams on the same storage are looked through. Starts nothing.

    Example: seekr rows stream.yaml --find "Jane Doe"
    """
    from pipelines.find_rows import find_place, find_text
    from pipelines.load import load_config
    from pipelines.stream import open_storage

    if (find is None) == (at is None) or find == "":
        raise ConfigError("either --find TEXT or --at FILE:LINE is needed: give one of them")
    config = load_config(stream, set_ or ())
    store = open_storage(config, writable=False)
    found = find_text(store, find) if find is not None else find_place(store, config, at or "")
    if as_json:
        print(json.dumps({"rows": list(map(asdict, found))}, indent=2))
        return
    if not found:
        _say(f"no row in {store.location.shown} has this text")
        return
    table = Table(title="rows", title_justify="left")
    table.add_column("row id", no_wrap=True)
    for column in ("task", "of", "text", ""):
        table.add_column(column)
    for row in found:
        text = row.text if len(row.text) <= _SHOWN_CHARS else f"{row.text[: _SHOWN_CHARS - 3]}..."
        notes = ["replayed"] * row.replayed
        notes += [f"forgotten on {row.forgotten}"] if row.forgotten else []
        table.add_row(row.row_id, row.task, row.kind, Text(text), ", ".join(notes))
    out.print(table)


def forget(
    stream: _StreamPath,
    row_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ROW_ID", help="See `seekr rows`.")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="IDS.txt", help="One row id a line.")] = None,
    reason: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Kept with the request, for all to read.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    set_: _Overrides = None,
    as_json: _AsJson = False,
) -> None:
    """Take rows out of every file of the store, for good, and mark the models trained on them.

    This cannot be undone. All streams on the same storage are covered, their replay memory, teacher
    targets, predictions and reports. Nothing is computed anew for it, and later runs leave the rows out
    wherever sources still have them. Weights keep what they learnt. Without ROW_ID, what a call that was
    stopped has begun is completed.

    Example: seekr forget stream.yaml 0f3c2a9b7d6e5f4a3b2c1d0e9f8a7b6c --reason "ticket 4711"
    """
    from pipelines.forget import forget as forget_rows
    from pipelines.forget import look_up
    from pipelines.forget_views import write_views
    from pipelines.forgotten import pending
    from pipelines.load import load_config
    from pipelines.stream import open_storage

    wanted = _wanted(row_ids or (), file)
    store = open_storage(load_config(stream, set_ or ()), writable=not dry_run)
    if not wanted and not pending(store):
        raise ConfigError(
            "no ROW_ID is given, and no request was stopped half-way: give ids, or a file of them with "
            "--file; `seekr rows STREAM --find TEXT` finds them"
        )
    if wanted and (dry_run or not yes):
        plan = look_up(store, wanted, reason)
        if dry_run:
            _show(plan, [], as_json, "would be")
            return
        if plan.request.rows:
            _confirm(plan, as_json)
    done = forget_rows(store, wanted, reason=reason, tell=_tell)
    if done.completed or (done.plan is not None and done.plan.request.rows):
        write_views(stream, set_ or (), _warn)
    _show(done.plan, [request.id for request in done.completed], as_json, "is")
    left = [name for name in done.reports if name != load_config(stream, set_ or ()).name]
    if left:
        _tell(
            f"reports of other streams were removed; run these again to write them: {', '.join(left)}"
        )


def _wanted(row_ids: Sequence[str], file: Path | None) -> list[str]:
    """Return all ids that were given, each once.

    Raises:
        ConfigError: the file cannot be read, or has no id.
    """
    found = [row_id.strip() for row_id in row_ids]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {file} cannot be read: {error}") from error
        listed = [line for line in lines if line]
        if not listed:
            raise ConfigError(f"--file {file} has no row id; one a line is needed")
        found += listed
    return list(dict.fromkeys(found))


def _confirm(plan: Any, as_json: bool) -> None:
    """Ask a person.

    Raises:
        ConfigError: nobody can be asked, or the answer is no.
    """
    if not sys.stdin.isatty() or as_json:
        raise ConfigError("forgetting cannot be undone: repeat with --yes, or look with --dry-run")
    _show(plan, [], False, "would be")
    if not typer.confirm("Take these rows out of the store, for good?"):
        raise ConfigError("nothing was changed")


def _show(plan: Any, completed: Sequence[str], as_json: bool, verb: str) -> None:
    """Print what a plan is, or what was done; `verb` says which."""
    if as_json:
        print(json.dumps(_as_json(plan, completed), indent=2))
        return
    for name in completed:
        _say(f"request {name}, which was stopped, is carried out")
    if plan is None:
        return
    for row_id, day in plan.already.items():
        _say(f"{row_id} was forgotten on {day}, and no file has it")
    if plan.stages:
        table = Table(title=f"what {verb} touched", title_justify="left")
        for column in ("stage", "task", "fingerprint", ""):
            table.add_column(column)
        for key, words in plan.stages.items():
            copied = plan.copies.get(key)
            place = key.split("/") if copied is None else ["arrived", copied, key.split("/")[-1]]
            table.add_row(place[0], place[1], place[2][:12], words)
        count = f"{plan.num_rows} row{'' if plan.num_rows == 1 else 's'}"
        more = f", {len(plan.request.derived)} made of them" if plan.request.derived else ""
        end = f"{count}{more}; models trained on them: {len(plan.request.learnt)}"
        end += f", grown from these: {len(plan.descendants)}"
        out.print(Group(table, Text(end, "bold")))


def _as_json(plan: Any, completed: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"completed": list(completed)}
    if plan is not None:
        request = plan.request
        found |= {
            "request": request.id if request.rows else None,
            "at": request.at,
            "rows": plan.num_rows,
            "derived_rows": len(request.derived),
            "already": dict(plan.already),
            "stages": dict(plan.stages),
            "models": {key: len(marks) for key, marks in request.learnt.items()},
            "descendants": list(plan.descendants),
        }
    return found


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _tell(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def _warn(text: str) -> None:
    err.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
