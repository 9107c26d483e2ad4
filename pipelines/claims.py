"""What lies in a lease folder: who claims it, since when, and which of the claimants still live.

A process is judged only from the kernel it ran under: same host, same boot and same process
namespace. From anywhere else, and after a reboot (which cannot be told from a twin machine with the
same name), only the age of its heartbeat counts, against the store's own clock.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.provenance import redact_argv, user_name
from pipelines.store import Store, StoredFile
from seekr.errors import StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """One process of one machine.

    Attributes:
        host, user, pid, argv: for people; secrets are removed from argv.
        started: start of the process as the kernel counts it, so that a reused pid is another
            process.
        boot: identity of the running kernel.
        namespace: the process namespace; pids of two containers must not be compared.
    """

    host: str
    user: str
    pid: int
    started: str
    boot: str
    namespace: str
    argv: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.user} on host {self.host}, pid {self.pid}"

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        return cls(
            host=socket.gethostname(),
            user=user_name(),
            pid=os.getpid(),
            started=_start_of(os.getpid()) or "",
            boot=_boot(),
            namespace=_namespace(),
            argv=tuple(redact_argv(sys.argv)),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Owner:
        """The inverse of `dataclasses.asdict`. Fields that are missing make an owner nobody can
        judge."""
        texts = {
            key: str(value.get(key, "unknown"))
            for key in ("host", "user", "started", "boot", "namespace")
        }
        argv = value.get("argv") or ()
        return cls(**texts, pid=int(value.get("pid", 0)), argv=tuple(map(str, argv)))

    def is_here(self) -> bool:
        """Whether the process is of this kernel and can be judged: it runs unless it `is_gone`."""
        here = (socket.gethostname(), _boot(), _namespace())
        return (self.host, self.boot, self.namespace) == here and bool(self.boot)

    def is_gone(self) -> bool:
        """True only if the process certainly does not run any more."""
        if not self.is_here():
            return False
        started = _start_of(self.pid)
        if started is not None:
            return started != self.started
        return not _exists(self.pid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One contender.

    Attributes:
        id: unique name of the claim.
        since: when it was written, seconds on the store's clock.
        seen: when its owner last gave a sign of life, on the same clock.
        held: whether its flag is up.
        owner: who it is.
    """

    id: str
    since: float
    seen: float
    held: bool
    owner: Owner


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What one listing shows: the own claim, the other live ones from old to new, files of the
    dead."""

    own: Claim | None
    others: tuple[Claim, ...]
    litter: tuple[str, ...]

    def blocker(self) -> Claim | None:
        """Whom to wait for: a holder, else the oldest claim if that is not the own one."""
        held = [claim for claim in self.others if claim.held]
        own = self.own
        older = [c for c in self.others if own and (c.since, c.id) < (own.since, own.id)]
        return next(iter(held + older), None)


def read_claims(
    store: Store, folder: str, known: dict[str, Owner], own_id: str, ttl: float
) -> Claims:
    """Lists a lease folder and sorts the living from the dead.

    Args:
        store: where it lies.
        folder: the lease folder.
        known: owners already read, by claim id; added to.
        own_id: the claim of the caller, whose beat was written just now and thus tells the time.
        ttl: age in seconds at which a beat means death.
    """
    files: dict[str, dict[str, StoredFile]] = {}
    for file in store.list(folder):
        kind, _, claim_id = file.path.rpartition("/")[2].partition("-")
        if kind in ("claim", "held", "beat"):
            files.setdefault(claim_id, {})[kind] = file
    everything = [file for kinds in files.values() for file in kinds.values()]
    now = max((file.mtime for file in everything), default=0.0)
    if "beat" in files.get(own_id, {}):
        now = files[own_id]["beat"].mtime
    live, litter = [], []
    for claim_id, kinds in files.items():
        claim = _claim(store, claim_id, kinds, known)
        seen = claim.seen if claim else max(file.mtime for file in kinds.values())
        if claim_id != own_id and (now - seen >= ttl or (claim and claim.owner.is_gone())):
            litter += [file.path for file in kinds.values()]
        elif claim:
            live.append(claim)
    live.sort(key=lambda claim: (claim.since, claim.id))
    return Claims(
        own=next((claim for claim in live if claim.id == own_id), None),
        others=tuple(claim for claim in live if claim.id != own_id),
        litter=tuple(litter),
    )


def _claim(
    store: Store, claim_id: str, kinds: Mapping[str, StoredFile], known: dict[str, Owner]
) -> Claim | None:
    file = kinds.get("claim")
    if file is None:
        return None  # just withdrawn, or cleaned away
    if claim_id not in known:
        try:
            known[claim_id] = Owner.from_json(store.read_json(file.path))
        except StoreError:
            if store.stat(file.path) is not None:
                raise
            return None  # withdrawn between the listing and the reading
    return Claim(
        id=claim_id,
        since=file.mtime,
        seen=max(file.mtime, kinds["beat"].mtime if "beat" in kinds else 0.0),
        held="held" in kinds,
        owner=known[claim_id],
    )


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()))  # not Linux


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Start time of a running process in the kernel's own unit; None if it is not there or a
    zombie."""
    try:
        # The second field is the program's name in brackets and may hold anything, even brackets.
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if words[0] in "ZX" else words[19]
    except OSError:
        pass
    if sys.platform.startswith("linux"):
        return None
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _exists(pid: int) -> bool:
    """Whether the pid is in use by something that is more than a zombie, also where /proc hides
    it."""
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
    except psutil.NoSuchProcess:
        pass
    except psutil.Error:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
