"""Runs on Kubernetes whose newest model the gate has held back: done, told, and not tried again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.continual_config import HELD_BACK_LINE
from tests.cluster.standing_in import ApiServerProcess, api_server
from tests.cluster.submitting import User, kube_stream, until

NOTE = "the gate has held the newest model back"
HELD_BACK = {"lines": ["learnt"], "held_back": True}


@pytest.fixture(scope="module")
def running_server() -> Iterator[ApiServerProcess]:
    with api_server() as server:
        yield server


@pytest.fixture
def server(running_server: ApiServerProcess) -> ApiServerProcess:
    running_server.ask("reset")
    running_server.ask("plan", [HELD_BACK])
    return running_server


@pytest.fixture
def user(server: ApiServerProcess, tmp_path: Path) -> User:
    return User(server, tmp_path)


def outcome(server: ApiServerProcess) -> tuple[str, str, int]:
    (job,) = server.objects("RayJob")
    status = job["status"]
    return status["jobDeploymentStatus"], status["jobStatus"], status["failed"]


@pytest.mark.parametrize("mode", ["K8sJobMode", "SidecarMode"])
def test_a_model_that_is_held_back_takes_one_attempt_and_returns_3(
    server: ApiServerProcess, user: User, tmp_path: Path, mode: str
) -> None:
    stream = kube_stream(tmp_path, gated=True, job={"submission": mode})
    told = user("submit", stream, "--wait")
    assert told.code == 3
    assert [line for line in told.lines if line in ("learnt", HELD_BACK_LINE)] == [
        "learnt",
        HELD_BACK_LINE,
    ]
    assert told.lines[-1].endswith(f"is done in attempt 1 of 3 (exit code 3): {NOTE}")
    assert outcome(server) == ("Complete", "SUCCEEDED", 0)


def test_a_run_that_is_over_returns_3_again_from_its_log(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    stream = kube_stream(tmp_path, gated=True)
    assert user("submit", stream).code == 0
    until(lambda: "done" in user("status", stream).out)
    told = user("submit", stream, "--wait", "--json")
    assert told.code == 3
    assert HELD_BACK_LINE in told.err.splitlines()
    run = json.loads(told.out)
    assert (run["state"], run["exit_code"], run["reason"]) == ("done", 3, NOTE)
    assert "nothing was submitted. --again" in told.err
    assert outcome(server) == ("Complete", "SUCCEEDED", 0)


def test_a_run_of_which_no_log_is_heard_is_done(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    stream = kube_stream(tmp_path, gated=True, job={"submission": "HTTPMode"})
    told = user("submit", stream, "--wait")
    assert (told.code, HELD_BACK_LINE in told.lines) == (0, False)
    assert told.lines[-1].endswith("is done in attempt 1 of 3")
    assert outcome(server) == ("Complete", "SUCCEEDED", 0)


def test_a_run_that_says_so_and_fails_then_has_failed(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    stream = kube_stream(tmp_path, gated=True, job={"retries": 0})
    server.ask("plan", [HELD_BACK | {"exit_code": 1}])
    told = user("submit", stream, "--wait")
    assert (told.code, HELD_BACK_LINE in told.lines) == (1, True)
    assert "failed (exit code 1)" in told.lines[-1]


def test_a_rayjob_that_ended_with_3_is_done_with_a_note_and_not_started_again(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    # Without a gate in the YAML the flag is not there, so the code stays what it is.
    stream = kube_stream(tmp_path, job={"retries": 0})
    first, again = user("submit", stream, "--wait"), user("submit", stream, "--wait")
    assert (first.code, again.code) == (3, 3)
    assert first.lines[-1].endswith(f"is done (exit code 3): {NOTE}")
    assert f"has done all of this ({NOTE}); nothing was submitted" in again.out
    assert outcome(server) == ("Failed", "FAILED", 1)
    (run,) = json.loads(user("status", stream, "--json").out)["runs"]
    assert (run["state"], run["exit_code"], run["reason"]) == ("done", 3, NOTE)
    shown = " ".join(user("status", stream).out.split())
    assert "done" in shown and "failed" not in shown
