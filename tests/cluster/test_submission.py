"""Names, digests and exit codes of runs."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ray_job_status import run_of
from cluster.submission import MAX_NAME, Run, State, digest_of, number_of, run_name

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
