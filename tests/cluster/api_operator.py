"""Who plays KubeRay behind a stand-in API server: takes RayJobs through their states, as the operator does.

What the attempts of the next RayJobs do is laid down by a test: lines that are printed, an exit code, and
whether an attempt holds until it is released or stopped. Statuses, messages, retries, names and labels are
those of KubeRay 1.7; only the waiting is shorter.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pipelines.continual_config import HELD_BACK, HELD_BACK_LINE
from tests.cluster.api_store import Object, Refused, Store, now

FINALIZER = "ray.io/rayjob-finalizer"
SUBMITTER = "ray-job-submitter"
DASHBOARD = "RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"
_TICK = 0.05


@dataclass(slots=True, kw_only=True)
class Attempt:
    """What one attempt of a RayJob does.

    Attributes:
        lines: printed one after the other.
        exit_code: of the entrypoint.
        hold: stay running after the lines until released or stopped.
        reason: what the operator itself fails it for, such as DeadlineExceeded.
        held_back: end as `seekr` does when the gate has held the newest model back.
    """

    lines: tuple[str, ...] = ("working",)
    exit_code: int = 0
    hold: bool = False
    reason: str = ""
    held_back: bool = False

    def of(self, entrypoint: str) -> Attempt:
        """Return what it comes to with the options of an entrypoint."""
        if not self.held_back:
            return self
        if "--held-back-ok" in entrypoint.split():
            return replace(self, lines=(*self.lines, HELD_BACK_LINE))
        return replace(self, exit_code=HELD_BACK)


@dataclass(slots=True)
class PodLog:
    """What a pod has printed; each line with its time in nanoseconds."""

    lines: list[tuple[int, str]] = field(default_factory=list)
    closed: bool = False
    cuts: int = 0


@dataclass(slots=True)
class Operator:
    """The RayJobs of a store, each played by a thread of its own."""

    store: Store
    plan: list[Attempt] = field(default_factory=list)
    logs: dict[str, PodLog] = field(default_factory=dict)
    released: threading.Event = field(default_factory=threading.Event)
    stopped: set[str] = field(default_factory=set)
    unreachable: bool = False

    def begin(self, job: Object) -> None:
        threading.Thread(target=self._play, args=(job["metadata"]["name"],), daemon=True).start()

    def execute(self, pod: str, container: str, command: Sequence[str]) -> tuple[int, str]:
        """What `ray job stop` in a head's pod answers; nothing else is known there."""
        (head,) = self.store.select("Pod", {"ray.io/node-type": "head"}, pod)
        assert container == head["spec"]["containers"][0]["name"]
        *words, job_id = command
        assert words == ["env", DASHBOARD, "ray", "job", "stop", "--no-wait"], words
        jobs = [job.get("status", {}).get("jobId") for job in self.store.select("RayJob", {})]
        if self.unreachable or job_id not in jobs:
            return (
                1,
                f"RuntimeError: Request failed with status code 404: Job {job_id} does not exist.",
            )
        self.stopped.add(job_id)
        return 0, f"Attempting to stop job '{job_id}'\n"

    def _play(self, name: str) -> None:
        with contextlib.suppress(Refused):  # deleted meanwhile
            self._until_over(name)

    def _until_over(self, name: str) -> None:
        job = self.store.get("RayJob", name)
        job["metadata"]["finalizers"] = [FINALIZER]
        self.store.merge("RayJob", name, {"metadata": job["metadata"]}, "kuberay")
        failed, limit = 0, int(job["spec"].get("backoffLimit", 0))
        while True:
            if not self._admitted(name):
                return
            outcome, reason = self._attempt(name)
            if outcome is None:
                return
            failed += outcome == "FAILED"
            last = outcome != "FAILED" or failed > limit or reason == "DeadlineExceeded"
            ending = "Failed" if outcome == "FAILED" else "Complete"
            self.store.set_status(
                "RayJob",
                name,
                failed=failed,
                succeeded=int(outcome == "SUCCEEDED"),
                jobDeploymentStatus=ending if last else "Retrying",
                endTime=now() if last else None,
            )
            if last:
                self._await_deletion(name)
                return
            self._take_down(name)
            gone = ("jobId", "rayClusterName", "dashboardURL", "message", "reason", "jobStatus")
            self.store.set_status(
                "RayJob", name, jobDeploymentStatus=None, **dict.fromkeys(gone, None)
            )

    def _admitted(self, name: str) -> bool:
        """Wait while the job is suspended, as under Kueue; returns whether it still exists."""
        while self.store.get("RayJob", name)["spec"].get("suspend"):
            if self._deleted(name):
                return False
            self.store.set_status("RayJob", name, jobDeploymentStatus="Suspended")
            time.sleep(_TICK)
        return not self._deleted(name)

    def _attempt(self, name: str) -> tuple[str | None, str]:
        todo = self.plan.pop(0) if self.plan else Attempt()
        todo = todo.of(self.store.get("RayJob", name)["spec"]["entrypoint"])
        cluster, job_id = f"{name}-{secrets.token_hex(3)[:5]}", f"{name}-{secrets.token_hex(3)[:5]}"
        self.store.set_status(
            "RayJob",
            name,
            jobDeploymentStatus="Initializing",
            jobId=job_id,
            rayClusterName=cluster,
            startTime=now(),
        )
        time.sleep(_TICK)
        if todo.reason:
            message = f"The RayJob has passed its deadline: {todo.reason}"
            self.store.set_status("RayJob", name, reason=todo.reason, message=message)
            return "FAILED", todo.reason
        url = f"{cluster}-head-svc.{self.store.namespace}.svc.cluster.local:8265"
        self.store.set_status(
            "RayJob", name, jobDeploymentStatus="Running", dashboardURL=url, jobStatus="PENDING"
        )
        pod = self._make_pods(name, cluster)
        time.sleep(_TICK)
        self.store.set_status("RayJob", name, jobStatus="RUNNING")
        outcome = self._run(name, pod, job_id, todo)
        if outcome is not None:
            self._print(pod, f"Job '{job_id}' {outcome.lower()}")  # the submitter's own last word
            self._end_pod(pod, 0 if outcome != "FAILED" else 1)
            self.store.set_status(
                "RayJob", name, jobStatus=outcome, message=_message(outcome, todo)
            )
            if outcome == "FAILED":
                self.store.set_status("RayJob", name, reason="AppFailed")
        return outcome, ""

    def _run(self, name: str, pod: str, job_id: str, todo: Attempt) -> str | None:
        for line in todo.lines:
            self._print(pod, line)
            time.sleep(_TICK)
        while todo.hold and not self.released.is_set():
            if job_id in self.stopped:
                self._print(
                    pod, "stopped by SIGTERM: train/upper saved step 12. Run the same command again"
                )
                return "STOPPED"
            if self._deleted(name):
                self._take_down(name)
                return None
            time.sleep(_TICK)
        return "SUCCEEDED" if todo.exit_code == 0 else "FAILED"

    def _deleted(self, name: str) -> bool:
        """Let go of a job that is to be deleted; returns whether it was."""
        try:
            job = self.store.get("RayJob", name)
        except Refused:
            return True
        if "deletionTimestamp" not in job["metadata"]:
            return False
        self._take_down(name)
        self.store.remove("RayJob", name)
        return True

    def _await_deletion(self, name: str) -> None:
        while not self._deleted(name):
            time.sleep(_TICK * 4)

    def _make_pods(self, name: str, cluster: str) -> str:
        """Make the head's pod, and the submitter's unless it is in there; returns who prints."""
        spec = self.store.get("RayJob", name)["spec"]
        template = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        head, pod = f"{cluster}-head", f"{name}-{secrets.token_hex(3)[:5]}"
        sidecar = spec.get("submissionMode") == "SidecarMode"
        names = [template["containers"][0]["name"], *[SUBMITTER] * sidecar]
        self._make_pod(head, {"ray.io/cluster": cluster, "ray.io/node-type": "head"}, names)
        if sidecar:
            return head
        self._make_pod(pod, {"batch.kubernetes.io/job-name": name}, [SUBMITTER])
        return pod

    def _make_pod(self, name: str, labels: Mapping[str, str], containers: Sequence[str]) -> None:
        self.logs[name] = PodLog()
        running = [{"name": item, "state": {"running": {}}} for item in containers]
        self.store.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": dict(labels)},
                "spec": {"containers": [{"name": item} for item in containers]},
                "status": {"containerStatuses": running},
            },
            "kuberay",
        )

    def _end_pod(self, pod: str, code: int) -> None:
        state = {"terminated": {"exitCode": code}}
        self.logs[pod].closed = True
        self.store.set_status("Pod", pod, containerStatuses=[{"name": SUBMITTER, "state": state}])

    def _take_down(self, name: str) -> None:
        status = self.store.get("RayJob", name).get("status", {})
        cluster = status.get("rayClusterName", "")
        for labels in ({"batch.kubernetes.io/job-name": name}, {"ray.io/cluster": cluster}):
            for pod in self.store.select("Pod", labels):
                self.logs[pod["metadata"]["name"]].closed = True
                self.store.remove("Pod", pod["metadata"]["name"])

    def _print(self, pod: str, line: str) -> None:
        with self.store.changed:
            self.logs[pod].lines.append((time.time_ns(), line))
            self.store.changed.notify_all()


def make_secret(store: Store, name: str, token: str) -> None:
    """Keep a token as the operator does."""
    data = {"auth_token": base64.b64encode(token.encode()).decode()}
    manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}
    store.create(manifest, "kuberay")


def stamp(nanoseconds: int) -> str:
    """Return a time as the kubelet writes it before a line."""
    whole, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def _message(outcome: str, todo: Attempt) -> str:
    if outcome == "SUCCEEDED":
        return "Job finished successfully."
    if outcome == "STOPPED":
        return "Job was intentionally stopped."
    tail = "\n".join(todo.lines[-10:])
    return (
        f"Job entrypoint command failed with exit code {todo.exit_code}, last available logs (truncated to "
        f"20,000 chars):\n{tail}"
    )


def attempts_of(values: list[dict[str, Any]]) -> list[Attempt]:
    """Return attempts from plain values."""
    return [
        Attempt(**(value | {"lines": tuple(value.get("lines", ("working",)))})) for value in values
    ]
