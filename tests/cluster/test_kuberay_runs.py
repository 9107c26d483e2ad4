"""`seekr cluster` against a stand-in API server that validates what it gets and plays the operator."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.kuberay import KubeRay
from cluster.kubernetes_api import Kubernetes, connect
from cluster.kubernetes_errors import KubernetesError
from cluster.opening import Target, open_submission
from tests.cluster.crd_schemas import skip_without_schemas
from tests.cluster.standing_in import ApiServerProcess, api_server
from tests.cluster.submitting import User, kube_stream, until

HELD = {"lines": ["begun"], "hold": True}


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


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    return kube_stream(tmp_path)


def status(server: ApiServerProcess) -> dict[str, Any]:
    (job,) = server.objects("RayJob")
    return job.get("status", {})


def backend(server: ApiServerProcess, stream: Path, folder: Path) -> KubeRay:
    target = Target(kubeconfig=server.kubeconfig(folder))
    found = open_submission(stream, (), target, tell=str).backend
    assert isinstance(found, KubeRay)
    return found


def namespace(server: ApiServerProcess, folder: Path) -> Kubernetes:
    return connect(namespace="seekr", kubeconfig=server.kubeconfig(folder))


def job_manifest(name: str, **spec: Any) -> dict[str, Any]:
    pod = {"spec": {"containers": [{"name": "ray", "image": "ray:1"}]}}
    cluster = {"headGroupSpec": {"rayStartParams": {}, "template": pod}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {"entrypoint": "true", "rayClusterSpec": cluster} | spec,
    }


def test_the_server_validates_by_kuberays_own_schemas(
    server: ApiServerProcess, tmp_path: Path
) -> None:
    skip_without_schemas()
    kubernetes = namespace(server, tmp_path)
    for name, spec in (
        ("good", {}),
        ("typed", {"backoffLimit": "two"}),
        ("misspelt", {"backofLimit": 2}),
        ("far-too-long-a-name-for-what-the-operator-appends", {}),
    ):
        if name == "good":
            kubernetes.create(job_manifest(name, **spec), dry=True)
            continue
        with pytest.raises(KubernetesError, match=r"422.*nothing was written"):
            kubernetes.create(job_manifest(name, **spec))
    assert server.objects("RayJob") == []


def test_a_run_is_followed_to_its_end(server: ApiServerProcess, user: User, stream: Path) -> None:
    server.ask("plan", [{"lines": ["one", "[two] of 2", "three"]}])
    told = user("submit", stream, "--wait")
    assert told.code == 0
    printed = [line for line in told.lines if line in ("one", "[two] of 2", "three")]
    assert printed == ["one", "[two] of 2", "three"]
    assert told.lines[-1].endswith("is done in attempt 1 of 3")
    (job,) = server.objects("RayJob")
    assert len(job["metadata"]["name"]) <= 47
    assert job["metadata"]["labels"]["app.kubernetes.io/instance"] == "small"
    (config,) = server.objects("ConfigMap")
    assert "tasks:" in config["data"]["stream.yaml"]


def test_a_failed_run_gives_its_own_exit_code_after_all_its_attempts(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    stream = kube_stream(tmp_path, job={"retries": 1})
    server.ask(
        "plan", [{"lines": ["first"], "exit_code": 1}, {"lines": ["second"], "exit_code": 2}]
    )
    told = user("submit", stream, "--wait")
    assert told.code == 2
    assert [line for line in told.lines if line in ("first", "second")][-1] == "second"
    assert "failed in attempt 2 of 2 (exit code 2): AppFailed" in told.lines[-1]
    assert "last available logs" not in told.out
    assert status(server)["failed"] == 2


def test_a_run_that_a_retry_saved_is_done(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    server.ask("plan", [{"lines": ["first"], "exit_code": -9}, {"lines": ["second"]}])
    told = user("submit", stream, "--wait")
    assert told.code == 0
    assert "second" in told.lines
    assert told.lines[-1].endswith("is done in attempt 2 of 3")


def test_a_deadline_is_not_tried_again_and_is_told(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    server.ask("plan", [{"reason": "DeadlineExceeded"}])
    told = user("submit", stream, "--wait")
    assert told.code == 1
    assert "DeadlineExceeded" in told.lines[-1]
    assert status(server)["failed"] == 1


def test_submitting_twice_starts_one_run(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    server.ask("plan", [HELD])
    user("submit", stream)
    until(lambda: status(server).get("jobStatus") == "RUNNING")
    second, again = user("submit", stream), user("submit", stream, "--again")
    for told in (second, again):
        assert told.code == 0
        assert "is running already; nothing was submitted" in told.out
    assert len(server.objects("RayJob")) == 1


def test_what_is_done_is_run_again_only_when_asked(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    first = user("submit", stream, "--wait")
    assert "nothing was submitted. --again" in user("submit", stream, "--wait").out
    assert len(server.objects("RayJob")) == 1
    again = user("submit", stream, "--wait", "--again")
    assert (first.code, again.code) == (0, 0)
    names = [job["metadata"]["name"] for job in server.objects("RayJob")]
    assert [name[-2:] for name in names] == ["-1", "-2"]
    assert names[0][:-1] == names[1][:-1]


def test_a_failed_run_is_taken_up_by_submitting_again(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    stream = kube_stream(tmp_path, job={"retries": 0})
    server.ask("plan", [{"exit_code": 1}])
    assert [user("submit", stream, "--wait").code for _ in range(2)] == [1, 0]
    assert len(server.objects("RayJob")) == 2


def test_another_content_waits_for_the_run_under_way(
    server: ApiServerProcess, user: User, stream: Path, tmp_path: Path
) -> None:
    server.ask("plan", [HELD])
    user("submit", stream)
    (before,) = server.objects("ConfigMap")
    told = user("submit", kube_stream(tmp_path, tasks=2))
    assert told.code == 1
    assert "with other content of this stream, so nothing was submitted" in told.err
    assert server.objects("ConfigMap") == [before]
    assert len(server.objects("RayJob")) == 1


def test_two_people_who_submit_at_once_start_one_run(
    server: ApiServerProcess, stream: Path, tmp_path: Path
) -> None:
    one, other = backend(server, stream, tmp_path), backend(server, stream, tmp_path)
    told: list[str] = []
    runs = [item.start("small-abc-1", "abc", told.append) for item in (one, other)]
    assert runs[0].name == runs[1].name == "small-abc-1"
    assert any("by somebody else just now" in text for text in told)
    assert len(server.objects("RayJob")) == 1


def test_what_a_schedule_started_is_a_run_too(
    server: ApiServerProcess, user: User, stream: Path, tmp_path: Path
) -> None:
    server.ask("plan", [HELD])
    child = job_manifest("small-29400000")
    child["metadata"]["labels"] = {"ray.io/cronjob-name": "small"}
    namespace(server, tmp_path).create(child)
    told = user("submit", stream)
    assert told.code == 1
    assert "run small-29400000" in told.err
    assert "as a schedule has started it, so nothing was submitted; wait for it" in told.err
    assert "small-29400000" in user("status", stream).out


def test_an_unchanged_object_is_not_written_again(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    user("submit", stream, "--wait")
    written = len(server.requests("PATCH"))
    assert written == len(
        [item for item in server.ask("objects") if item["kind"] not in ("RayJob", "Pod")]
    )
    user("submit", stream, "--wait", "--again")
    assert len(server.requests("PATCH")) == written


def test_a_log_that_is_cut_is_taken_up_without_losing_or_repeating_a_line(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    lines = [f"line {number}" for number in range(60)]
    server.ask("plan", [{"lines": lines}])
    stop = threading.Event()

    def cut() -> None:
        while not stop.wait(0.7):
            server.ask("cut")

    cutting = threading.Thread(target=cut)
    cutting.start()
    try:
        told = user("submit", stream, "--wait")
    finally:
        stop.set()
        cutting.join()
    assert [line for line in told.lines if line.startswith("line ")] == lines
    assert sum("sinceTime" in item for item in server.requests("GET")) > 1


def test_a_watch_whose_beginning_was_forgotten_is_begun_anew(
    server: ApiServerProcess, stream: Path, tmp_path: Path
) -> None:
    kubernetes = namespace(server, tmp_path)
    server.ask("plan", [HELD])
    backend(server, stream, tmp_path).start("small-abc-1", "abc", str)
    until(lambda: status(server).get("jobStatus") == "RUNNING")
    seen = kubernetes.watch("RayJob", "small-abc-1", every=600)
    assert next(seen) is not None
    timer = threading.Timer(0.5, lambda: (server.ask("forget"), server.ask("release")))
    timer.start()
    found = next(
        item for item in seen if item and item["status"].get("jobDeploymentStatus") == "Complete"
    )
    assert found["status"]["jobStatus"] == "SUCCEEDED"


def test_an_api_server_that_is_away_for_a_while_is_outlasted(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    server.ask("plan", [HELD])
    for request in ("GET .*/rayjobs/", "GET .*watch=true"):
        server.ask("fail", {"request": request, "status": 500, "times": 2})
    threading.Timer(3, lambda: server.ask("release")).start()
    told = user("submit", stream, "--wait")
    assert told.code == 0
    assert told.lines.count("begun") == 1


def test_an_api_server_that_stays_away_is_told(
    server: ApiServerProcess, stream: Path, tmp_path: Path
) -> None:
    found = backend(server, stream, tmp_path)
    server.ask("plan", [HELD])
    run = found.start("small-abc-1", "abc", str)
    found.kubernetes.patience = 1.0
    server.ask("fail", {"request": "GET .*/rayjobs/", "status": 500, "times": 1000})
    with pytest.raises(KubernetesError, match="500"):
        list(found.logs(run, follow=True, tell=str))


@pytest.mark.parametrize("mode", ["SidecarMode", "HTTPMode"])
def test_every_way_of_submission_is_followed(
    server: ApiServerProcess, user: User, tmp_path: Path, mode: str
) -> None:
    stream = kube_stream(tmp_path, job={"submission": mode})
    server.ask("plan", [{"lines": ["heard"], "exit_code": 2}] * 3)
    told = user("submit", stream, "--wait")
    assert told.code == 2
    assert ("heard" in told.lines) == (mode == "SidecarMode")
    assert ("no pod prints a run's log" in told.out) == (mode == "HTTPMode")


def test_cancel_lets_a_run_save_and_keeps_its_record(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    server.ask("plan", [HELD])
    user("submit", stream)
    until(lambda: status(server).get("jobStatus") == "RUNNING")
    told = user("cancel", stream)
    assert told.code == 0
    assert "stopped by SIGTERM: train/upper saved step 12" in told.out
    assert "finished stages are in the store" in told.out
    assert (status(server)["jobStatus"], status(server)["jobDeploymentStatus"]) == (
        "STOPPED",
        "Complete",
    )
    assert "is under way" in user("cancel", stream).out
    (run,) = json.loads(user("status", stream, "--json").out)["runs"]
    assert (run["state"], run["exit_code"]) == ("stopped", 143)


def test_a_run_that_is_waited_for_returns_143_when_it_is_cancelled(
    server: ApiServerProcess, user: User, stream: Path, tmp_path: Path
) -> None:
    server.ask("plan", [HELD])
    other = backend(server, stream, tmp_path)

    def stop() -> None:
        until(lambda: server.objects("RayJob") and status(server).get("jobStatus") == "RUNNING")
        (run,) = other.runs()
        other.stop(run, now=False, tell=str)

    stopping = threading.Thread(target=stop)
    stopping.start()
    told = user("submit", stream, "--wait")
    stopping.join()
    assert told.code == 143
    assert "was stopped" in told.lines[-1]


def test_a_run_that_cannot_be_asked_to_end_is_left_alone_unless_it_has_to_be_now(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    server.ask("plan", [HELD])
    server.ask("unreachable")
    user("submit", stream)
    until(lambda: status(server).get("jobStatus") == "RUNNING")
    told = user("cancel", stream)
    assert told.code == 1
    assert "still runs" in told.err
    assert "--now" in told.err
    assert status(server)["jobStatus"] == "RUNNING"
    now = user("cancel", stream, "--now")
    assert now.code == 0
    assert "go on from their last checkpoint" in now.out
    assert server.objects("RayJob") == []


def test_a_run_that_waits_to_be_admitted_is_told_and_removed(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    stream = kube_stream(tmp_path, kueue={"queue": "team"})
    user("submit", stream)
    until(lambda: status(server).get("jobDeploymentStatus") == "Suspended")
    assert "suspended" in user("status", stream).out
    told = user("cancel", stream)
    assert (told.code, server.objects("RayJob")) == (0, [])
    assert "removed before it ran" in told.out


def test_the_role_that_is_rendered_suffices_for_every_command(
    server: ApiServerProcess, user: User, stream: Path, tmp_path: Path
) -> None:
    user("submit", stream, "--wait")
    pipeline = User(server, tmp_path, "role-small-submit")
    server.ask("plan", [HELD])
    told = pipeline("submit", stream, "--again")
    assert told.code == 0, told.err
    until(lambda: server.objects("RayJob")[-1].get("status", {}).get("jobStatus") == "RUNNING")
    for command in ("status", "logs", "cancel"):
        told = pipeline(command, stream)
        assert told.code == 0, told.err
    assert "begun" in pipeline("logs", stream).lines


def test_what_is_forbidden_is_told_with_what_to_do(
    server: ApiServerProcess, stream: Path, tmp_path: Path
) -> None:
    told = User(server, tmp_path, "viewer")("submit", stream)
    assert told.code == 1
    assert 'User "viewer" cannot create resource "rayjobs"' in told.err
    assert "ask whoever runs the cluster for that right" in told.err
    assert server.ask("objects") == []
    stranger = User(server, tmp_path, "stranger")("status", stream)
    assert stranger.code == 1
    assert "401" in stranger.err
    assert "log in to the cluster again" in stranger.err


def test_fields_of_others_are_taken_over_only_by_force(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    user("submit", stream, "--wait")
    (edited,) = server.objects("ConfigMap")
    for part in ("resourceVersion", "uid", "creationTimestamp", "namespace"):
        del edited["metadata"][part]
    edited["data"]["stream.yaml"] += "# by hand\n"
    server.ask("put", {"object": edited, "manager": "kubectl-edit"})
    told = user("submit", stream, "--again")
    assert told.code == 1
    assert 'conflict with "kubectl-edit": .data.stream.yaml' in told.err
    assert "--force" in told.err
    assert len(server.objects("RayJob")) == 1
    assert user("submit", stream, "--again", "--force").code == 0
    (config,) = server.objects("ConfigMap")
    assert "by hand" not in config["data"]["stream.yaml"]


def test_a_namespace_that_is_missing_is_told(
    server: ApiServerProcess, user: User, tmp_path: Path
) -> None:
    told = user("submit", kube_stream(tmp_path, namespace="elsewhere"))
    assert told.code == 1
    assert "kubectl create namespace elsewhere" in told.err


def test_a_cluster_without_kuberay_is_told_before_anything_is_written(
    server: ApiServerProcess, user: User, stream: Path
) -> None:
    server.ask("unknown", ["ray.io"])
    told = user("submit", stream)
    assert told.code == 1
    assert "install the KubeRay operator" in told.err
    assert server.ask("objects") == []


def test_an_api_server_that_is_down_is_told(
    server: ApiServerProcess, stream: Path, tmp_path: Path
) -> None:
    user = User(server, tmp_path)
    user.kubeconfig = server.kubeconfig(tmp_path, host="http://127.0.0.1:9")
    told = user("status", stream)
    assert told.code == 1
    assert "the API server http://127.0.0.1:9 does not answer" in told.err


def test_a_run_that_is_gone_is_told(
    server: ApiServerProcess, user: User, stream: Path, tmp_path: Path
) -> None:
    assert "no run of this stream is on" in user("status", stream).out
    assert user("logs", stream).code == 1
    user("submit", stream, "--wait")
    told = user("logs", stream, "--run", "small-abc-7")
    assert told.code == 1
    assert "run small-abc-7 of this stream is not on" in told.err
    found = backend(server, stream, tmp_path)
    (run,) = found.runs()
    namespace(server, tmp_path).delete("RayJob", run.name)
    until(lambda: not server.objects("RayJob"))
    with pytest.raises(Exception, match="it was deleted, by hand or by a deletion rule"):
        list(found.logs(run, follow=True, tell=str))


def test_options_for_a_ray_cluster_are_refused_on_kubernetes(user: User, stream: Path) -> None:
    told = user("submit", stream, "--pip")
    assert told.code == 2
    assert "--pip goes with --address" in told.err


def test_a_stream_without_a_cluster_section_is_told_both_ways(user: User, tmp_path: Path) -> None:
    stream = kube_stream(tmp_path)
    stream.write_text(stream.read_text().partition("cluster:")[0])
    told = user("submit", stream)
    assert told.code == 2
    assert "no cluster section" in told.err
