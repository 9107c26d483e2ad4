"""A RayJob as a run: what the operator's two statuses, its counters and its message mean.

`jobDeploymentStatus` is the operator's own state, `jobStatus` that of the Ray job of the newest attempt.
`Failed` is the end only because the operator says `Retrying` in the same breath where it tries again.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from cluster.kubernetes_api import Object
from cluster.submission import Run, State, ended

CONTENT = "seekr/content"
"""The label with the digest of what was submitted."""
_EXIT_CODE = re.compile(r"failed with exit code (-?\d+)")
_STATES: dict[str, State] = {
    "": "waiting",
    "Initializing": "waiting",
    "Waiting": "waiting",
    "Running": "running",
    "Retrying": "retrying",
    "Suspending": "suspended",
    "Suspended": "suspended",
    "Complete": "done",
    "Failed": "failed",
    "ValidationFailed": "failed",
}
_OUTCOMES: dict[str, State] = {"SUCCEEDED": "done", "STOPPED": "stopped", "FAILED": "failed"}


def run_of(job: Object) -> Run:
    """Return a RayJob as a run."""
    metadata, spec, status = job["metadata"], job.get("spec") or {}, job.get("status") or {}
    deployment, outcome = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    state = _STATES.get(deployment, "waiting")
    if state == "done":
        state = _OUTCOMES.get(outcome, "done")
    elif state == "running" and outcome in ("", "PENDING"):
        state = "waiting"
    elif state == "waiting" and spec.get("suspend"):
        state = "suspended"
    message = str(status.get("message", ""))
    failed, over = int(status.get("failed") or 0), state in ("done", "failed", "stopped")
    code = _EXIT_CODE.search(message)
    run = Run(
        name=metadata["name"],
        digest=(metadata.get("labels") or {}).get(CONTENT, ""),
        state=state,
        attempt=max(1, failed if state == "failed" else failed + 1),
        attempts=int(spec.get("backoffLimit") or 0) + 1,
        submitted=_moment(metadata.get("creationTimestamp")),
        started=_moment(status.get("startTime")),
        ended=_moment(status.get("endTime")) if over else None,
        cluster=status.get("rayClusterName", ""),
        reason=_reason(state, spec, status),
    )
    if not over:
        return run
    return ended(run, state, int(code[1]) if code else None, run.reason)


def _reason(state: State, spec: Object, status: Object) -> str:
    """Why a run is where it is, in a line."""
    # Behind the first sentence Ray quotes the end of the log.
    message = str(status.get("message", "")).partition(", last available logs")[0].strip()
    if state == "failed":
        return ": ".join(filter(None, (status.get("reason", ""), message)))
    if state == "suspended":
        return "it waits to be admitted, as by Kueue" if spec.get("suspend") else ""
    if state == "waiting":
        cluster = (status.get("rayClusterStatus") or {}).get("reason") or ""
        return cluster or message or "its Ray cluster is not ready"
    return ""


def _moment(text: Any) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
