"""A real S3 server for tests: moto in a process of its own, on a free port of the loopback
interface."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from pyarrow import fs

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test/secret+key"
BUCKET = "seekr-tests"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running server with one empty bucket."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, prefix: str, bucket: str = BUCKET) -> str:
        """A store URI with credentials, as a user would write it into the YAML."""
        return (
            f"s3://{ACCESS_KEY}:test%2Fsecret%2Bkey@{bucket}/{prefix}"
            f"?scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"
        )

    def filesystem(self) -> fs.S3FileSystem:
        """The same server behind the store's back."""
        return fs.S3FileSystem(
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            scheme="http",
            endpoint_override=f"127.0.0.1:{self.port}",
            region="us-east-1",
            allow_bucket_creation=True,
        )


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Starts the server, waits until it answers, makes the bucket, and stops it in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = S3Server(port=port)
    try:
        _wait_until_it_answers(server, process)
        server.filesystem().create_dir(BUCKET)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_until_it_answers(server: S3Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"moto_server ended with code {process.returncode}")
        try:
            urllib.request.urlopen(f"{server.endpoint}/moto-api/", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError("moto_server did not answer within 30 s")
