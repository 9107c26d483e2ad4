"""Writing beside the work: in order, one at a time, told once when it fails, and never waited for long."""

from __future__ import annotations

import threading
import time

from pipelines.background import BackgroundWriter


def test_jobs_are_written_in_order_by_one_connection() -> None:
    connections: list[list[int]] = []

    def connect() -> list[int]:
        connections.append([])
        return connections[-1]

    background = BackgroundWriter(connect, name="test", failed=lambda _: None)
    for number in range(100):
        background.put(lambda written, number=number: written.append(number))
    assert background.close() and background.close()
    assert connections == [list(range(100))]


def test_two_writers_never_write_at_once() -> None:
    busy, most, failures = list[int](), list[int](), list[str]()

    def job(number: int) -> None:
        busy.append(number)
        most.append(len(busy))
        time.sleep(0.002)
        busy.remove(number)

    writers = [
        BackgroundWriter(lambda n=n: n, name=f"test-{n}", failed=failures.append) for n in range(3)
    ]
    for _ in range(20):
        for writer in writers:
            writer.put(job)
    assert all([writer.close() for writer in writers])
    assert most == [1] * 60 and failures == []


def test_the_first_failure_is_told_once_and_ends_the_writing() -> None:
    told, written = list[str](), list[int]()

    def fail(_: object) -> None:
        raise OSError(f"no {'room ' * 100}at https://ada:hunter2@host/x")

    background = BackgroundWriter(object, name="test", failed=told.append)
    background.put(lambda _: written.append(1))
    background.put(fail)
    background.put(lambda _: written.append(2))
    background.put(fail)
    assert background.close() is False
    assert written == [1]
    (reason,) = told
    assert reason.startswith("OSError: no room room") and reason.endswith("...")
    assert len(reason) < 350 and "hunter2" not in reason


def test_who_cannot_connect_is_told_and_waits_for_nobody() -> None:
    told = list[str]()

    def connect() -> int:
        raise ConnectionError("https://ada:hunter2@host is not there")

    background = BackgroundWriter(connect, name="test", failed=told.append)
    background.put(lambda _: None)
    background.put(lambda _: None)
    assert background.close() is False
    assert told == ["ConnectionError: https://***@host is not there"]


def test_a_job_that_does_not_end_is_waited_for_no_longer_than_asked() -> None:
    told, end = list[str](), threading.Event()
    background = BackgroundWriter(object, name="test", failed=told.append)
    background.put(lambda _: end.wait(60) and None)
    begun = time.monotonic()
    try:
        assert background.close(timeout=0.2) is False
        assert time.monotonic() - begun < 30
        assert told == ["it was still being written 0 s after the end"]
    finally:
        end.set()


def test_without_a_place_to_write_to_nothing_is_started_or_kept() -> None:
    threads = threading.active_count()
    background: BackgroundWriter[object] = BackgroundWriter(None, name="test", failed=print)
    background.put(lambda _: None)
    assert threading.active_count() == threads
    assert background.close() is True
    assert background._queue.empty()
