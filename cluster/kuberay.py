"""Runs as RayJobs: made beside what they need, seen through the operator's status, stopped in good order.

The operator makes a Ray cluster for every attempt of a RayJob and takes it down afterwards; how a run is
doing is read off the RayJob's status alone. A run is stopped by asking its Ray job to end, from within the
head's pod, because the operator itself ends pods without asking: only so can trainings save. There the
cluster's token is at hand, and no policy of the network is in the way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.kubernetes_api import Kubernetes, Object
from cluster.kubernetes_errors import KubernetesError
from cluster.pod_logs import RunLogs
from cluster.ray_job_status import CONTENT, run_of
from cluster.submission import Run, SubmissionError, Tell, ended

INSTANCE = "app.kubernetes.io/instance"
CRON = "ray.io/cronjob-name"
# Made by other commands, or by the operator.
_NOT_FOR_RUNS = frozenset({"RayJob", "RayCluster", "RayCronJob", "CronJob"})


@dataclass(slots=True, kw_only=True)
class KubeRay:
    """One stream's runs in a namespace.

    Args:
        kubernetes: the namespace.
        name: of the stream's objects, which labels carry.
        job: the RayJob of a run, but for its name; None where nothing is going to be started.
        manifests: all that is rendered, of which a run needs a part.
        force: take over fields that others have changed.
    """

    kubernetes: Kubernetes
    name: str
    job: Object | None = None
    manifests: Sequence[Object] = ()
    force: bool = False

    @property
    def where(self) -> str:
        return f"{self.kubernetes.host}, namespace {self.kubernetes.namespace}"

    def runs(self) -> list[Run]:
        mine = self.kubernetes.select("RayJob", f"{INSTANCE}={self.name}")
        # What a RayCronJob makes carries no label but this.
        scheduled = self.kubernetes.select("RayJob", f"{CRON}={self.name}")
        found = {job["metadata"]["name"]: job for job in (*scheduled, *mine)}
        return sorted(map(run_of, found.values()), key=_age)

    def start(self, name: str, digest: str, tell: Tell) -> Run:
        assert self.job is not None
        job = copy.deepcopy(self.job)
        job["metadata"]["name"] = name
        job["metadata"].setdefault("labels", {}).update({INSTANCE: self.name, CONTENT: digest})
        # Asked first, so that a RayJob which would be refused leaves nothing behind.
        if self._created(job, dry=True):
            base = [item for item in self.manifests if item["kind"] not in _NOT_FOR_RUNS]
            apply_all(self.kubernetes, base, force=self.force, tell=tell)
            if self._created(job):
                return self.find(name)
        tell(f"run {name} was submitted by somebody else just now")
        return self.find(name)

    def find(self, name: str) -> Run:
        return run_of(self._job(name))

    def logs(self, run: Run, *, follow: bool, tell: Tell) -> Iterator[str]:
        yield from RunLogs(kubernetes=self.kubernetes, name=run.name, tell=tell).lines(
            follow=follow
        )

    def stop(self, run: Run, *, now: bool, tell: Tell) -> Run:
        job = self._job(run.name)
        status = job.get("status") or {}
        if now or status.get("jobStatus") not in ("PENDING", "RUNNING"):
            return self._remove(run, now=now, tell=tell)
        self._ask_to_end(job, status)
        tell(f"run {run.name} was asked to end; its trainings save what they have")
        for found in self.kubernetes.watch("RayJob", run.name, every=10.0):
            if found is None:
                return ended(run, "stopped", None, "its RayJob was deleted")
            if (current := run_of(found)).over:
                return current
        raise AssertionError("a watch ends with what it watches")

    def _created(self, job: Object, *, dry: bool = False) -> bool:
        try:
            self.kubernetes.create(job, dry=dry)
        except KubernetesError as error:
            if error.status != 409:
                raise
            return False
        return True

    def _remove(self, run: Run, *, now: bool, tell: Tell) -> Run:
        """Delete a RayJob, and wait until nothing of it is left."""
        self.kubernetes.delete("RayJob", run.name, propagation="Foreground")
        lost = "; trainings go on from their last checkpoint" if now else ""
        tell(f"run {run.name} is being removed with its pods{lost}")
        for found in self.kubernetes.watch("RayJob", run.name, every=10.0):
            if found is None:
                break
        return ended(run, "stopped", None, "removed" if now else "removed before it ran")

    def _ask_to_end(self, job: Object, status: Object) -> None:
        cluster, job_id = status.get("rayClusterName", ""), status.get("jobId", "")
        heads = self.kubernetes.select("Pod", f"ray.io/cluster={cluster},ray.io/node-type=head")
        if not heads:
            raise _cannot_ask(job, f"the head's pod of RayCluster {cluster} is not there")
        port = str(status.get("dashboardURL", "")).rpartition(":")[2] or "8265"
        # The operator sets RAY_ADDRESS for the container, and this one wins over it.
        dashboard = f"RAY_API_SERVER_ADDRESS=http://127.0.0.1:{port}"
        try:
            code, text = self.kubernetes.execute(
                heads[-1]["metadata"]["name"],
                heads[-1]["spec"]["containers"][0]["name"],
                ("env", dashboard, "ray", "job", "stop", "--no-wait", job_id),
            )
        except KubernetesError as error:
            raise _cannot_ask(job, str(error)) from error
        if code:
            raise _cannot_ask(job, text.strip()[-200:])

    def _job(self, name: str) -> Object:
        found = self.kubernetes.get("RayJob", name)
        if found is None:
            raise SubmissionError(
                f"RayJob {name} is not in {self.where}: it was deleted, by hand or by a deletion rule"
            )
        return found


def apply_all(
    kubernetes: Kubernetes, manifests: Sequence[Object], *, force: bool, tell: Tell
) -> None:
    """Apply manifests in their order, and say what was changed."""
    changed = []
    for manifest in manifests:
        if kubernetes.apply(manifest, force=force) == "applied":
            changed.append(f"{manifest['kind']} {manifest['metadata']['name']}")
    if changed:
        tell(f"applied: {', '.join(changed)}")


def _age(run: Run) -> tuple[bool, str]:
    return (run.submitted is not None, run.submitted.isoformat() if run.submitted else "")


def _cannot_ask(job: Object, why: str) -> SubmissionError:
    name = job["metadata"]["name"]
    return SubmissionError(
        f"run {name} could not be asked to end, so it still runs: {why}. Asking takes the right to create "
        "pods/exec; with --now its pods are ended without being asked, and trainings go on from their last "
        "checkpoint"
    )
