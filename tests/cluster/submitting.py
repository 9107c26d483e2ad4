"""Streams for clusters, and `seekr cluster` called as from a shell but in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cluster.cli import app
from seekr.errors import SeekrError
from tests.cluster.standing_in import ApiServerProcess
from tests.pipelines.streams import stream_values, write_yaml

WAIT_SECONDS = 120.0


def kube_stream(folder: Path, *, tasks: int = 1, gated: bool = False, **cluster: Any) -> Path:
    """Write a stream with a cluster section; `cluster` adds to it. What it names need not be there."""
    values = stream_values(tasks=tasks, method={"name": "seqft"})
    if gated:
        values["gate"] = {"min_new_score": 0.9}
    section: dict[str, Any] = {
        "image": "registry.example/seekr:1.0",
        "storage": {"claim": {"size": "9Gi"}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    return write_yaml(folder / "stream.yaml", values | {"cluster": section | cluster})


class Told:
    """What a command has said, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def seekr_cluster(*words: str | Path) -> Told:
    """Run `seekr cluster WORDS`; errors become a message and a code, as `seekr` has it."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    error = result.exception
    if isinstance(error, SeekrError):
        return Told(error.exit_code, result.stdout, f"{result.stderr}error: {error}")
    if error is not None and not isinstance(error, SystemExit | typer.Exit):
        raise error
    return Told(result.exit_code, result.stdout, result.stderr)


class User:
    """Somebody with a kubeconfig."""

    def __init__(self, server: ApiServerProcess, folder: Path, name: str = "admin") -> None:
        self.kubeconfig = server.kubeconfig(folder, user=name)

    def __call__(self, command: str, stream: Path, *words: str) -> Told:
        return seekr_cluster(command, stream, *words, "--kubeconfig", self.kubeconfig)


def until(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail("it never came to be")
        time.sleep(0.05)
