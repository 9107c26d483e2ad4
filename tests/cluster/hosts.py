"""Real hosts on one machine, for tests: each has its own network, processes, name, and folder.

A host is a first process in fresh network, mount, process and name spaces, behind a cable (a veth pair)
to a switch, which is a bridge in a network space of its own. So nothing is added to this machine's own
network, and no packet leaves it. All hosts see a folder at one path, and it is another folder in each: what
is shared by accident on one machine is missing here. Their name means 127.0.1.1, as Debian has it.

Nothing has to be cleaned up by a program that may not get so far: a host's first process dies with the
test's process, its other processes die with the first, and spaces, cables and bridge go when nobody is in
them. Only folders stay, and those of dead tests are removed by the next.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SUBNET = "10.213.77"
TOOLS = ("ip", "nsenter", "unshare", "setpriv", "mount")
_PREFIX = "seekr-hosts-"
_START_SECONDS = 30.0
# $1 is the host's name, $2 its folder, $3 where the folder is seen.
_FIRST_PROCESS = r"""
set -e
hostname "$1"
mkdir -p "$2/home" "$2/tmp"
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$1" > "$2/hosts"
: > "$2/resolv.conf"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2" "$3"
ip link set lo up
cd /
echo ready
trap : TERM INT
while :; do sleep 3600 & wait $!; done
"""


def require() -> None:
    """Skip the test where there can be no such hosts, and say why."""
    if not sys.platform.startswith("linux"):
        pytest.skip("hosts are made of network namespaces, which only Linux has")
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces: run `make test-cluster` as root")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: install iproute2 and util-linux")
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        pytest.skip(f"no namespaces can be made here: {tried.stderr.strip()}")


@dataclass(slots=True)
class Process:
    """A command on a host; `inside` is the command itself, beside the program that took it there."""

    outer: subprocess.Popen[bytes]
    log: Path

    def running(self) -> bool:
        return self.outer.poll() is None

    def wait(self, seconds: float) -> int:
        return self.outer.wait(seconds)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def inside(self) -> psutil.Process:
        (child,) = psutil.Process(self.outer.pid).children()
        return child


@dataclass(slots=True)
class Host:
    """A running host.

    Attributes:
        name: its host name.
        address: its IPv4 address.
        folder: its own folder as this process sees it; the host itself sees it at `seen`.
        first: process id of its first process, as this process counts.
    """

    name: str
    address: str
    folder: Path
    seen: Path
    first: int
    environment: dict[str, str]
    keeper: subprocess.Popen[bytes] = field(repr=False)

    def command(self, *words: str, environment: Mapping[str, str] | None = None) -> list[str]:
        """Return what runs a command on it, in its folder, with no variable but its own."""
        variables = self.environment | dict(environment or {})
        enter = ["nsenter", "--target", str(self.first), "--net", "--mount", "--uts", "--pid", "--"]
        clean = ["env", "--ignore-environment", f"--chdir={self.seen}"]
        return [*enter, *clean, *(f"{name}={value}" for name, value in variables.items()), *words]

    def start(self, *words: str, log: str, environment: Mapping[str, str] | None = None) -> Process:
        """Start a command on it; what it says is added to a file of its folder."""
        path = self.folder / log
        with path.open("ab") as out:
            command = self.command(*words, environment=environment)
            outer = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                start_new_session=True,
            )
        return Process(outer, path)

    def run(
        self, *words: str, seconds: float = 60, environment: Mapping[str, str] | None = None
    ) -> str:
        """Run a command on it to its end; returns what it printed."""
        command = self.command(*words, environment=environment)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, cwd="/", check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout

    def processes(self, title: str) -> list[psutil.Process]:
        """Return its processes whose title begins like that."""
        mine = os.stat(f"/proc/{self.first}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.stat(f"/proc/{process.pid}/ns/pid").st_ino == mine and " ".join(
                    process.cmdline()
                ).startswith(title):
                    found.append(process)
        return found

    def power_off(self) -> None:
        """End it like a machine without current: all its processes at once. Its folder stays."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        self.keeper.wait(_START_SECONDS)


class Network:
    """A switch and the hosts at it. A context manager: whoever leaves it takes all hosts along.

    Attributes:
        seen: path of the folder that every host has for its own.
        hosts: those that were made, by name.
    """

    def __init__(self) -> None:
        _remove_leftovers()
        self._base = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir="/tmp"))
        self.seen = self._base / "own"
        self.seen.mkdir()
        self.hosts: dict[str, Host] = {}
        self._switch = self._begin("switch", self._base / "switch", "0.0.0.0")
        self._in(self._switch, "ip", "link", "add", "bridge0", "type", "bridge")
        self._in(self._switch, "ip", "link", "set", "bridge0", "up")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        for host in (*self.hosts.values(), self._switch):
            host.power_off()
        if os.environ.get("SEEKR_KEEP_HOSTS"):
            print(f"what the hosts have written is kept: {self._base}")
            return
        shutil.rmtree(self._base, ignore_errors=True)

    def add(self, name: str, number: int, environment: Mapping[str, str] | None = None) -> Host:
        """Make a host, or one in the place of another that was powered off, with what that had stored.

        Args:
            number: last part of its address.
            environment: variables of its commands, beside the usual ones.
        """
        host = self._begin(name, self._base / name, f"{SUBNET}.{number}", environment)
        cable, first = f"to-{name}", str(host.first)
        peer = ["type", "veth", "peer", "name", "cable0", "netns", first]
        self._in(self._switch, "ip", "link", "add", cable, *peer)
        self._in(self._switch, "ip", "link", "set", cable, "master", "bridge0")
        self._in(host, "ip", "address", "add", f"{host.address}/24", "dev", "cable0")
        self._in(host, "ip", "link", "set", "cable0", "up")
        self.hosts[name] = host
        self.mend(host)
        return host

    def cut(self, host: Host) -> None:
        """Pull its cable: what it sends goes nowhere, and nobody is told."""
        self._in(self._switch, "ip", "link", "set", f"to-{host.name}", "down")

    def mend(self, host: Host) -> None:
        """Put its cable back."""
        self._in(self._switch, "ip", "link", "set", f"to-{host.name}", "up")

    def _begin(
        self,
        name: str,
        folder: Path,
        address: str,
        environment: Mapping[str, str] | None = None,
    ) -> Host:
        folder.mkdir(exist_ok=True)
        spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        script = ["bash", "-c", _FIRST_PROCESS, "first", name, str(folder), str(self.seen)]
        said = folder / "first.log"
        with said.open("wb") as out:
            keeper = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, *script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=out,
                cwd="/",
                start_new_session=True,
            )
        assert keeper.stdout is not None
        if keeper.stdout.readline().strip() != b"ready":
            keeper.kill()
            raise RuntimeError(f"host {name} did not start: {said.read_text()}")
        (first,) = psutil.Process(keeper.pid).children()
        return Host(
            name=name,
            address=address,
            folder=folder,
            seen=self.seen,
            first=first.pid,
            environment=_environment(self.seen) | dict(environment or {}),
            keeper=keeper,
        )

    def _in(self, host: Host, *words: str) -> None:
        enter = ["nsenter", "--target", str(host.first), "--net", "--"]
        subprocess.run([*enter, *words], check=True, capture_output=True, timeout=_START_SECONDS)


def listens(host: Host, port: int, seconds: float = 60) -> None:
    """Wait until something on a host accepts connections at a port of its address."""
    code = f"import socket; socket.create_connection(({host.address!r}, {port}), 1).close()"
    deadline = time.monotonic() + seconds
    while True:
        tried = subprocess.run(
            host.command(sys.executable, "-S", "-c", code),
            capture_output=True,
            cwd="/",
            check=False,
        )
        if tried.returncode == 0:
            return
        assert time.monotonic() < deadline, f"{host.name}:{port} does not answer"
        time.sleep(0.2)


def wait_until(what: str, holds: Callable[[], object], seconds: float, every: float = 0.1) -> float:
    """Wait until a function returns something true; returns how many seconds it took."""
    begun = time.monotonic()
    while not holds():
        waited = time.monotonic() - begun
        assert waited < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(every)
    return time.monotonic() - begun


def _environment(seen: Path) -> dict[str, str]:
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(seen / "home"),
        "TMPDIR": str(seen / "tmp"),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _remove_leftovers() -> None:
    """Remove the folders of tests that are gone; their hosts went with them."""
    for folder in Path("/tmp").glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
