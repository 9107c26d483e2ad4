"""`seekr cluster schedule` against a stand-in API server, and when five fields are due."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.scheduling import next_times
from tests.cluster.standing_in import ApiServerProcess, api_server
from tests.cluster.submitting import User, kube_stream

CRON = {"cron": "30 2 * * 1-5", "time_zone": "Europe/Berlin"}


@pytest.fixture(scope="module")
def running_server() -> Iterator[ApiServerProcess]:
    with api_server() as server:
        yield server


@pytest.fixture
def server(running_server: ApiServerProcess) -> ApiServerProcess:
    running_server.ask("reset")
    return running_server


@pytest.fixture
def user(server: ApiServerProcess, tmp_path: Path) -> User:
    return User(server, tmp_path)


def scheduled(folder: Path, **settings: Any) -> Path:
    return kube_stream(folder, schedule=CRON | settings)


@pytest.mark.parametrize("kind", ["CronJob", "RayCronJob"])
def test_a_schedule_is_applied_rested_woken_and_removed(
    server: ApiServerProcess, user: User, tmp_path: Path, kind: str
) -> None:
    stream = scheduled(tmp_path, kind=kind)
    told = user("schedule", stream)
    assert told.code == 0, told.err
    assert f"{kind} small: '30 2 * * 1-5' in Europe/Berlin" in told.out
    assert told.out.count("  due: ") == 3
    assert "last started: never yet" in told.out
    assert server.objects("RayJob") == []
    assert len(server.objects("ConfigMap")) == (2 if kind == "CronJob" else 1)
    (made,) = server.objects(kind)
    rested = user("schedule", stream, "--suspend")
    assert "at rest" in rested.out
    assert "due" not in rested.out
    assert server.objects(kind)[0]["spec"]["suspend"] is True
    again = user("schedule", stream)
    assert "stays at rest; wake it with --resume" in again.out
    assert server.objects(kind)[0]["spec"]["suspend"] is True
    assert "due" in user("schedule", stream, "--resume").out
    assert server.objects(kind)[0]["spec"] == made["spec"]
    removed = user("schedule", stream, "--delete")
    assert "runs that it has started go on" in removed.out
    assert server.objects(kind) == []
    (deletion,) = server.requests("DELETE")
    policy = "Orphan" if kind == "RayCronJob" else "Background"
    assert f"propagationPolicy={policy}" in deletion


def test_a_schedule_is_shown_without_being_changed(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    user("schedule", scheduled(tmp_path))
    last = {"lastScheduleTime": "2026-11-16T01:30:00Z"}
    server.ask("status", {"kind": "CronJob", "name": "small", "status": last})
    written = len(server.requests("PATCH"))
    told = user("schedule", scheduled(tmp_path, cron="0 5 * * *"), "--show", "--json")
    found = json.loads(told.out)
    assert found["cron"] == "30 2 * * 1-5"
    assert found["last"] == "2026-11-16T01:30:00+00:00"
    assert len(found["due"]) == 3
    assert all(text[11:16] == "02:30" for text in found["due"])
    assert len(server.requests("PATCH")) == written


def test_a_schedule_of_the_other_kind_is_not_joined_by_a_second(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    user("schedule", scheduled(tmp_path))
    told = user("schedule", scheduled(tmp_path, kind="RayCronJob"))
    assert told.code == 1
    assert "both would start runs" in told.err
    assert server.objects("RayCronJob") == []


def test_an_operator_without_raycronjobs_is_told(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    server.ask("unknown", ["RayCronJob"])
    told = user("schedule", scheduled(tmp_path, kind="RayCronJob"))
    assert told.code == 1
    assert "use cluster.schedule.kind: CronJob" in told.err
    assert server.ask("objects") == []
    assert user("schedule", scheduled(tmp_path)).code == 0


@pytest.mark.parametrize("options", [(), ("--show",), ("--suspend",), ("--delete",)])
def test_a_schedule_that_is_not_there_is_told(
    server: ApiServerProcess, user: User, tmp_path: Path, options: tuple[str, ...]
) -> None:
    told = user("schedule", kube_stream(tmp_path), *options)
    assert told.code == (1 if options else 2)
    assert ("no schedule of this stream" if options else "cluster.schedule is null") in told.err


def test_two_wishes_at_once_are_refused(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    told = user("schedule", scheduled(tmp_path), "--suspend", "--resume")
    assert told.code == 2
    assert server.ask("requests") == []


@pytest.mark.parametrize(
    ("cron", "zone", "after", "due"),
    [
        # Fridays and the 13th: either suffices where both are given.
        ("0 9 13 * 5", "Etc/UTC", "2026-11-12T10:00", ["2026-11-13T09:00", "2026-11-20T09:00"]),
        # Clocks go back on the 25th of October, and forward on the 28th of March.
        (
            "30 6 * * *",
            "Europe/Berlin",
            "2026-10-24T10:00",
            ["2026-10-25T05:30", "2026-10-26T05:30"],
        ),
        (
            "30 6 * * *",
            "Europe/Berlin",
            "2027-03-27T01:00",
            ["2027-03-27T05:30", "2027-03-28T04:30"],
        ),
        ("0 0 29 2 ?", "Etc/UTC", "2026-01-01T00:00", ["2028-02-29T00:00", "2032-02-29T00:00"]),
        ("0 0 * * sun", "Etc/UTC", "2026-11-22T00:00", ["2026-11-29T00:00", "2026-12-06T00:00"]),
    ],
)
def test_a_schedule_is_due_when_its_fields_hold_in_its_zone(
    cron: str, zone: str, after: str, due: list[str]
) -> None:
    moment = datetime.fromisoformat(after).replace(tzinfo=UTC)
    found = next_times(cron, zone, moment, count=2)
    assert [f"{item.astimezone(UTC):%Y-%m-%dT%H:%M}" for item in found] == due
