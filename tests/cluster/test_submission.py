"""Names, digests and exit codes of runs."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobDetails, JobStatus, JobType

from cluster import jobs_api
from cluster.ray_job_status import run_of
from cluster.submission import (
    HELD_BACK_REASON,
    MAX_NAME,
    Run,
    State,
    digest_of,
    ending,
    number_of,
    run_name,
)

NAMES = st.from_regex(r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?", fullmatch=True)
VALUES = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5)


@given(NAMES, VALUES, st.integers(1, 10_000))
def test_a_runs_name_is_a_short_dns_label_that_ends_with_its_number(
    base: str, content: dict[str, object], number: int
) -> None:
    name = run_name(base, digest_of(content), number)
    assert len(name) <= MAX_NAME
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert number_of(name) == number


@given(VALUES, VALUES)
def test_a_digest_tells_contents_apart_and_not_their_order(
    one: dict[str, object], other: dict[str, object]
) -> None:
    assert digest_of(dict(reversed(one.items()))) == digest_of(one)
    assert (digest_of(one) == digest_of(other)) == (one == other)


@pytest.mark.parametrize(
    ("state", "exit_code", "code"),
    [
        ("done", 0, 0),
        ("done", None, 0),
        ("done", 3, 3),
        ("failed", 1, 1),
        ("failed", 2, 2),
        ("failed", None, 1),
        ("failed", -9, 137),
        ("stopped", None, 143),
        ("stopped", 130, 130),
        ("stopped", 143, 143),
    ],
)
def test_a_run_gives_the_exit_code_of_what_ran(
    state: State, exit_code: int | None, code: int
) -> None:
    assert Run(name="a", digest="", state=state, exit_code=exit_code).code == code


@pytest.mark.parametrize(
    ("deployment", "job", "more", "state"),
    [
        (None, None, {}, "waiting"),
        ("Initializing", None, {}, "waiting"),
        ("Running", "PENDING", {}, "waiting"),
        ("Running", "RUNNING", {}, "running"),
        ("Running", "SUCCEEDED", {}, "running"),
        ("Retrying", "FAILED", {"failed": 1}, "retrying"),
        ("Suspending", "RUNNING", {}, "suspended"),
        ("Suspended", None, {}, "suspended"),
        ("Complete", "SUCCEEDED", {}, "done"),
        ("Complete", "STOPPED", {}, "stopped"),
        ("Failed", "FAILED", {"failed": 3}, "failed"),
        ("Failed", "RUNNING", {"failed": 1, "reason": "DeadlineExceeded"}, "failed"),
        ("ValidationFailed", None, {"reason": "ValidationFailed", "message": "too long"}, "failed"),
        (
            *("Failed", "FAILED"),
            {"failed": 1, "message": "Job entrypoint command failed with exit code 143, last"},
            "stopped",
        ),
        (
            *("Failed", "FAILED"),
            {"failed": 3, "message": "Job entrypoint command failed with exit code 3, last"},
            "done",
        ),
    ],
)
def test_the_operators_words_become_one_state(
    deployment: str | None, job: str | None, more: dict[str, object], state: State
) -> None:
    status = {"jobDeploymentStatus": deployment, "jobStatus": job} | more
    found = {key: value for key, value in status.items() if value is not None}
    run = run_of({"metadata": {"name": "a"}, "spec": {"backoffLimit": 2}, "status": found})
    assert run.state == state
    assert run.over == (state in ("done", "failed", "stopped"))
    assert run.attempts == 3
    assert run.attempt == (
        3 if more.get("failed") == 3 else 2 if state == "retrying" else run.attempt
    )


@pytest.mark.parametrize(
    ("status", "exit_code", "state", "code"),
    [
        ("PENDING", None, "waiting", None),
        ("RUNNING", None, "running", None),
        ("SUCCEEDED", 0, "done", 0),
        ("FAILED", 3, "done", 3),
        ("FAILED", 2, "failed", 2),
        ("FAILED", None, "failed", None),
        ("FAILED", 143, "stopped", 143),
        ("STOPPED", None, "stopped", None),
    ],
)
def test_the_words_of_rays_jobs_api_become_one_state(
    status: str, exit_code: int | None, state: State, code: int | None
) -> None:
    job = JobDetails(
        type=JobType.SUBMISSION,
        submission_id="small-abc-1",
        status=JobStatus(status),
        entrypoint="true",
        message="Job entrypoint command failed with exit code 3, last available logs (truncated)",
        driver_exit_code=exit_code,
    )
    run = jobs_api.run_of(job)
    assert (run.state, run.exit_code) == (state, code)
    assert (run.reason == HELD_BACK_REASON) == (code == 3)


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (Run(name="a", digest="", state="done"), "run a is done"),
        (
            Run(name="a", digest="", state="done", exit_code=3, reason=HELD_BACK_REASON),
            "run a is done (exit code 3): the gate has held the newest model back",
        ),
        (
            Run(
                name="a", digest="", state="failed", exit_code=2, attempt=2, attempts=2, reason="so"
            ),
            "run a failed in attempt 2 of 2 (exit code 2): so",
        ),
    ],
)
def test_an_ending_says_what_the_exit_code_means(run: Run, text: str) -> None:
    assert ending(run) == text
