"""What a schedule's pod does, over HTTP with Kubernetes' own client, and that its role allows just that.

The API server is a small process of ours that keeps RayJobs, refuses a name that it has, and writes down
what was asked of it.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from kubernetes.client import ApiClient, ApiException, Configuration, CustomObjectsApi

from cluster.trigger import start
from tests.cluster.rendered import manifests_of

JOBS = "/apis/ray.io/v1/namespaces/seekr/rayjobs"


@dataclass
class Server:
    """RayJobs by name, and what was asked: verb and resource."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refuses: bool = False

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                assert parts.path == JOBS
                server.asked.append("list")
                key, _, value = parse_qs(parts.query)["labelSelector"][0].partition("=")
                items = [
                    item
                    for item in server.jobs.values()
                    if item["metadata"]["labels"].get(key) == value
                ]
                self.answer(200, {"items": items})

            def do_POST(self) -> None:
                assert self.path == JOBS
                server.asked.append("create")
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = body["metadata"]["name"]
                if server.refuses:
                    self.answer(403, {"reason": "Forbidden"})
                elif name in server.jobs:
                    self.answer(409, {"reason": "AlreadyExists"})
                else:
                    server.jobs[name] = body
                    stamp = f"2026-11-22T00:{len(server.jobs):02}:00Z"
                    body["metadata"]["creationTimestamp"] = stamp
                    self.answer(201, body)

            def do_DELETE(self) -> None:
                server.asked.append("delete")
                found = server.jobs.pop(self.path.removeprefix(f"{JOBS}/"), None)
                self.answer(200 if found else 404, {})

            def answer(self, status: int, value: Any) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def api(server: Server) -> Iterator[CustomObjectsApi]:
    listening = ThreadingHTTPServer(("127.0.0.1", 0), server.handler())
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    settings = Configuration()
    settings.host = f"http://127.0.0.1:{listening.server_port}"
    settings.proxy = None
    with ApiClient(settings) as client:
        yield CustomObjectsApi(client)
    listening.shutdown()
    listening.server_close()


def scheduled() -> dict[str, Any]:
    """The RayJob that the schedule's pod finds in its ConfigMap."""
    (text,) = [
        item["data"]["rayjob.yaml"]
        for item in manifests_of("CronJob").of_kind("ConfigMap")
        if "rayjob.yaml" in item["data"]
    ]
    return yaml.safe_load(text)


def set_status(server: Server, name: str, status: str) -> None:
    server.jobs[name]["status"] = {"jobDeploymentStatus": status}


def test_a_tick_creates_the_job_under_its_own_name(api: CustomObjectsApi, server: Server) -> None:
    assert start(api, scheduled(), "weekly-29000000") == "RayJob weekly-29000000 is created"
    (job,) = server.jobs.values()
    expected = copy.deepcopy(manifests_of("CronJob").ray_job)
    expected["metadata"]["name"] = "weekly-29000000"
    expected["metadata"]["labels"]["app.kubernetes.io/managed-by"] = "schedule"
    job["metadata"].pop("creationTimestamp")
    assert job == expected


def test_a_pod_that_is_tried_again_creates_nothing_twice(
    api: CustomObjectsApi, server: Server
) -> None:
    start(api, scheduled(), "weekly-1")
    set_status(server, "weekly-1", "Running")
    assert start(api, scheduled(), "weekly-1") == (
        "RayJob weekly-1 exists already: nothing is started"
    )
    assert list(server.jobs) == ["weekly-1"]


@pytest.mark.parametrize("status", ["", "Initializing", "Running", "Suspended", "Retrying"])
def test_a_tick_that_overlaps_another_starts_nothing(
    api: CustomObjectsApi, server: Server, status: str
) -> None:
    start(api, scheduled(), "weekly-1")
    if status:
        set_status(server, "weekly-1", status)
    assert "weekly-1 is under way" in start(api, scheduled(), "weekly-2")
    assert list(server.jobs) == ["weekly-1"]


@pytest.mark.parametrize("status", ["Complete", "Failed", "ValidationFailed"])
def test_a_job_that_has_ended_is_in_nobodys_way(
    api: CustomObjectsApi, server: Server, status: str
) -> None:
    start(api, scheduled(), "weekly-1")
    set_status(server, "weekly-1", status)
    start(api, scheduled(), "weekly-2")
    assert list(server.jobs) == ["weekly-1", "weekly-2"]


def test_another_streams_job_is_in_nobodys_way(api: CustomObjectsApi, server: Server) -> None:
    other = scheduled()
    other["metadata"]["labels"]["app.kubernetes.io/instance"] = "other"
    start(api, other, "other-1")
    start(api, scheduled(), "weekly-1")
    assert list(server.jobs) == ["other-1", "weekly-1"]


def test_of_ended_jobs_the_newest_of_each_outcome_stay(
    api: CustomObjectsApi, server: Server
) -> None:
    by_hand = scheduled()
    server.jobs["by-hand"] = by_hand
    by_hand["metadata"] |= {"name": "by-hand", "creationTimestamp": "2020-01-01T00:00:00Z"}
    set_status(server, "by-hand", "Complete")
    for tick, status in enumerate(["Complete", "Failed", "Complete", "Failed", "Complete"]):
        start(api, scheduled(), f"weekly-{tick}", history=2)
        set_status(server, f"weekly-{tick}", status)
    assert list(server.jobs) == ["by-hand", *(f"weekly-{tick}" for tick in range(5))]
    start(api, scheduled(), "weekly-5", history=1)
    assert list(server.jobs) == ["by-hand", "weekly-3", "weekly-4", "weekly-5"]


def test_a_run_under_way_is_never_removed(api: CustomObjectsApi, server: Server) -> None:
    start(api, scheduled(), "weekly-1")
    for tick in range(2, 9):
        start(api, scheduled(), f"weekly-{tick}", history=0)
    assert list(server.jobs) == ["weekly-1"]


def test_a_refusal_fails_the_pod_so_that_it_is_tried_again(
    api: CustomObjectsApi, server: Server
) -> None:
    server.refuses = True
    with pytest.raises(ApiException):
        start(api, scheduled(), "weekly-1")


def test_the_role_allows_what_is_asked_and_no_more(api: CustomObjectsApi, server: Server) -> None:
    start(api, scheduled(), "weekly-1")
    set_status(server, "weekly-1", "Failed")
    start(api, scheduled(), "weekly-2", history=0)
    (role,) = [
        item
        for item in manifests_of("CronJob").of_kind("Role")
        if item["metadata"]["name"] == "weekly-schedule"
    ]
    assert role["rules"] == [
        {
            "apiGroups": ["ray.io"],
            "resources": ["rayjobs"],
            "verbs": sorted(set(server.asked)),
        }
    ]


def test_the_pod_knows_its_tick_and_its_manifest() -> None:
    (cron,) = manifests_of("CronJob").of_kind("CronJob")
    spec = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    variables = {item["name"]: item for item in container["env"]}
    source = variables["SEEKR_TICK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert source == "metadata.labels['batch.kubernetes.io/job-name']"
    module, path = container["command"][2:]
    assert module == start.__module__
    (mount,) = [item for item in container["volumeMounts"] if item["name"] == "rayjob"]
    (volume,) = [item for item in spec["volumes"] if item["name"] == "rayjob"]
    (files,) = [
        item["data"]
        for item in manifests_of("CronJob").of_kind("ConfigMap")
        if item["metadata"]["name"] == volume["configMap"]["name"]
    ]
    assert path in {f"{mount['mountPath']}/{name}" for name in files}
