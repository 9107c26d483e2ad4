"""Signals become questions that the run asks, leases are let go, and nothing is shown as failed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.interrupts import Interrupted, Interrupts
from pipelines.lease import Lease, abandon_all, holder, release_all
from pipelines.stage import Stage, StageEvent, StageOutcome, Stopped, Workspace, run_stage, state
from pipelines.store import Store
from seekr.errors import LeaseLost

TRAIN = Stage(name="train", task="news")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path))


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_anything_runs_ends_at_once_with_its_own_exit_code(
    number: int, code: int
) -> None:
    with (
        pytest.raises(Interrupted, match="Run the same command again to go on") as ended,
        Interrupts(),
    ):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert ended.value.exit_code == code
    assert signal.Signals(number).name in str(ended.value)


def test_a_signal_while_stages_run_waits_to_be_asked_for() -> None:
    told: list[str] = []
    with Interrupts(grace=0.2, tell=told.append) as interrupts:
        # As Ray does when it starts.
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("Ray's handler was left"))
        with interrupts.deferred():
            assert not interrupts.asked and not interrupts.expired
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert interrupts.asked and not interrupts.expired
            time.sleep(0.25)
            assert interrupts.expired
            error = interrupts.error(["train/a saved after step 4 of 9", "score/a was left"])
    assert error.exit_code == 143
    assert str(error) == (
        "stopped by SIGTERM: train/a saved after step 4 of 9; score/a was left. Run the same "
        "command again to go on"
    )


def test_whoever_does_not_enter_hears_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    interrupts = Interrupts()
    with interrupts.deferred():
        assert signal.getsignal(signal.SIGTERM) == before
        assert not interrupts.asked


def test_a_stage_that_stopped_is_interrupted_and_goes_on(store: Store) -> None:
    events: list[StageEvent] = []

    def stop(workspace: Workspace) -> StageOutcome:
        workspace.write_json("checkpoints/a.json", {"step": 4})
        raise Stopped("train/news saved after step 4 of 9")

    with pytest.raises(Stopped):
        run_stage(store, TRAIN, stop, on_event=events.append)
    assert [event.kind for event in events] == ["started", "stopped"]
    assert events[-1].error == "train/news saved after step 4 of 9"
    assert state(store, TRAIN) == "interrupted"
    assert not store.exists(f"{TRAIN.key}/failure.json")

    def go_on(workspace: Workspace) -> StageOutcome:
        assert workspace.resumed and store.exists(workspace.path("checkpoints/a.json"))
        return StageOutcome()

    run_stage(store, TRAIN, go_on)
    assert state(store, TRAIN) == "reused"


def test_an_interrupted_attempt_after_a_failed_one_is_shown_as_what_it_is(store: Store) -> None:
    def fail(workspace: Workspace) -> StageOutcome:
        raise ValueError("once")

    def stop(workspace: Workspace) -> StageOutcome:
        raise Stopped("asked to")

    with pytest.raises(ValueError):
        run_stage(store, TRAIN, fail)
    assert state(store, TRAIN) == "failed"
    with pytest.raises(Stopped):
        run_stage(store, TRAIN, stop)
    assert state(store, TRAIN) == "interrupted"


def test_what_is_given_up_is_free_at_once_and_commits_nothing(store: Store) -> None:
    reached = threading.Event()
    errors: list[BaseException] = []

    def compute(workspace: Workspace) -> StageOutcome:
        reached.set()
        while not workspace.lease.lost:
            time.sleep(0.01)
        raise RuntimeError("Ray is gone")

    def work() -> None:
        try:
            run_stage(store, TRAIN, compute)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert reached.wait(10)
    abandon_all()
    thread.join(10)
    assert isinstance(errors[0], RuntimeError)
    assert state(store, TRAIN) == "interrupted", "an error after the end was taken for a failure"


def test_release_lets_the_next_run_in_without_waiting_for_the_time_to_live(store: Store) -> None:
    with Lease(store, "train/a", ttl=3600) as lease:
        waiting = Lease(store, "train/a", ttl=3600)
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                waiting.__enter__()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while not list(Path(store.full_path("train/a/.lease")).glob("claim-*"))[1:]:
            time.sleep(0.01)
        release_all()
        thread.join(10)
        assert isinstance(errors[0], LeaseLost) and "asked to stop" in str(errors[0])
        assert holder(store, "train/a") is None
        assert not list(Path(store.full_path("train/a/.lease")).iterdir())
        with pytest.raises(LeaseLost, match="asked to stop"):
            lease.check()
    started = time.monotonic()
    with Lease(store, "train/a", ttl=3600) as again:
        again.check()
    assert time.monotonic() - started < 5
