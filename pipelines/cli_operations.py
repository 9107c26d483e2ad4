"""`seekr tick`, `withdraw`, `promote`, `rollback`, `champion`: commands of a stream that never ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli_common import (
    AsJson,
    HeldBackOk,
    Overrides,
    StreamPath,
    err,
    out,
    print_json,
    say,
    warn,
)

if TYPE_CHECKING:
    from pipelines.promotion import Change
    from pipelines.results import StreamView
    from pipelines.stream import Stream
    from pipelines.tick import Outcome

Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; it is kept with the decision.")]


def tick(
    stream: StreamPath,
    set_: Overrides = None,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="For trainings to save when stopped.")
    ] = 25.0,
    held_back_ok: HeldBackOk = False,
    as_json: AsJson = False,
) -> None:
    """Take in what has arrived, run what is new, let the gate decide. What a scheduler starts.

    Does nothing if there is nothing new, or if another tick is at work. What cannot be used is set aside
    with the reason, and the stream goes on without it. Exit codes: 0 done or nothing to do, 1 failed,
    2 configuration, 3 the gate held the newest model back, 130 and 143 stopped.

    Example: seekr tick stream.yaml
    """
    from pipelines.interrupts import Interrupts
    from pipelines.tick import run_tick
    from pipelines.watching import Watcher

    console = err if as_json else out
    with Interrupts(grace, tell=warn) as interrupts:
        outcome = run_tick(
            stream,
            set_ or (),
            lambda count: Watcher(console=console, num_stages=count),
            warn=warn,
            tell=lambda arrival: say(str(arrival), console),
            interrupts=interrupts,
        )
    if as_json:
        print_json(_outcome_json(outcome))
    else:
        _show(outcome)
    views = [outcome.view] if outcome.view is not None else []
    end_as_decided(views, held_back_ok=held_back_ok, as_json=as_json)


def withdraw(
    stream: StreamPath,
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="A task that came through the inbox.")
    ],
    reason: Reason,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Take a task that has arrived out of the stream again, such as one that cannot be learnt.

    What arrived behind it moves up and is learnt anew; `seekr plan` shows what that means. Nothing is
    deleted. Waits for a tick that is at work.

    Example: seekr withdraw stream.yaml news --reason "the labels were shifted"
    """
    from pipelines.tick import withdraw_task

    entry = withdraw_task(stream, set_ or (), task, reason, warn)
    if as_json:
        print_json(asdict(entry))
        return
    say(f"{task} is withdrawn; what it means for the others: seekr plan {stream}")


def promote(
    stream: StreamPath,
    reason: Reason,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A task or fingerprint; default the newest."),
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make a model the champion by hand, whatever the gate says.

    Example: seekr promote stream.yaml news --reason "the lost task was retired"
    """
    from pipelines import promotion
    from pipelines import stream as streams

    opened = streams.open_stream(stream, set_ or (), writable=True)
    _changed(opened, promotion.promote(opened, model, reason, warn), as_json)


def rollback(
    stream: StreamPath,
    reason: Reason,
    to: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A former champion; default the last one.")
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make a former champion the champion again. The gate does not promote the one left behind again.

    Example: seekr rollback stream.yaml --reason "users complain about dates"
    """
    from pipelines import promotion
    from pipelines import stream as streams

    opened = streams.open_stream(stream, set_ or (), writable=True)
    _changed(opened, promotion.roll_back(opened, to, reason, warn), as_json)


def champion(stream: StreamPath, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Show which model is the champion, and every decision that led there.

    Example: seekr champion stream.yaml
    """
    from pipelines.decisions import DecisionLog
    from pipelines.load import load_config
    from pipelines.promotion_tables import checks_table, decisions_table, operations_json
    from pipelines.stream import open_storage

    config = load_config(stream, set_ or ())
    store = open_storage(config, writable=False)
    found = DecisionLog(store, config.name).read()
    if as_json:
        values = operations_json((), found)
        model = found.champion
        where = None if model is None else store.uri_for(f"{model.key}/model")
        print_json({key: values[key] for key in ("champion", "decisions")} | {"model": where})
        return
    judged = [entry for entry in found.entries if entry.checks]
    if judged:
        out.print(checks_table(judged[-1].checks))
    out.print(decisions_table(found))


def show_decisions(views: Sequence[StreamView]) -> None:
    """Print what the gate has said in this run."""
    from pipelines.promotion_tables import decision_group

    for view in views:
        if view.decided is not None:
            out.print(decision_group(view.decided))


def end_as_decided(views: Sequence[StreamView], *, held_back_ok: bool, as_json: bool) -> None:
    """Say by the exit code that a model was held back in this run, if one was, or by a last line.

    Raises:
        typer.Exit: one was, and that is not ok.
    """
    from pipelines.continual_config import HELD_BACK, HELD_BACK_LINE

    if not any(view.decided is not None and view.decided.held_back for view in views):
        return
    if not held_back_ok:
        raise typer.Exit(HELD_BACK)
    say(HELD_BACK_LINE, err if as_json else out)


def show_operations(stream: Stream) -> None:
    """Print what has arrived, and who is the champion; nothing for a stream that has neither."""
    from pipelines.promotion_tables import arrivals_table, champion_line
    from pipelines.stream import view_of

    view = view_of(stream)
    if view.arrivals:
        out.print(arrivals_table(view.arrivals))
    if view.decisions.entries or stream.config.gate is not None:
        say(champion_line(view.decisions))


def _changed(stream: Stream, change: Change, as_json: bool) -> None:
    decision = change.decision
    if as_json:
        value = None if decision is None else decision.to_json()
        print_json({"champion": change.champion.key, "decision": value})
        return
    what = f"the model after {change.champion.task} ({change.champion.fingerprint[:12]})"
    said = "is the champion already" if decision is None else "is the champion now"
    say(f"{what} {said}; decisions: {stream.store.uri_for(_folder(stream))}")


def _folder(stream: Stream) -> str:
    return f"streams/{stream.config.name}/decisions"


def _show(outcome: Outcome) -> None:
    from pipelines.tables import matrix_table

    for text in outcome.waiting:
        say(text)
    if outcome.text:
        say(outcome.text)
    if outcome.view is None or outcome.stream is None:
        return
    if outcome.view.measured():
        out.print(matrix_table(outcome.view))
    show_decisions([outcome.view])
    say(f"report: {outcome.stream.store.uri_for(outcome.stream.report_path)}")


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    from pipelines.tables import summary

    decided = None if outcome.view is None else outcome.view.decided
    return {
        "state": outcome.state,
        "text": outcome.text,
        "entered": [asdict(item) for item in outcome.entered],
        "waiting": list(outcome.waiting),
        "decision": None if decided is None else decided.to_json(),
        "results": None if outcome.view is None else summary(outcome.view),
    }


COMMANDS = (tick, withdraw, promote, rollback, champion)
