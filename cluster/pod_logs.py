"""What a RayJob prints, from the pods that hear it: every attempt in turn, through cuts of the connection.

Who hears a run depends on how it is submitted: a small pod beside the cluster, a container in the head's
pod, or nobody but Ray itself. Each line carries the time at which it was written, by which a log that was
cut is taken up again where it ended, without a line lost or told twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.kubernetes_api import Kubernetes, Object
from cluster.kubernetes_errors import KubernetesError
from cluster.ray_job_status import run_of
from cluster.submission import SubmissionError, Tell

SUBMITTER = "ray-job-submitter"
_STAMP = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ?(.*)", re.DOTALL
)
_NOT_HEARD = "no pod is left that has the log of run {}"
_SILENT = (
    "in HTTPMode no pod prints a run's log; forward the dashboard's port and use --address, or set "
    "cluster.job.submission to K8sJobMode"
)
_PAUSE = 1.0


@dataclass(slots=True, kw_only=True)
class RunLogs:
    """The log of one RayJob.

    Args:
        kubernetes: the namespace.
        name: of the RayJob.
        tell: takes what happens around it.
    """

    kubernetes: Kubernetes
    name: str
    tell: Tell
    _heard: set[str] = field(default_factory=set)
    _told: str = ""

    def lines(self, *, follow: bool) -> Iterator[str]:
        """Yield what was printed, with line ends; followed, until the RayJob is over.

        Raises:
            SubmissionError: nobody has heard it.
        """
        for job in self.kubernetes.watch("RayJob", self.name, every=3.0):
            if job is None:
                raise SubmissionError(
                    f"RayJob {self.name} is gone from namespace {self.kubernetes.namespace}: it was "
                    "deleted, by hand or by a deletion rule, and its log with it"
                )
            over, silent = run_of(job).over, job["spec"].get("submissionMode") == "HTTPMode"
            if follow and not over:
                self._tell_state(job)
            for pod in () if silent else self._pods(job):
                yield from self._pod(pod, follow=follow and not over)
            if over or not follow:
                if not self._heard:
                    self.tell(_SILENT if silent else _NOT_HEARD.format(self.name))
                return

    def _tell_state(self, job: Object) -> None:
        run = run_of(job)
        tries = f" (attempt {run.attempt} of {run.attempts})" if run.attempts > 1 else ""
        said = f"run {self.name} is {run.state}{tries}"
        if run.reason:
            said += f": {run.reason}"
        if said != self._told:
            self.tell(said)
            self._told = said

    def _pods(self, job: Object) -> list[Object]:
        """Those that have begun to hear the run and were not listened to yet, oldest first."""
        status = job.get("status") or {}
        if job["spec"].get("submissionMode") == "SidecarMode":
            cluster = status.get("rayClusterName", "")
            selector = f"ray.io/cluster={cluster},ray.io/node-type=head"
        else:
            selector = f"batch.kubernetes.io/job-name={self.name}"
        pods = self.kubernetes.select("Pod", selector)
        return [pod for pod in pods if pod["metadata"]["uid"] not in self._heard and _begun(pod)]

    def _pod(self, pod: Object, *, follow: bool) -> Iterator[str]:
        name, place, lost = pod["metadata"]["name"], _Place(), 0.0
        path = f"/api/v1/namespaces/{self.kubernetes.namespace}/pods/{name}/log"
        query: dict[str, Any] = {"container": SUBMITTER, "timestamps": "true"}
        if follow:
            query["follow"] = "true"
        current: Object | None = pod
        while current is not None:
            # What ends after its program has ended is complete; anything else was cut.
            complete = not follow or _terminated(current)
            try:
                for line in self.kubernetes.stream(path, query | place.query()):
                    lost = 0.0
                    if (text := place.take(line)) is not None:
                        yield f"{text}\n"
                if complete:
                    break
                current = self.kubernetes.get("Pod", name)
            except KubernetesError as error:
                if error.status == 404:  # deleted while it was listened to
                    break
                lost = lost or time.monotonic()
                away = time.monotonic() - lost > self.kubernetes.patience
                if error.status not in (0, 500, 502, 503, 504) or away:
                    raise
            time.sleep(_PAUSE)
        self._heard.add(pod["metadata"]["uid"])


@dataclass(slots=True)
class _Place:
    """How far a log has been told: the time of its last line, and how many lines had that time."""

    stamp: str = ""
    zone: str = ""
    count: int = 0
    _repeated: int = 0

    def query(self) -> dict[str, str]:
        """Return what asks for the rest; whole seconds, so that lines come twice."""
        self._repeated = 0
        return {"sinceTime": f"{self.stamp[:19]}{self.zone}"} if self.stamp else {}

    def take(self, line: str) -> str | None:
        """Return a line's text, None if it was told before."""
        found = _STAMP.fullmatch(line)
        if found is None:
            return line
        stamp = f"{found[1]}.{found[2] or '':0<9}"
        if stamp < self.stamp:
            return None
        if stamp == self.stamp:
            self._repeated += 1
            if self._repeated <= self.count:
                return None
            self.count += 1
        else:
            self.stamp, self.zone, self.count, self._repeated = stamp, found[3], 1, 1
        return found[4]


def _status(pod: Object) -> Object:
    for status in (pod.get("status") or {}).get("containerStatuses") or ():
        if status.get("name") == SUBMITTER:
            return status.get("state") or {}
    return {}


def _begun(pod: Object) -> bool:
    return bool({"running", "terminated"} & set(_status(pod)))


def _terminated(pod: Object) -> bool:
    return "terminated" in _status(pod)
