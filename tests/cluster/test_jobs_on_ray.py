"""`seekr cluster --address` against a real Ray cluster with token authentication, in processes of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from ray.job_submission import JobSubmissionClient

from cluster.jobs_api import RayJobs
from cluster.opening import Target, open_submission
from pipelines.continual_config import HELD_BACK_LINE
from tests.cluster.ray_head import RayHead, ray_head
from tests.cluster.submitting import Told, seekr_cluster, until
from tests.pipelines.running import newest_checkpoint
from tests.pipelines.streams import make_stream

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(cpus=12) as found:
        yield found


class Caller:
    """Somebody who has the token's file, and a stream whose rows and model travel with it.

    Each has a name of its own: the head knows the runs of all of them.
    """

    _numbers = count(1)

    def __init__(self, head: RayHead, folder: Path, **changes: Any) -> None:
        self.head, self.store = head, folder / "store"
        name = f"stream-{next(self._numbers)}"
        self.stream = make_stream(folder, tasks=1, method={"name": "seqft"}, name=name, **changes)

    def __call__(self, command: str, *words: str) -> Told:
        return seekr_cluster(command, self.stream, *words, "--address", self.head.address)


@pytest.fixture
def environment(
    head: RayHead, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> pytest.MonkeyPatch:
    """What a shell has that may use the cluster, and an address of another one."""
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_path))
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    return monkeypatch


@pytest.fixture
def caller(head: RayHead, environment: pytest.MonkeyPatch, tmp_path: Path) -> Caller:
    return Caller(head, tmp_path)


def client(head: RayHead) -> JobSubmissionClient:
    return JobSubmissionClient(head.address, headers={"Authorization": f"Bearer {head.token}"})


def test_a_stream_is_learnt_on_the_cluster_and_everything_is_told(
    head: RayHead, caller: Caller, environment: pytest.MonkeyPatch
) -> None:
    told = caller("submit", "--wait")
    assert told.code == 0, told.out + told.err
    assert list(caller.store.glob("train/upper/*/record.json"))
    assert "report: " in told.out
    assert told.lines[-1].endswith("is done")

    again = caller("submit")
    assert "nothing was submitted. --again" in again.out
    (run,) = json.loads(caller("status", "--json").out)["runs"]
    assert (run["state"], run["exit_code"]) == ("done", 0)
    assert len(run["name"]) <= 47
    assert run["name"] in caller("status").out
    assert "report: " in caller("logs").out
    assert "no run of this stream is under way" in caller("cancel").out

    environment.delenv("RAY_ADDRESS")
    job = client(head).get_job_info(run["name"])
    assert head.token not in job.model_dump_json()
    assert set(job.runtime_env or {}) >= {"working_dir", "py_modules", "env_vars"}


def test_a_run_that_fails_gives_its_own_exit_code(
    head: RayHead, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caller = Caller(head, tmp_path, model={"path": "/nowhere/model"})
    told = caller("submit", "--wait")
    assert told.code == 2
    assert "the cluster must have /nowhere/model" in told.out
    assert "error: " in told.out
    assert "failed (exit code 2)" in told.lines[-1]
    assert "failed (2)" in caller("status").out


def test_a_run_whose_model_is_held_back_is_done_with_code_3(
    head: RayHead, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caller = Caller(head, tmp_path, gate={"min_new_score": 1.0})
    ending = "is done (exit code 3): the gate has held the newest model back"
    told = caller("submit", "--wait")
    assert told.code == 3, told.out + told.err
    assert told.lines[-1].endswith(ending)
    assert HELD_BACK_LINE not in told.lines
    again = caller("submit", "--wait")
    assert (again.code, "nothing was submitted. --again" in again.out) == (3, True)
    (run,) = json.loads(caller("status", "--json").out)["runs"]
    assert (run["state"], run["exit_code"]) == ("done", 3)
    assert run["reason"] == "the gate has held the newest model back"
    assert "failed" not in caller("status").out


def test_a_run_that_is_cancelled_saves_and_the_next_goes_on(
    head: RayHead, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caller = Caller(head, tmp_path, train={"epochs": 4000, "checkpoint_every": 5})
    assert caller("submit").code == 0
    until(lambda: newest_checkpoint(caller.store) > 0)
    running = caller("submit", "--again")
    assert "is running already; nothing was submitted" in running.out
    assert "train/upper" in caller("logs").out
    refused = caller("cancel", "--now")
    assert (refused.code, "leave --now out" in refused.err) == (2, True)
    told = caller("cancel")
    assert told.code == 0, told.err
    assert "stopped by SIGTERM" in told.out
    assert "was stopped (exit code 143)" in told.out
    saved = newest_checkpoint(caller.store)
    assert not list(caller.store.glob("train/upper/*/record.json"))
    assert caller("submit").code == 0
    until(lambda: newest_checkpoint(caller.store) > saved)
    assert caller("cancel").code == 0
    runs = json.loads(caller("status", "--json").out)["runs"]
    assert [run["state"] for run in runs] == ["stopped", "stopped"]
    assert [run["name"][-2:] for run in runs] == ["-1", "-2"]


def test_two_people_who_submit_at_once_start_one_run(
    head: RayHead, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = make_stream(
        tmp_path, tasks=1, method={"name": "seqft"}, model={"path": "/nowhere/model"}
    )
    told: list[str] = []
    opened = open_submission(path, (), Target(address=head.address), tell=told.append)
    runs = [opened.backend.start("twice-abc-1", "abc", told.append) for _ in range(2)]
    assert runs[0].name == runs[1].name == "twice-abc-1"
    assert any("by somebody else just now" in text for text in told)


def test_a_token_that_is_wrong_or_missing_is_told_and_not_shown(
    head: RayHead, caller: Caller, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("RAY_AUTH_TOKEN", "of-another-cluster")
    told = caller("submit")
    assert told.code == 1
    assert "refuses the token that was found" in told.err
    assert "of-another-cluster" not in told.err
    environment.delenv("RAY_AUTH_TOKEN")
    environment.delenv("RAY_AUTH_TOKEN_PATH")
    told = caller("status")
    assert told.code == 1
    assert "asks for Ray's token, and none was found" in told.err


def test_a_run_that_is_not_there_is_told(head: RayHead, caller: Caller) -> None:
    told = caller("logs", "--run", "other-abc-1")
    assert told.code == 1
    jobs = RayJobs(address=head.address, stream="small", token=SecretStr(head.token))
    with pytest.raises(Exception, match="other-abc-1 does not exist"):
        jobs.find("other-abc-1")
