"""Single flight: of all the runs that want one folder of a store, one works and the others wait.

Object stores seen through pyarrow have no conditional write, so a lease is made of claims. A
contender writes `claim-<id>.json` once and touches `beat-<id>` while it lives; the claims' time
stamps, given by the store, put them in order. The oldest live claim that sees no holder waits for a
moment, so that claims written at the same time become visible, then raises its flag `held-<id>` and
looks once more: it holds only if nobody else's flag is up, otherwise it takes its own down and
starts over. Of two that raise a flag at once at least one sees the other, because each writes
before it reads. So at most one holds, whatever the clocks say, as long as the store shows a
finished write to every later listing (a disk, S3 and Google Cloud Storage do); the order of the
claims only decides who is next.

A claim is dead when its beat is older than the time to live, measured by the store's own clock, or
at once when its process ran under this very kernel and is gone. A run that was suspended for longer
than that may find itself replaced: `check` says so, and is called just before anything is
committed.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import Final
from uuid import uuid4
from weakref import WeakSet

from pipelines.claims import Claims, Owner, read_claims
from pipelines.store import Store
from seekr.errors import LeaseLost, StoreError

FOLDER: Final = ".lease"
TTL_SECONDS: Final = 30.0
BEATS_PER_TTL: Final = 5
SETTLE_LOCAL_SECONDS: Final = 0.05
SETTLE_REMOTE_SECONDS: Final = 0.5
# What this process holds or waits for, for `release_all`.
_mine: WeakSet[Lease] = WeakSet()


class Lease:
    """Holds `{folder}/.lease` of a store for the time of a `with` block, waiting for it first.

    Attributes:
        owner: this process, as others see it.

    Args:
        store: where the folder lies.
        folder: what only one run may work on, relative to the store's root.
        ttl: seconds without a heartbeat after which a run counts as dead. Must be much longer than
            a request to the store takes, and than the resolution of its time stamps.
        settle: seconds to wait before the flag is raised, so that claims written at the same time
            are seen and need not collide.
        on_wait: called with the owner that is waited for, each time this becomes another one.
        on_alive: called with that owner once it is certain that it lives: it runs on this machine, or was
            heard of again. Whoever was killed elsewhere is replaced without this call.
        owner: how this process is shown to others, where its arguments are not for them.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        *,
        ttl: float = TTL_SECONDS,
        settle: float | None = None,
        on_wait: Callable[[Owner], None] | None = None,
        on_alive: Callable[[Owner], None] | None = None,
        owner: Owner | None = None,
    ) -> None:
        self.owner = owner or Owner.current()
        self._store = store
        self._folder = f"{folder}/{FOLDER}"
        self._ttl = ttl
        self._settle = settle if settle is not None else _default_settle(store)
        self._on_wait, self._on_alive = on_wait, on_alive
        self._id = uuid4().hex
        self._known: dict[str, Owner] = {}
        self._taken = False
        self._last_beat = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="seekr-lease", daemon=True)

    def __enter__(self) -> Lease:
        _mine.add(self)
        try:
            self._wait_for_turn()
        except BaseException:
            self._withdraw()
            raise
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def abandon(self) -> None:
        """Count the lease as lost, though nobody else may have it yet."""
        self._taken = True

    def release(self) -> None:
        """Give up, holding or waiting: others need not wait, and nothing more may be committed."""
        self.abandon()
        self._end()

    def _end(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        # The work is done or failed by now; a claim that cannot be removed dies by its beat.
        with contextlib.suppress(StoreError):
            self._withdraw()

    @property
    def lost(self) -> bool:
        """Whether the work may be in vain: the lease was taken over, or no heartbeat got through.

        Cheap, for long computations that want to stop early. `check` asks the store and decides.
        """
        return self._taken or time.monotonic() - self._last_beat > self._ttl

    def check(self) -> None:
        """Asks the store whether this run still holds the lease. Call it just before a commit.

        Raises:
            LeaseLost: another run holds it, or this run's claim was removed.
            StoreError: the store cannot be asked.
        """
        claims = self._look(rejoin=False)
        rivals = [c for c in claims.others if c.held]
        self._taken = self._taken or claims.own is None or bool(rivals)
        if not self._taken:
            return
        who = f"held by {rivals[0].owner}" if rivals else "and its claim was removed"
        raise LeaseLost(
            f"{self._store.uri_for(self._folder)}: the lease of {self.owner} was taken over, "
            f"{who}. A run counts as dead after {self._ttl:g} s without a heartbeat (was this "
            "machine suspended, or the store out of reach?). Nothing was committed; run again."
        )

    def _wait_for_turn(self) -> None:
        pause, waiting_for, first_seen = max(self._settle, 0.02), "", 0.0
        while True:
            blocker = self._look(rejoin=True).blocker()
            if blocker is None:
                time.sleep(self._settle)
                if self._look(rejoin=True).blocker() is None and self._raise_flag():
                    return
                continue
            if blocker.id != waiting_for:
                first_seen = blocker.seen
                if self._on_wait:
                    self._on_wait(blocker.owner)
            waiting_for = blocker.id
            if self._on_alive and (blocker.owner.is_here() or blocker.seen > first_seen):
                self._on_alive(blocker.owner)
            time.sleep(pause)
            pause = min(pause * 2, max(self._settle, 0.5), self._ttl / BEATS_PER_TTL)

    def _raise_flag(self) -> bool:
        """Puts the flag up; takes it down again if somebody else's is up, too."""
        self._write("held")
        claims = self._look(rejoin=True)
        if claims.own is not None and not any(claim.held for claim in claims.others):
            self._clean(claims)
            return True
        self._store.remove(self._path("held"))
        time.sleep(self._settle * random.uniform(0.5, 2.0))
        return False

    def _look(self, *, rejoin: bool) -> Claims:
        """Beats, then lists: whoever lists after this sees that we live.

        Args:
            rejoin: write the claim (again) where it is missing; a contender that slept too long was
                cleaned away and queues again.

        Raises:
            LeaseLost: this process has given the lease up.
        """
        if self._stop.is_set():
            raise LeaseLost(
                f"{self._store.uri_for(self._folder)}: the lease of {self.owner} was given up, as "
                "its run was asked to stop. Nothing was committed; run again."
            )
        self._touch()
        claims = read_claims(self._store, self._folder, self._known, self._id, self._ttl)
        if claims.own is None and rejoin:
            self._write("claim", json.dumps(asdict(self.owner)).encode())
            claims = read_claims(self._store, self._folder, self._known, self._id, self._ttl)
        return claims

    def _touch(self) -> None:
        self._write("beat")
        self._last_beat = time.monotonic()

    def _beat(self) -> None:
        while not self._stop.wait(self._ttl / BEATS_PER_TTL):
            try:
                self._touch()
                self._taken = self._taken or self._store.stat(self._path("claim")) is None
            except StoreError:
                continue  # the next one may get through; `lost` tells when none did for too long

    def _write(self, kind: str, content: bytes = b"") -> None:
        # A power cut ends the owner as well, so nothing here has to outlive one.
        self._store.write_bytes(self._path(kind), content, durable=False)

    def _path(self, kind: str) -> str:
        return f"{self._folder}/{kind}-{self._id}"

    def _withdraw(self) -> None:
        for kind in ("claim", "held", "beat"):
            self._store.remove(self._path(kind))

    def _clean(self, claims: Claims) -> None:
        for path in claims.litter:
            self._store.remove(path)


def holder(store: Store, folder: str, *, ttl: float = TTL_SECONDS) -> Owner | None:
    """Who works on `folder` now; None if nobody does. Needs a writable store, leaves nothing in
    it."""
    place, probe = f"{folder}/{FOLDER}", uuid4().hex
    if not any("/held-" in file.path for file in store.list(place)):
        return None
    beat = f"{place}/beat-{probe}"
    try:
        store.write_bytes(beat, b"")  # the only way to read the store's clock
        claims = read_claims(store, place, {}, probe, ttl)
    finally:
        store.remove(beat)
    return next((claim.owner for claim in claims.others if claim.held), None)


def abandon_all() -> None:
    """Let nothing more be committed under this process's leases; others go on waiting for them."""
    for lease in list(_mine):
        lease.abandon()


def release_all() -> None:
    """Give up all leases of this process, when nothing it has started writes any more."""
    for lease in list(_mine):
        lease.release()


def _default_settle(store: Store) -> float:
    return SETTLE_LOCAL_SECONDS if store.is_local else SETTLE_REMOTE_SECONDS
