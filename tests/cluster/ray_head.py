"""A Ray cluster of one node for tests, started as an administrator would: a process of its own, ports of its
own, and a token. Nothing of it outlives the block, and no other Ray of the machine is touched."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

# A busy machine may take longer to register the node than Ray itself waits.
_ATTEMPTS, _START_SECONDS = 2, 240.0
_PORTS = (
    *("--port", "--dashboard-port", "--ray-client-server-port"),
    *("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayHead:
    """A cluster that answers.

    Attributes:
        address: of its dashboard.
        token: what it asks for.
        token_path: the file with it.
    """

    address: str
    token: str
    token_path: Path


@contextmanager
def ray_head(*, cpus: int) -> Iterator[RayHead]:
    """Start a cluster, and end all its processes."""
    # Names of sockets are short, and those of pytest's folders are not.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    path, token = folder / "token", secrets.token_hex(32)
    path.write_text(token)
    try:
        with ExitStack() as stack:
            address = stack.enter_context(_started(folder, path, cpus))
            yield RayHead(address=address, token=token, token_path=path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(folder: Path, token_path: Path, cpus: int) -> Iterator[str]:
    for number in range(_ATTEMPTS):
        process, address = _start(folder / f"t{number}", token_path, cpus)
        try:
            if _answers(process, address, token_path.read_text()):
                yield address
                return
        finally:
            _end(process)
    pytest.fail(
        f"Ray did not start in {_ATTEMPTS} attempts: {(folder / 't0.log').read_text()[-2000:]}"
    )


def _start(folder: Path, token_path: Path, cpus: int) -> tuple[subprocess.Popen[bytes], str]:
    ports = {name: _free_port() for name in _PORTS}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += [f"{name}={port}" for name, port in ports.items()]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={cpus}"]
    command += [f"--temp-dir={folder}", "--include-dashboard=true", "--disable-usage-stats"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = kept | {
        "HOME": str(token_path.parent),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_raylet_start_wait_time_s": f"{_START_SECONDS:g}",
        # Where jobs find `python`.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with folder.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    return process, f"http://127.0.0.1:{ports['--dashboard-port']}"


def _answers(process: subprocess.Popen[bytes], address: str, token: str) -> bool:
    """Wait until a node has registered; returns False if the process gives up."""
    request = urllib.request.Request(
        f"{address}/api/cluster_status", headers={"Authorization": f"Bearer {token}"}
    )
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
            if b" CPU" in answer.read():
                return True
        time.sleep(0.5)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the head end its processes, and see that none of its session is left."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    for other in _session(process.pid):
        other.kill()
    process.wait()


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
