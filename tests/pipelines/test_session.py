"""A cluster that cannot be reached: told in seconds and in words."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import session
from pipelines.config import StreamConfig
from pipelines.stream import open_stream
from seekr.errors import SeekrError
from tests.pipelines.running import end_shared_cluster
from tests.pipelines.streams import make_stream


@pytest.fixture
def unused() -> Iterator[socket.socket]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


def config_at(folder: Path, address: str) -> StreamConfig:
    end_shared_cluster()  # a session that there is would be used
    path = make_stream(folder, tasks=1, method={"name": "seqft"})
    return open_stream(path, [f"ray.address={address}"]).config


def test_a_head_that_nobody_answers_for_is_told_in_seconds(
    tmp_path: Path, unused: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.session._REACH_SECONDS", 0.5)
    address = f"127.0.0.1:{unused.getsockname()[1]}"
    config = config_at(tmp_path, address)
    begun = time.monotonic()
    with (
        pytest.raises(SeekrError, match="Connection refused") as told,
        session.ray_session([config]),
    ):
        pass
    assert time.monotonic() - begun < 10
    text = str(told.value)
    assert f"the Ray cluster at {address} (ray.address) cannot be used" in text
    assert "RAY_AUTH_MODE" in text and text.endswith("then run again")


def test_a_head_that_is_being_started_is_waited_for(
    unused: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_REACH_SECONDS", 30.0)
    monkeypatch.setattr(session, "_KNOCK_SECONDS", 1.0)
    threading.Timer(0.5, unused.listen).start()
    begun = time.monotonic()
    session._reach(f"127.0.0.1:{unused.getsockname()[1]}")
    assert 0.4 < time.monotonic() - begun < 25


@pytest.mark.parametrize("address", ["auto", "local", "ray://head:10001"])
def test_an_address_that_is_not_a_heads_is_left_to_ray(address: str) -> None:
    begun = time.monotonic()
    session._reach(address)
    assert time.monotonic() - begun < 1
