"""One tick: look into the inbox, enter what has arrived, run what is new, let the gate decide, tell.

It is what a scheduler starts, as often as it likes. A tick that has nothing to do does nothing, one that
was killed is finished by the next, and of two at once the second says so and ends: a lease of the stream
is held from the first look to the last word. The second first makes sure that the other lives: a tick that
follows one that was killed on another host a moment ago must not take its place for taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipelines.alerts import Teller
from pipelines.arrivals import Arrival, Register, tick_folder
from pipelines.claims import Owner
from pipelines.config import StreamConfig
from pipelines.decisions import DecisionLog
from pipelines.interrupts import Interrupted, Interrupts
from pipelines.lease import Lease
from pipelines.lineage import gather
from pipelines.load import load_config
from pipelines.receive import Taken, take_in
from pipelines.results import StreamView
from pipelines.sources import display_name
from pipelines.stream import Stream, Watch, open_storage, open_stream, records_of, run_streams
from seekr.errors import ConfigError, SeekrError

State = Literal["ran", "nothing", "busy"]
# What shows a run, made when it is known how many stages there are.
Watching = Callable[[int], AbstractContextManager[Watch]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a tick did.

    Attributes:
        state: something ran, there was nothing to do, or another tick is at work.
        text: a sentence, for `nothing` and `busy`.
        entered, waiting: see `receive.Taken`.
        stream: with all that has arrived; None where it has no task yet, or busy.
        view: of the stream, where something ran.
    """

    state: State
    text: str = ""
    entered: tuple[Arrival, ...] = ()
    waiting: tuple[str, ...] = ()
    stream: Stream | None = None
    view: StreamView | None = None


class _Busy(SeekrError):
    """Another tick is at work; never leaves this module."""


def run_tick(
    path: Path,
    overrides: Sequence[str],
    watching: Watching,
    *,
    warn: Callable[[str], None],
    tell: Callable[[Arrival], None] = lambda _: None,
    interrupts: Interrupts | None = None,
) -> Outcome:
    """Do all there is to do for a stream now.

    Args:
        overrides: what is changed in the YAML, see `load_config`.
        watching: opened when something is run.
        warn: told what does not stop the tick.
        tell: called with each new arrival.
        interrupts: see `run_streams`.

    Raises:
        Whatever a run raises, after the webhook was told.
    """
    config = load_config(path, overrides)
    store = open_storage(config, writable=True)
    teller = Teller(config.alerts, store, config.name, warn)

    def busy(owner: Owner) -> None:
        raise _Busy(f"another tick of {config.name} is at work ({owner}); nothing was done")

    def open_now() -> Stream:
        return open_stream(path, overrides, writable=True)

    try:
        with Lease(store, tick_folder(config.name), on_alive=busy) as lease:
            teller.begin()
            try:
                return _tick(
                    config, Register(store, config.name), lease, open_now,
                    lambda stream: _run(stream, watching, warn, interrupts), tell,
                )  # fmt: skip
            except Interrupted:
                raise  # a scheduler's doing, and the next tick goes on
            except Exception as error:
                teller.tell_failure(error)
                raise
            finally:
                teller.tell_news()
    except _Busy as found:
        return Outcome(state="busy", text=str(found))


def withdraw_task(
    path: Path, overrides: Sequence[str], task: str, reason: str, warn: Callable[[str], None]
) -> Arrival:
    """Take a task that has arrived out of a stream, when no tick is at work.

    Args:
        warn: told whom it waits for, and if users are served by a model that has learnt the task.

    Raises:
        ConfigError: no such task has arrived, or no reason is given.
    """
    if not reason.strip():
        raise ConfigError("--reason is empty; say why, for those who will ask")
    config = load_config(path, overrides)
    store = open_storage(config, writable=True)

    def wait(owner: Owner) -> None:
        warn(f"waiting for another tick of {config.name} ({owner})")

    with Lease(store, tick_folder(config.name), on_wait=wait) as lease:
        entry = Register(store, config.name).withdraw(task, reason.strip(), lease)
    champion = DecisionLog(store, config.name).read().champion
    if champion is not None and any(
        record.stage == "train" and record.task == task for record in gather(store, champion)
    ):
        warn(
            f"the champion, the model after {champion.task}, has learnt {task} and stays the champion; "
            "to go back to one that has not: seekr rollback"
        )
    return entry


def _tick(
    config: StreamConfig,
    register: Register,
    lease: Lease,
    open_now: Callable[[], Stream],
    run: Callable[[Stream], StreamView],
    tell: Callable[[Arrival], None],
) -> Outcome:
    taken = Taken()
    if config.tasks_from is not None:
        taken = take_in(config, register, lease, tell)
    done = Outcome(state="nothing", entered=taken.entered, waiting=taken.waiting)
    if not register.extend(config).tasks:
        place = display_name(str(config.tasks_from))
        return replace(done, text=f"nothing has arrived in {place} that is a task")
    stream = open_now()
    if not _has_work(stream):
        tasks = len(stream.config.tasks)
        return replace(done, stream=stream, text=f"nothing new: {tasks} tasks, all of them learnt")
    return replace(done, state="ran", stream=stream, view=run(stream))


def _run(
    stream: Stream,
    watching: Watching,
    warn: Callable[[str], None],
    interrupts: Interrupts | None,
) -> StreamView:
    for text in stream.facts.warnings:
        warn(text)
    with watching(len(stream.stages)) as watch:
        (view,) = run_streams([stream], watch, warn=warn, interrupts=interrupts)
    return view


def _has_work(stream: Stream) -> bool:
    """Whether a stage is missing, or the gate has not seen the newest model."""
    records = records_of(stream)
    if len(records) < len(stream.stages):
        return True
    gate = stream.config.gate
    if gate is None:
        return False
    models = [record.ref for record in records.values() if record.stage == "train"]
    decisions = DecisionLog(stream.store, stream.config.name).read()
    return not decisions.has_judged(models[-1], gate.model_dump(mode="json"))
