"""One holder at a time, whatever dies: real processes that contend on a disk and on S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.claims import Owner
from pipelines.lease import Lease, holder
from pipelines.store import Store
from seekr.errors import LeaseLost
from tests.pipelines.s3_server import S3Server, s3_server

ROOT = Path(__file__).parents[2]

# Enters the lease `rounds` times; inside, increments a counter without any protection of its own.
CONTENDER = """
import sys, time
from pathlib import Path
from pipelines.lease import Lease
from pipelines.store import Store
uri, scratch, rounds, settle, ttl = sys.argv[1], Path(sys.argv[2]), *map(float, sys.argv[3:])
store, log = Store.open(uri, writable=False), []
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(rounds)):
    with Lease(store, "train/t", settle=settle, ttl=ttl) as lease:
        begin = time.monotonic()
        count = int((scratch / "counter").read_text())
        time.sleep(0.02)
        (scratch / "counter").write_text(str(count + 1))
        lease.check()
        log.append((begin, time.monotonic()))
(scratch / f"log-{lease.owner.pid}").write_text(repr(log))
"""

# Takes the lease, says so, and holds it until it is killed.
HOLDER = """
import sys, time
from pipelines.lease import Lease
from pipelines.store import Store
with Lease(Store.open(sys.argv[1]), "train/t", ttl=float(sys.argv[2])) as lease:
    print("holding", flush=True)
    while True:
        time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "root")


def files(store: Store) -> list[str]:
    return [file.path for file in store.list("train/t")]


def contend(store: Store, tmp_path: Path, *, processes: int, rounds: int, settle: float) -> None:
    """Runs contenders at once and checks that their critical sections exclude each other."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "counter").write_text("0")
    command = [sys.executable, "-c", CONTENDER, store.location.uri, str(scratch), str(rounds)]
    command += [str(settle), "20"]
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) for _ in range(processes)
    ]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(timeout=120) for process in running] == [0] * processes
    assert int((scratch / "counter").read_text()) == processes * rounds
    spans = sorted(
        span
        for log in scratch.glob("log-*")
        for span in json.loads(log.read_text().translate(LIST))
    )
    assert len(spans) == processes * rounds
    for (_, end), (begin, _) in pairwise(spans):
        assert end <= begin
    assert files(store) == []


LIST = str.maketrans("()", "[]")


def test_processes_on_a_disk_exclude_each_other(store: Store, tmp_path: Path) -> None:
    contend(store, tmp_path, processes=3, rounds=4, settle=0.05)


def test_processes_on_a_disk_exclude_each_other_without_any_settling(
    store: Store, tmp_path: Path
) -> None:
    # Exclusion rests on the flags; waiting only spares them collisions.
    contend(store, tmp_path, processes=3, rounds=4, settle=0.0)


def test_processes_on_s3_exclude_each_other(server: S3Server, tmp_path: Path) -> None:
    contend(Store.open(server.uri("lease")), tmp_path, processes=3, rounds=2, settle=0.1)


def start_holder(store: Store, ttl: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.location.uri, str(ttl)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_killed_holder_on_this_host_is_replaced_at_once(
    where: str, store: Store, server: S3Server
) -> None:
    if where == "s3":
        store = Store.open(server.uri("killed"))
    process = start_holder(store, ttl=60)
    assert str(process.pid) in str(holder(store, "train/t"))
    process.kill()  # not waited for: to the kernel it is a zombie, which must count as gone, too
    began = time.monotonic()
    with Lease(store, "train/t", ttl=60, settle=0.05 if where == "disk" else 0.5):
        assert time.monotonic() - began < 2
        assert len([name for name in files(store) if "claim-" in name]) == 1  # the dead was cleared
    process.wait()
    assert files(store) == []


def test_a_live_holder_is_waited_for_and_named(store: Store) -> None:
    waited: list[Owner] = []
    process = start_holder(store, ttl=60)

    def on_wait(owner: Owner) -> None:
        waited.append(owner)
        os.kill(process.pid, signal.SIGKILL)

    with Lease(store, "train/t", ttl=60, on_wait=on_wait):
        pass
    process.wait()
    assert [owner.pid for owner in waited] == [process.pid]
    assert str(waited[0]) == f"{waited[0].user} on host {os.uname().nodename}, pid {process.pid}"


def foreign_holder(store: Store, **changes: str) -> None:
    """Writes what a holder on another machine leaves when its machine loses power now."""
    owner = replace(Owner.current(), host="elsewhere", **changes)
    store.write_json("train/t/.lease/claim-0123", asdict(owner))
    store.write_bytes("train/t/.lease/held-0123", b"")
    store.write_bytes("train/t/.lease/beat-0123", b"")


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_silent_foreign_holder_is_replaced_after_the_time_to_live(
    where: str, store: Store, server: S3Server
) -> None:
    if where == "s3":
        store = Store.open(server.uri("foreign"))
    foreign_holder(store)
    began = time.monotonic()
    with Lease(store, "train/t", ttl=3, settle=0.1):
        waited = time.monotonic() - began
    assert 1.9 < waited < 10  # S3 dates by whole seconds
    assert files(store) == []


def test_a_beating_foreign_holder_is_not_replaced(store: Store) -> None:
    foreign_holder(store)
    began, beats = time.monotonic(), 0

    def beat(owner: Owner) -> None:
        nonlocal beats
        assert owner.host == "elsewhere"
        while time.monotonic() - began < 2:
            store.write_bytes("train/t/.lease/beat-0123", b"")
            beats += 1
            time.sleep(0.1)

    with Lease(store, "train/t", ttl=1, on_wait=beat):
        assert time.monotonic() - began > 2.9
    assert beats > 10


def test_who_lives_is_told_from_who_was_killed_elsewhere(store: Store) -> None:
    foreign_holder(store)
    with Lease(store, "train/t", ttl=2, settle=0.1, on_alive=raise_it):
        assert len(files(store)) == 3, "it has taken the place of the one that is silent"
    foreign_holder(store)

    def beat() -> None:
        while not ended.wait(0.3):
            store.write_bytes("train/t/.lease/beat-0123", b"")

    ended = threading.Event()
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ZeroDivisionError), Lease(store, "train/t", ttl=2, on_alive=raise_it):
            pass
    finally:
        ended.set()
        thread.join()
    for file in files(store):
        store.remove(file)
    process = start_holder(store, ttl=60)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), Lease(store, "train/t", ttl=60, on_alive=raise_it):
        pass
    assert time.monotonic() - began < 5, "who runs here is known to live at once"
    process.kill()
    process.wait()


def raise_it(owner: Owner) -> None:
    raise ZeroDivisionError(str(owner))


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({}, False),
        ({"started": "1"}, True),  # the pid was reused
        ({"started": "1", "host": "elsewhere"}, False),
        ({"started": "1", "boot": "another"}, False),  # a reboot, or a twin machine
        ({"started": "1", "namespace": "pid:[1]"}, False),  # another container
        ({"started": "1", "boot": ""}, False),
    ],
)
def test_only_a_process_of_this_kernel_is_judged(change: dict[str, str], gone: bool) -> None:
    assert replace(Owner.current(), **change).is_gone() is gone


def test_a_process_that_ended_is_gone(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    assert replace(Owner.current(), pid=process.pid).is_gone()


def test_a_holder_whose_claim_was_removed_must_not_commit(store: Store) -> None:
    with Lease(store, "train/t", ttl=1) as lease:
        lease.check()
        assert not lease.lost
        for path in files(store):
            store.remove(path)
        with pytest.raises(LeaseLost, match=r"train/t/\.lease: .* its claim was removed"):
            lease.check()
        assert lease.lost
    assert files(store) == []


def test_the_heartbeat_notices_a_removed_claim_by_itself(store: Store) -> None:
    with Lease(store, "train/t", ttl=1) as lease:
        store.remove("train/t/.lease/claim-" + lease._id)
        deadline = time.monotonic() + 3
        while not lease.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        assert lease.lost


def test_a_suspended_holder_is_replaced_and_learns_it(store: Store) -> None:
    # Frozen for longer than the time to live, as a laptop that sleeps; then it wakes and asks.
    code = HOLDER.replace("time.sleep(0.1)", "time.sleep(0.1); lease.check()")
    process = subprocess.Popen(
        [sys.executable, "-c", code, store.location.uri, "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    os.kill(process.pid, signal.SIGSTOP)
    with Lease(store, "train/t", ttl=1) as lease:
        os.kill(process.pid, signal.SIGCONT)
        _, errors = process.communicate(timeout=20)
        assert "LeaseLost" in errors
        lease.check()
    assert process.returncode == 1


def test_a_contender_that_was_cleared_away_queues_again(store: Store) -> None:
    seen: list[str] = []

    def on_wait(owner: Owner) -> None:
        (mine,) = (path for path in files(store) if "claim-" in path and "0123" not in path)
        store.remove(mine)
        seen.append(mine)

    foreign_holder(store)
    with Lease(store, "train/t", ttl=1, on_wait=on_wait) as lease:
        lease.check()
    assert len(seen) == 1


def test_a_claim_that_shows_up_late_with_an_older_date_does_not_displace_the_holder(
    store: Store,
) -> None:
    entered: list[float] = []

    def on_wait(owner: Owner) -> None:
        for path in files(store):
            if "claim-" in path and not path.endswith(first._id):
                os.utime(store.full_path(path), (1_000_000, 1_000_000))

    def second() -> None:
        with Lease(store, "train/t", on_wait=on_wait):
            entered.append(time.monotonic())

    with Lease(store, "train/t") as first:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(1.5)
        first.check()
        left = time.monotonic()
    thread.join(timeout=10)
    assert len(entered) == 1 and entered[0] > left


def test_asking_for_the_holder_leaves_nothing_and_ignores_the_dead(store: Store) -> None:
    assert holder(store, "train/t") is None
    with Lease(store, "train/t") as lease:
        before = sorted(files(store))
        assert holder(store, "train/t") == lease.owner
        assert sorted(files(store)) == before
    assert holder(store, "train/t") is None
    foreign_holder(store)
    assert str(holder(store, "train/t", ttl=30)).endswith(f"on host elsewhere, pid {os.getpid()}")
    time.sleep(0.3)
    assert holder(store, "train/t", ttl=0.2) is None


def test_an_exception_inside_frees_the_lease(store: Store) -> None:
    with pytest.raises(RuntimeError, match="inside"), Lease(store, "train/t"):
        raise RuntimeError("inside")
    assert files(store) == []


def test_a_claim_holds_no_secret_of_the_command_line(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["seekr", "run", "s3://AK:hunter22@bucket/p"])
    with Lease(store, "train/t"):
        (claim,) = (path for path in files(store) if "claim-" in path)
        assert store.read_json(claim)["argv"] == ["seekr", "run", "s3://***@bucket/p"]
