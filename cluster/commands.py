"""`seekr cluster submit | status | logs | schedule | cancel`: runs on clusters, from the command line.

Each command opens the stream's cluster and prints what a module returns. Without `--address` the cluster is
Kubernetes, as the stream's `cluster` section says; with it, a Ray cluster that runs already.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.opening import Opened, Target, open_kubernetes, open_runs, open_submission
from cluster.submission import Run, Tell, ending, newest, under_way
from cluster.submission import submit as submit_run
from cluster.submission import wait as wait_for
from seekr.errors import ConfigError, SeekrError

out = Console()
err = Console(stderr=True)

StreamPath = Annotated[Path, typer.Argument(metavar="STREAM", help="The stream's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change a field of the stream. May be repeated."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Of a Ray cluster's dashboard, instead of Kubernetes."),
]
TokenSecret = Annotated[
    str | None,
    typer.Option(
        metavar="NAMESPACE/NAME",
        help="Kubernetes Secret with the token of --address; default RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH.",
    ),
]
Context = Annotated[str | None, typer.Option(metavar="NAME", help="Of the kubeconfig.")]
Kubeconfig = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Default KUBECONFIG, or ~/.kube/config.")
]
OneRun = Annotated[str | None, typer.Option("--run", metavar="NAME", help="Default the newest.")]
Force = Annotated[
    bool, typer.Option("--force", help="Take over fields that somebody else has changed.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
_SHOWN = 5


def submit(
    stream: StreamPath,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the run, and return its exit code.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also run what has been done already.")
    ] = False,
    pip: Annotated[
        bool, typer.Option("--pip", help="With --address: let Ray install this Python's packages.")
    ] = False,
    force: Force = False,
    set_: Overrides = None,
    address: Address = None,
    token_secret: TokenSecret = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_json: AsJson = False,
) -> None:
    """Start a run of a stream on a cluster, unless one is under way or has done the same.

    Safe to repeat. With --wait its log is printed to the end; Ctrl-C then leaves the run alone. Exit codes:
    0 done, 1 failed, 2 wrong usage or configuration, 3 done and the gate held the newest model back, 130 or
    143 stopped.

    Example: seekr cluster submit stream.yaml --wait
    """
    target = _target(address, token_secret, context, kubeconfig)
    tell = _tell(as_json)
    opened = open_submission(stream, set_ or (), target, tell=tell, pip=pip, force=force)
    run = submit_run(opened.backend, opened.base, opened.digest, again=again, tell=tell)
    if wait:
        run = _followed(opened, run, tell=tell, as_json=as_json)
    if as_json:
        _print_json({"stream": opened.stream, "where": opened.backend.where} | run.to_json())
    if wait and run.code:
        raise typer.Exit(run.code)


def status(
    stream: StreamPath,
    all_: Annotated[bool, typer.Option("--all", help=f"Not only the last {_SHOWN} runs.")] = False,
    set_: Overrides = None,
    address: Address = None,
    token_secret: TokenSecret = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_json: AsJson = False,
) -> None:
    """Show the runs of a stream on a cluster: waiting, running, retrying, suspended, done, failed, stopped.

    Where its stages stand is what `seekr status` shows, from the store.

    Example: seekr cluster status stream.yaml
    """
    target = _target(address, token_secret, context, kubeconfig)
    opened = open_runs(stream, set_ or (), target, tell=_tell(as_json))
    runs = opened.backend.runs()
    shown = runs if all_ else runs[-_SHOWN:]
    if as_json:
        where = {"stream": opened.stream, "where": opened.backend.where}
        _print_json(where | {"runs": [run.to_json() for run in shown]})
    elif runs:
        _say(opened.backend.where)
        out.print(_table(shown))
    else:
        _say(
            f"no run of this stream is on {opened.backend.where}; start one: seekr cluster submit {stream}"
        )


def logs(
    stream: StreamPath,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run is over.")
    ] = False,
    run: OneRun = None,
    set_: Overrides = None,
    address: Address = None,
    token_secret: TokenSecret = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print what a run has printed; the one that is under way, or else the last.

    Example: seekr cluster logs stream.yaml --follow
    """
    target = _target(address, token_secret, context, kubeconfig)
    opened = open_runs(stream, set_ or (), target, tell=_note)
    found = newest(opened.backend, run)
    for text in opened.backend.logs(found, follow=follow, tell=_note):
        _write(text)


def cancel(
    stream: StreamPath,
    run: OneRun = None,
    now: Annotated[
        bool, typer.Option("--now", help="On Kubernetes: end the pods without asking first.")
    ] = False,
    set_: Overrides = None,
    address: Address = None,
    token_secret: TokenSecret = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_json: AsJson = False,
) -> None:
    """End a run in good order: trainings save, and the next run goes on from there.

    Finished stages stay in the store. A schedule goes on; put it to rest with `seekr cluster schedule`.

    Example: seekr cluster cancel stream.yaml
    """
    target = _target(address, token_secret, context, kubeconfig)
    tell = _tell(as_json)
    opened = open_runs(stream, set_ or (), target, tell=tell)
    runs = opened.backend.runs()
    found = newest(opened.backend, run) if run is not None else under_way(runs)
    if found is None or found.over:
        tell(f"no run of this stream is under way on {opened.backend.where}")
    else:
        found = opened.backend.stop(found, now=now, tell=tell)
        tell(ending(found))
        if found.state == "stopped":
            tell(_left(opened, found, now=now))
    if as_json:
        ran = None if found is None else found.to_json()
        _print_json({"stream": opened.stream, "where": opened.backend.where, "run": ran})


def schedule(
    stream: StreamPath,
    show: Annotated[bool, typer.Option("--show", help="Only show it, and when it is due.")] = False,
    suspend: Annotated[bool, typer.Option("--suspend", help="Put it to rest.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Wake it again.")] = False,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove it; what it has started stays.")
    ] = False,
    force: Force = False,
    set_: Overrides = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_json: AsJson = False,
) -> None:
    """Bring the stream's schedule on Kubernetes to what `cluster.schedule` says, and show when it is due.

    Example: seekr cluster schedule stream.yaml
    """
    from cluster import scheduling

    if sum((show, suspend, resume, delete)) > 1:
        raise ConfigError("--show, --suspend, --resume and --delete exclude each other; give one")
    tell = _tell(as_json)
    kubernetes, name, manifests = open_kubernetes(
        stream, set_ or (), Target(context=context, kubeconfig=kubeconfig)
    )
    if delete:
        kind = scheduling.remove(kubernetes, name)
        tell(f"{kind} {name} is removed; runs that it has started go on")
        if as_json:
            _print_json({"removed": f"{kind}/{name}"})
        return
    if show:
        found = scheduling.show_schedule(kubernetes, name)
    elif suspend or resume:
        found = scheduling.rest(kubernetes, name, suspended=suspend)
    else:
        if not manifests.scheduled:
            raise ConfigError(
                "cluster.schedule is null, so there is nothing to schedule; add it, such as "
                "schedule: {cron: '0 3 * * 1'}, or end one that is there: --delete"
            )
        found = scheduling.apply_schedule(
            kubernetes, manifests.base, manifests.scheduled, force=force, tell=tell
        )
    _print_json(found.to_json()) if as_json else _say(str(found))


def register(app: typer.Typer) -> None:
    """Add the commands to `seekr cluster`."""
    for command in (submit, status, logs, cancel, schedule):
        app.command()(command)


def _followed(opened: Opened, run: Run, *, tell: Tell, as_json: bool) -> Run:
    write = _write_aside if as_json else _write
    try:
        return wait_for(opened.backend, run, write=write, tell=tell)
    except KeyboardInterrupt:
        tell(
            f"run {run.name} goes on without you; look at it with seekr cluster status, end it with seekr "
            "cluster cancel"
        )
        raise typer.Exit(130) from None


def _left(opened: Opened, run: Run, *, now: bool) -> str:
    """What happens with the stages: the run's own last words, or what holds for all."""
    said: Sequence[str] = ()
    if not now:
        try:
            text = "".join(opened.backend.logs(run, follow=False, tell=_quiet))
            said = [line for line in text.splitlines() if line.startswith("stopped by ")]
        except SeekrError:
            said = ()  # the log is a courtesy here, and the run has ended
    last = f"{said[-1]}\n" if said else ""
    return f"{last}finished stages are in the store; submit the stream again to go on"


def _table(runs: Sequence[Run]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "submitted", "took", "attempt", ""):
        table.add_column(name, overflow="fold")
    for run in runs:
        submitted = "" if run.submitted is None else f"{run.submitted.astimezone():%F %R}"
        tries = f"{run.attempt} of {run.attempts}" if run.attempts > 1 else ""
        state = run.state if run.state != "failed" else f"failed ({run.code})"
        table.add_row(run.name, state, submitted, _duration(run.seconds), tries, run.reason)
    return table


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _target(
    address: str | None, token_secret: str | None, context: str | None, kubeconfig: Path | None
) -> Target:
    return Target(
        address=address, token_secret=token_secret, context=context, kubeconfig=kubeconfig
    )


def _tell(as_json: bool) -> Tell:
    return _note if as_json else _say


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _note(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def _quiet(text: str) -> None:
    """What is told of a log that is only looked through."""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_aside(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
