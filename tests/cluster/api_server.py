"""A stand-in for the Kubernetes API server, in a process of its own: `python -m tests.cluster.api_server`.

It speaks the parts that are used: discovery, create, server-side apply, merge patch, get, list, watch,
delete, logs of pods, commands in them. What comes in is validated (`api_schemas`), kept with versions
and owners (`api_store`), and RayJobs are played (`api_operator`). Under /test/ a test lays down what
happens next. The first line it prints is its port.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml

from tests.cluster.api_operator import Operator, attempts_of, make_secret, stamp
from tests.cluster.api_schemas import problems
from tests.cluster.api_store import Event, Object, Refused, Store

NAMESPACE = "seekr"
# Who may do everything, and who may only look. `role-NAME` may do what the Role of that name says.
TOKENS = ("admin", "viewer")
_VERBS = {"apply": "patch", "merge": "patch", "exec": "create"}
KINDS = {
    "v1": {
        "ConfigMap": "configmaps",
        "PersistentVolumeClaim": "persistentvolumeclaims",
        "Pod": "pods",
        "Secret": "secrets",
        "Service": "services",
        "ServiceAccount": "serviceaccounts",
    },
    "apps/v1": {"Deployment": "deployments", "StatefulSet": "statefulsets"},
    "batch/v1": {"CronJob": "cronjobs", "Job": "jobs"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "rbac.authorization.k8s.io/v1": {"Role": "roles", "RoleBinding": "rolebindings"},
    "ray.io/v1": {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"},
}
_OBJECTS = re.compile(
    r"/apis?/(?P<group>.+)/namespaces/(?P<space>[^/]+)/(?P<plural>[^/]+)(/(?P<name>[^/]+))?"
)
_LOG = re.compile(r"/api/v1/namespaces/[^/]+/pods/(?P<pod>[^/]+)/log")
_EXEC = re.compile(r"/api/v1/namespaces/[^/]+/pods/(?P<pod>[^/]+)/exec")
_WEBSOCKET = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_SUBRESOURCES = {"exec": "pods/exec", "get log": "pods/log"}
_POLL = 0.05


class ApiServer(ThreadingHTTPServer):
    """What all requests share."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reset()

    def reset(self) -> None:
        """Forget everything, for the next test."""
        self.store = Store(NAMESPACE)
        self.operator = Operator(self.store)
        self.requests: list[str] = []
        self.failures: list[dict[str, Any]] = []
        self.unknown: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: ApiServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PATCH = do_DELETE = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = parts.path, dict(parse_qsl(parts.query))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = yaml.safe_load(self.rfile.read(length)) if length else None
        try:
            if self.route.startswith("/test/"):
                return self._json(200, getattr(self, f"test_{self.route[6:]}")(self.body or {}))
            self.server.requests.append(f"{self.command} {self.path}")
            self._check_failures()
            self._serve()
        except Refused as refused:
            self._refuse(refused)
        except BrokenPipeError:
            pass

    def _serve(self) -> None:
        if self.route == "/version":
            return self._json(200, {"major": "1", "minor": "34", "gitVersion": "v1.34.2"})
        if self.route == "/apis":
            return self._json(200, {"kind": "APIGroupList", "groups": list(self._groups())})
        group = self.route.removeprefix("/apis/").removeprefix("/api/")
        if group in KINDS:
            return self._json(200, {"kind": "APIResourceList", "resources": self._resources(group)})
        if found := _LOG.fullmatch(self.route):
            self._allow("get log", "Pod")
            return self._log(found["pod"])
        if found := _EXEC.fullmatch(self.route):
            self._allow("exec", "Pod")
            return self._exec(found["pod"])
        found = _OBJECTS.fullmatch(self.route)
        if found is None:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        if found["space"] != NAMESPACE:
            raise Refused(404, "NotFound", f'namespaces "{found["space"]}" not found')
        plurals = {plural: kind for kind, plural in KINDS[found["group"]].items()}
        self._object(plurals[found["plural"]], found["name"])

    def _object(self, kind: str, name: str | None) -> None:
        store, manager = self.server.store, self.query.get("fieldManager", "unknown")
        if self.command == "GET":
            watch = self.query.get("watch") == "true"
            self._allow("get" if name is not None else "watch" if watch else "list", kind, name)
            if name is not None:
                return self._json(200, store.get(kind, name))
            if watch:
                return self._watch(kind)
            selector = self.query.get("labelSelector", "")
            labels = dict(item.split("=") for item in selector.split(",") if item)
            items = store.select(kind, labels)
            return self._json(200, {"kind": f"{kind}List", "apiVersion": "v1", "items": items})
        if self.command == "DELETE":
            self._allow("delete", kind, name)
            return self._json(200, store.delete(kind, str(name)))
        if self.command == "PATCH" and "merge" in self.headers["Content-Type"]:
            self._allow("merge", kind, name)
            return self._json(200, store.merge(kind, str(name), self.body, f"{manager}/update"))
        self._allow("create" if self.command == "POST" else "apply", kind, name)
        if found := problems(self.body):
            raise Refused(422, "Invalid", f"{kind} is invalid: {'; '.join(found[:3])}")
        if self.command == "PATCH":
            force = self.query.get("force") == "true"
            return self._json(200, store.apply(self.body, f"{manager}/apply", force=force))
        dry = self.query.get("dryRun") == "All"
        made = store.create(self.body, f"{manager}/update", dry=dry)
        if kind == "RayJob" and not dry:
            self.server.operator.begin(made)
        self._json(201, made)

    def _watch(self, kind: str) -> None:
        store, since = self.server.store, int(self.query["resourceVersion"])
        name = self.query["fieldSelector"].removeprefix("metadata.name=")
        end = time.monotonic() + float(self.query.get("timeoutSeconds", 60))
        self._begin("application/json")
        while time.monotonic() < end:
            with store.changed:
                store.changed.wait(_POLL)
                gone = since < store.forgotten
                fresh = [item for item in store.events if item.version > since]
            if gone:
                status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
                self._chunk({"type": "ERROR", "object": status})
                break
            for event in fresh:
                since = event.version
                self._tell(event, kind, name)
        self._chunk(None)

    def _tell(self, event: Event, kind: str, name: str) -> None:
        if event.kind == kind and event.object["metadata"]["name"] == name:
            self._chunk({"type": event.type, "object": event.object})

    def _log(self, pod: str) -> None:
        self.server.store.get("Pod", pod)
        log = self.server.operator.logs[pod]
        since = self.query.get("sinceTime", "")
        shown, cuts = 0, log.cuts
        self._begin("text/plain")
        while True:
            with self.server.store.changed:
                closed = log.closed
                fresh, shown = log.lines[shown:], len(log.lines)
            for moment, line in fresh:
                # As the kubelet has it: from that second on, lines of the second itself included.
                if stamp(moment)[:19] >= since[:19]:
                    self._chunk(f"{stamp(moment)} {line}\n")
            if log.cuts > cuts:  # in the middle of an answer
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            if closed or self.query.get("follow") != "true":
                break
            time.sleep(_POLL)
        self._chunk(None)

    def _exec(self, pod: str) -> None:
        """Answer a command over a WebSocket: what it says on channel 1, how it ended on channel 3."""
        command = [value for key, value in parse_qsl(urlsplit(self.path).query) if key == "command"]
        code, text = self.server.operator.execute(pod, self.query["container"], command)
        key = hashlib.sha1(self.headers["Sec-WebSocket-Key"].encode() + _WEBSOCKET).digest()
        self.send_response(101)
        for name, value in (
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", base64.b64encode(key).decode()),
            ("Sec-WebSocket-Protocol", "v4.channel.k8s.io"),
        ):
            self.send_header(name, value)
        self.end_headers()
        causes = {"causes": [{"reason": "ExitCode", "message": str(code)}]}
        ended = {"status": "Failure", "details": causes} if code else {"status": "Success"}
        for channel, said in ((1, text), (3, json.dumps(ended))):
            data = bytes([channel]) + said.encode()
            self.wfile.write(b"\x82\x7e" + len(data).to_bytes(2, "big") + data)
        self.wfile.write(b"\x88\x00")
        self.close_connection = True

    def _allow(self, verb: str, kind: str, name: str | None = None) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        resource = _SUBRESOURCES.get(verb) or next(
            names[kind] for names in KINDS.values() if kind in names
        )
        verb = _VERBS.get(verb, verb).removesuffix(" log")
        if token.startswith("role-"):
            rules = self.server.store.get("Role", token[5:])["rules"]
            allowed = any(
                resource in rule["resources"]
                and verb in rule["verbs"]
                and name in rule.get("resourceNames", [name])
                for rule in rules
            )
        elif token in TOKENS:
            allowed = token == "admin" or verb in ("get", "list", "watch")
        else:
            raise Refused(401, "Unauthorized", "Unauthorized")
        if not allowed:
            raise Refused(
                403,
                "Forbidden",
                f'{resource} is forbidden: User "{token}" cannot {verb} resource "{resource}" '
                f'in the namespace "{NAMESPACE}"',
            )

    def _check_failures(self) -> None:
        for failure in self.server.failures:
            if failure["times"] > 0 and re.search(
                failure["request"], f"{self.command} {self.path}"
            ):
                failure["times"] -= 1
                raise Refused(failure["status"], "Failed", "as the test asks for")

    def _groups(self) -> Iterator[dict[str, Any]]:
        for name in KINDS:
            group, _, version = name.rpartition("/")
            if group and group not in self.server.unknown:
                entry = {"groupVersion": name, "version": version}
                yield {"name": group, "versions": [entry], "preferredVersion": entry}

    def _resources(self, group: str) -> list[dict[str, Any]]:
        return [
            {
                "name": plural,
                "singularName": kind.lower(),
                "namespaced": True,
                "kind": kind,
                "verbs": [],
            }
            for kind, plural in KINDS[group].items()
            if kind not in self.server.unknown
        ]

    def _refuse(self, refused: Refused) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        status |= {"reason": refused.reason, "message": str(refused), "code": refused.status}
        self._json(refused.status, status)

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, value: Object | str | None) -> None:
        text = (
            "" if value is None else value if isinstance(value, str) else json.dumps(value) + "\n"
        )
        self.wfile.write(b"%x\r\n%b\r\n" % (len(text.encode()), text.encode()))
        self.wfile.flush()

    def test_reset(self, body: Any) -> Any:
        self.server.reset()

    def test_plan(self, body: Any) -> Any:
        self.server.operator.plan = attempts_of(body)

    def test_release(self, body: Any) -> Any:
        self.server.operator.released.set()

    def test_forget(self, body: Any) -> Any:
        self.server.store.forget()

    def test_fail(self, body: Any) -> Any:
        self.server.failures.append(body)

    def test_unknown(self, body: Any) -> Any:
        self.server.unknown = set(body)

    def test_unreachable(self, body: Any) -> Any:
        self.server.operator.unreachable = True

    def test_cut(self, body: Any) -> Any:
        for log in self.server.operator.logs.values():
            log.cuts += 1

    def test_requests(self, body: Any) -> Any:
        return self.server.requests

    def test_objects(self, body: Any) -> Any:
        return list(self.server.store.objects.values())

    def test_put(self, body: Any) -> Any:
        """Let somebody else write an object."""
        self.server.store.apply(body["object"], body["manager"], force=True)

    def test_status(self, body: Any) -> Any:
        self.server.store.set_status(body["kind"], body["name"], **body["status"])

    def test_secret(self, body: Any) -> Any:
        make_secret(self.server.store, body["name"], body["token"])


if __name__ == "__main__":
    server = ApiServer()
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # ends when whoever has started it does
