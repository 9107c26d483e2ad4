"""`seekr`: the command line. Thin: every command opens a stream and prints what a module returns.

Heavy imports happen inside commands, so `--help` answers at once. Exit codes: 0 done, 1 failed, 2 wrong
usage, configuration or data, 3 a gate held the newest model back. Other packages add commands through
the entry-point group `seekr.commands`, each a typer app.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipelines import cli_operations as operations
from pipelines.cli_benchmark import benchmark
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
from pipelines.cli_forget import forget, rows
from seekr.errors import ConfigError, SeekrError

app = typer.Typer(
    help="Keep large language models up to date without forgetting.\n\n"
    "A stream is a YAML file: a base model, a method, and a list of tasks to which new ones are "
    "appended. `seekr run stream.yaml` brings the world in line with it: finished stages are reused, "
    "interrupted ones are resumed, and only what is new is computed.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(benchmark)
app.command()(rows)
app.command()(forget)
for command in operations.COMMANDS:
    app.command()(command)


@app.command()
def run(
    stream: Annotated[
        list[Path], typer.Argument(metavar="STREAM", help="YAML files of streams on one storage.")
    ],
    set_: Overrides = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report here.")
    ] = None,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="For trainings to save when stopped.")
    ] = 25.0,
    held_back_ok: HeldBackOk = False,
    as_json: AsJson = False,
) -> None:
    """Run what is missing of a stream, or of several side by side, and show what came out.

    Safe to repeat: after a crash, a preemption or a change of the YAML, run it again. Stages that are
    in the store are reused, a training continues from its last checkpoint. Two runs at once share the
    work. Ctrl-C and SIGTERM let trainings save and end the run in good order (exit code 130, 143), a
    second one ends it at once; nothing finished is lost. Several streams share what they have in
    common and end with a comparison.

    Example: seekr run stream.yaml --set method.attention_weight=100
    """
    from pipelines import stream as streams
    from pipelines.export import check_target
    from pipelines.interrupts import Interrupts
    from pipelines.report import write_report
    from pipelines.tables import comparison_table, knowledge_table, matrix_table, summary
    from pipelines.watching import Watcher

    with Interrupts(grace, tell=warn) as interrupts:
        opened = [streams.open_stream(path, set_ or (), writable=True) for path in stream]
        for text in dict.fromkeys(text for item in opened for text in item.facts.warnings):
            warn(text)
        if report is not None:
            check_target(report, "--report")
        distinct = {stage.fingerprint for item in opened for stage in item.stages}
        with Watcher(console=err if as_json else out, num_stages=len(distinct)) as watcher:
            views = streams.run_streams(opened, watcher, warn=warn, interrupts=interrupts)
    where = opened[0].store.uri_for(opened[0].report_path)
    if report is not None:
        where = str(write_report(views, report))
    if as_json:
        found = [
            summary(view)
            | {"stages": list(map(asdict, streams.status_of(item)))}
            | ({"decision": view.decided.to_json()} if view.decided is not None else {})
            for view, item in zip(views, opened, strict=True)
        ]
        print_json(found[0] if len(found) == 1 else {"streams": found})
        operations.end_as_decided(views, held_back_ok=held_back_ok, as_json=True)
        return
    tested = [view for view in views if view.measured()]
    for view in tested:
        out.print(matrix_table(view))
    if len(tested) > 1:
        out.print(comparison_table(tested))
    if (facts := knowledge_table(views)) is not None:
        out.print(facts)
    operations.show_decisions(views)
    say(f"report: {where}")
    operations.end_as_decided(views, held_back_ok=held_back_ok, as_json=False)


@app.command()
def plan(stream: StreamPath, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Say what `run` would compute and reuse, and whether trainings fit in memory. Starts nothing.

    Memory is calculated per training worker, from the model's config.json and the rows' lengths. Where it
    is not there, settings are named with which it would be.

    Example: seekr plan stream.yaml --set method.attention_weight=100
    """
    from pipelines import stream as streams
    from pipelines.memory_plan import plan_memory
    from pipelines.memory_table import memory_table
    from pipelines.tables import plan_table

    opened = streams.open_stream(stream, set_ or ())
    for text in opened.facts.warnings:
        warn(text)
    statuses, memory = streams.status_of(opened), plan_memory(opened)
    if as_json:
        print_json({"stages": list(map(asdict, statuses)), "memory": memory.to_json()})
        return
    out.print(plan_table(statuses))
    out.print(memory_table(memory))


@app.command()
def status(stream: StreamPath, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Show where every stage stands, what has arrived, and who is the champion.

    A stage is `ran` (computed by the last run), `reused` (in the store before it), running, failed,
    interrupted or missing.

    Example: seekr status stream.yaml
    """
    from pipelines import stream as streams
    from pipelines.promotion_tables import operations_json
    from pipelines.tables import status_table

    opened = streams.open_stream(stream, set_ or ())
    statuses = streams.status_of(opened)
    if as_json:
        view = streams.view_of(opened)
        found = {"stream": opened.config.name, "stages": list(map(asdict, statuses))}
        print_json(found | operations_json(view.arrivals, view.decisions))
        return
    out.print(status_table(statuses))
    operations.show_operations(opened)


@app.command()
def explain(
    stream: StreamPath,
    stage: Annotated[
        str | None, typer.Argument(metavar="STAGE", help="Such as train/news or train.")
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say why each stage would run or be reused, down to the field that changed.

    Example: seekr explain stream.yaml train/news
    """
    from pipelines import stream as streams
    from pipelines.explain import explain as explain_stages

    opened = streams.open_stream(stream, set_ or ())
    chosen = [s for s in opened.stages if stage is None or stage in (s.name, str(s), s.task)]
    if not chosen:
        raise ConfigError(
            f"stage {stage!r} is not in the stream; there are "
            f"{', '.join(str(s) for s in opened.stages)}"
        )
    found = explain_stages(opened.store, chosen)
    texts = {str(item.stage): str(item) for item in found}
    print_json({"stages": texts}) if as_json else say("\n".join(texts.values()))


@app.command()
def report(
    stream: StreamPath,
    to: Annotated[Path, typer.Option("--out", metavar="FILE")] = Path("report.html"),
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="STREAM", help="Another one to compare it with. May be repeated."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write one self-contained HTML file about a stream, or several streams side by side.

    Example: seekr report seekr.yaml --compare replay.yaml --out report.html
    """
    from pipelines import stream as streams
    from pipelines.export import check_target
    from pipelines.report import write_report

    opened = [streams.open_stream(stream, set_ or ()), *map(streams.open_stream, compare or ())]
    views = [streams.finished_view(item) for item in opened]
    check_target(to, "--out")
    say(f"report: {write_report(views, to)}")


@app.command()
def lineage(
    stream: StreamPath,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A task's name, a fingerprint, STREAM@VERSION, or champion."
        ),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Write MLflow's view anew from the records.")
    ] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Walk from a model to everything it was made from, down to digests of data.

    Example: seekr lineage stream.yaml news
    """
    from pipelines import lineage as lineages
    from pipelines import stream as streams
    from pipelines import tracking
    from pipelines.promotion import model_lineage
    from pipelines.promotion_tables import told_of
    from pipelines.provenance import redact

    opened = streams.open_stream(stream, set_ or ())
    view = streams.finished_view(opened)
    if rebuild:
        uri = tracking.tracking_uri(opened.config.tracking.uri, opened.store)
        if uri is None:
            raise ConfigError("tracking is off: there is nothing to rebuild; set tracking.uri")
        tracking.rebuild(uri, view, opened.store, warn=warn)
        if model is None:
            print_json({"rebuilt": redact(uri)}) if as_json else say(f"{redact(uri)} is rebuilt")
            return
    found = model_lineage(opened, model)
    tasks = [ref.task for ref in (origin.ref for origin in found.origins.values())]
    told = list(told_of(found.root, tasks, view.arrivals, view.decisions))
    if as_json:
        print_json(found.to_json() | {"told": told})
        return
    out.print(lineages.render_tree(found))
    for line in told:
        say(line)


@app.command()
def export(
    stream: StreamPath,
    task: Annotated[
        str | None,
        typer.Argument(metavar="TASK", help="The model after it, or champion; default the last."),
    ] = None,
    to: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New or empty.")] = Path(
        "model"
    ),
    set_: Overrides = None,
) -> None:
    """Copy a task's model out of the store, in the Hugging Face layout, with its lineage.

    Example: seekr export stream.yaml news --out ./news-model
    """
    from pipelines import stream as streams
    from pipelines.export import export_model

    opened = streams.open_stream(stream, set_ or ())
    say(f"model: {export_model(opened, task, to)}")


@app.command()
def doctor(
    stream: Annotated[
        Path | None, typer.Argument(metavar="STREAM", help="Also check this stream.")
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and a stream's model, data, storage and tracking. Computes nothing.

    Example: seekr doctor stream.yaml
    """
    from pipelines.doctor import examine
    from pipelines.tables import doctor_table

    checks = examine(stream, set_ or ())
    found = {"checks": list(map(asdict, checks))}
    print_json(found) if as_json else out.print(doctor_table(checks))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of a stream's YAML, for editors and for reading.

    Example: seekr schema > stream.schema.json
    """
    from pipelines.config import StreamConfig

    print_json(StreamConfig.model_json_schema())


def main() -> None:
    """Run the command line; turns the product's errors into a message and an exit code."""
    # A thread that is left behind when a run ends must not start another Ray.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # Ray warns of many processes on few cores; a local cluster has more stages than cores on purpose.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started")
    for point in importlib.metadata.entry_points(group="seekr.commands"):
        app.add_typer(point.load(), name=point.name)
    try:
        app()
    except SeekrError as error:
        stopped = error.exit_code > 128  # by a signal
        text, style = (str(error), "yellow") if stopped else (f"error: {error}", "red")
        err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of Ctrl-C
            err.print("stopped; run the same command again to go on from here")
        raise


if __name__ == "__main__":
    main()
