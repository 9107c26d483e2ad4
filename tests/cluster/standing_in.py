"""A stand-in API server for tests, with the kubeconfig of somebody who may use it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


@dataclass(slots=True)
class ApiServerProcess:
    """A server that runs."""

    process: subprocess.Popen[str]
    port: int

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, what: str, body: Any = None) -> Any:
        """Lay down what happens next, or ask what happened: see `Handler.test_*`."""
        request = urllib.request.Request(
            f"{self.host}/test/{what}", data=json.dumps(body or {}).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def objects(self, kind: str) -> list[dict[str, Any]]:
        return [item for item in self.ask("objects") if item["kind"] == kind]

    def requests(self, method: str) -> list[str]:
        return [item for item in self.ask("requests") if item.startswith(method)]

    def kubeconfig(self, folder: Path, *, user: str = "admin", host: str = "") -> Path:
        """Write the file of a user, whose name is also the token."""
        values = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": host or self.host}}],
            "users": [{"name": user, "user": {"token": user}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": user}}],
        }
        path = folder / f"kubeconfig-{user}"
        path.write_text(yaml.safe_dump(values))
        return path


@contextmanager
def api_server() -> Iterator[ApiServerProcess]:
    """Start the server, and end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.api_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        yield ApiServerProcess(process, int(process.stdout.readline()))
    finally:
        process.terminate()
        process.wait(timeout=30)
