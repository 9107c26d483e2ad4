"""Ray and an S3 server on hosts of their own, started as an operator would: `ray start` with a token, kept
running on every host by a loop, as systemd or Kubernetes does.

What a test wants to know of the cluster it reads from files that the hosts write; what it wants to know of
the store it asks a process on the store's host, since no address of the hosts exists on this machine.
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.hosts import Host, Network, Process, listens, wait_until
from tests.pipelines.s3_server import ACCESS_KEY, BUCKET

RAY_PORT, STORE_PORT = 6379, 9000
TOKEN = "token"
CPUS = 2
RUN_SECONDS = 2400
# On two cores that others use too it takes minutes.
SLOW_DASHBOARD = ("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "300")
# What lets a cluster notice within seconds that a host is gone; Ray's own settings take most of a minute.
NOTICED_SOON = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "4",
    # And a host that the head is gone.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
    # And whoever waits for an answer of a host that is cut off, where nothing refuses the connection.
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}
_START_SECONDS = 600.0
_JOINED = re.compile(r"Registering new node\. node_id=(\w+) .*node_address=(\S+)")
_DIED = re.compile(r"death reason = .*node_id=(\w+)")
_READER = """
import json, sys
from pyarrow import fs
from pipelines.store import Store
store = Store.open(sys.argv[1], writable=False)
if len(sys.argv) > 2:
    location = store.location
    fs.S3FileSystem(**json.loads(sys.argv[2])).create_dir(location.root.partition("/")[0])
for line in sys.stdin:
    verb, path = json.loads(line)
    if verb == "list":
        found = [[file.path, file.mtime] for file in store.list(path)]
    else:
        found = getattr(store, verb)(path)
    print(json.dumps(found), flush=True)
"""


@dataclass(slots=True)
class StoreHost:
    """A host with an S3 server and one bucket, and a process on it that reads the store."""

    host: Host
    uri: str
    server: Process
    _reader: subprocess.Popen[str] = field(repr=False)

    @classmethod
    def start(cls, network: Network, number: int) -> StoreHost:
        host = network.add("store", number)
        moto = [sys.executable, "-m", "moto.server", "-H", host.address, "-p", str(STORE_PORT)]
        server = host.start(*moto, log="moto.log")
        listens(host, STORE_PORT, _START_SECONDS)
        endpoint = f"{host.address}:{STORE_PORT}"
        options = f"?scheme=http&endpoint_override={endpoint}&region=us-east-1"
        uri = f"s3://{ACCESS_KEY}:test%2Fsecret%2Bkey@{BUCKET}/stream{options}"
        making = {
            "access_key": ACCESS_KEY,
            "secret_key": "test/secret+key",
            "scheme": "http",
            "endpoint_override": endpoint,
            "region": "us-east-1",
            "allow_bucket_creation": True,
        }
        reader = subprocess.Popen(
            host.command(sys.executable, "-c", _READER, uri, json.dumps(making)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        return cls(host, uri, server, reader)

    def ask(self, verb: str, path: str) -> Any:
        """Return what a method of the store returns, as JSON."""
        assert self._reader.stdin is not None and self._reader.stdout is not None
        self._reader.stdin.write(json.dumps([verb, path]) + "\n")
        self._reader.stdin.flush()
        return json.loads(self._reader.stdout.readline())

    def at(self, prefix: str) -> str:
        """Return the URI of a store of its own in the bucket."""
        return self.uri.replace("/stream?", f"/stream/{prefix}?")

    def finished(self, prefix: str) -> dict[str, float]:
        """Return when each finished stage was committed, by its key."""
        files = self.ask("list", prefix)
        return {
            path.removeprefix(f"{prefix}/").removesuffix("/record.json"): mtime
            for path, mtime in files
            if path.endswith("/record.json")
        }

    def digests(self, prefix: str) -> dict[str, str]:
        """Return the sha256 of every final model's weights, by stage key."""
        keys = [key for key in self.finished(prefix) if key.startswith("train/")]
        return {key: self.ask("digest", f"{prefix}/{key}/model/model.safetensors") for key in keys}

    def newest_checkpoint(self, prefix: str, task: str) -> int:
        """Return the steps done in a training's newest checkpoint, 0 if there is none."""
        files = self.ask("list", f"{prefix}/train/{task}")
        steps = [re.search(r"/checkpoints/step-(\d+)-.*/progress.json$", path) for path, _ in files]
        return max((int(step[1]) for step in steps if step), default=0)


class RayHosts:
    """A head and other hosts with Ray on them, and one token."""

    def __init__(self, network: Network, hosts: int) -> None:
        self._network = network
        self._token = secrets.token_hex(32)
        self.head = self._host("h0", 10)
        self._start_head()
        self.others = [self._host(f"h{n}", 10 + n) for n in range(1, hosts)]
        for host in self.others:
            self._keep_ray(host, [f"--address={self.address}"])
        self.wait_for(*self.hosts)

    @property
    def address(self) -> str:
        return f"{self.head.address}:{RAY_PORT}"

    @property
    def hosts(self) -> list[Host]:
        return [self.head, *self.others]

    def lose_head(self) -> None:
        """Switch the head off, and a machine with its address and files on in its place."""
        self.head.power_off()
        # What a new pod or a new machine would not have.
        shutil.rmtree(self.head.folder / "ray")
        shutil.rmtree(self.head.folder / "home")
        self.head = self._host("h0", 10)
        self._start_head()

    def wait_for(self, *hosts: Host, seconds: float = _START_SECONDS) -> float:
        """Wait until these hosts and no others are in the cluster; returns how many seconds it took."""
        wanted = {host.address for host in hosts}
        return wait_until(f"a cluster of {sorted(wanted)}", lambda: self.alive() == wanted, seconds)

    def alive(self) -> set[str]:
        """Return the addresses of the hosts that the head counts on, by what it has written."""
        nodes: dict[str, str] = {}
        for path in self.head.folder.glob("ray/session_2*/logs/gcs_server.out"):
            for line in path.read_text(errors="replace").splitlines():
                if found := _JOINED.search(line):
                    nodes[found[1]] = found[2]
                elif found := _DIED.search(line):
                    nodes.pop(found[1], None)
        return set(nodes.values())

    def with_process(self, title: str) -> list[Host]:
        """Return the hosts on which a process of that title runs."""
        return [host for host in self.hosts if host.processes(title)]

    def run(self, stream: str, *changes: str, log: str) -> Process:
        """Start `seekr run` on the head."""
        words = [sys.executable, "-m", "pipelines.cli", "run", stream]
        for change in (f"ray.address={self.address}", *changes):
            words += ["--set", change]
        return self.head.start(*words, log=log)

    def _host(self, name: str, number: int) -> Host:
        seen = self._network.seen
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(seen / TOKEN)}
        host = self._network.add(name, number, token | NOTICED_SOON | dict([SLOW_DASHBOARD]))
        path = host.folder / TOKEN
        path.touch(mode=0o600)
        path.write_text(self._token)
        return host

    def _start_head(self) -> None:
        # Ray Train asks the dashboard what became of its placement groups.
        board = ["--include-dashboard=true", "--dashboard-host", self.head.address]
        self._keep_ray(self.head, ["--head", f"--port={RAY_PORT}", *board])
        self.wait_for(self.head)

    def _keep_ray(self, host: Host, words: list[str]) -> None:
        own = [f"--node-ip-address={host.address}", f"--temp-dir={self._network.seen / 'ray'}"]
        size = [f"--num-cpus={CPUS}", f"--object-store-memory={100 << 20}"]
        start = shlex.join(
            ["ray", "start", *words, *own, *size, "--block", "--disable-usage-stats"]
        )
        host.start("bash", "-c", f"while :; do {start}; sleep 1; done", log="ray.log")
