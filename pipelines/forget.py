"""Forgetting: some rows are taken out of every file of a store, recorded, and the models marked.

The steps are ordered so that a call killed anywhere can be repeated. A request is written first; from
then on no stage begins, and none is running, since each side writes before it looks at the other; nor
does a tick take anything in. Then the copies of arrivals and the artifacts change one after the other,
each under its lease, then pages that may show a row are removed, then the request is marked as carried
out. Whoever calls next completes what was begun.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

from pipelines.arrival_copies import shorten_copies, streams_with_arrivals
from pipelines.arrivals import tick_folder
from pipelines.claims import Owner
from pipelines.erase import clear_unfinished, erase
from pipelines.forget_plan import Plan, make_plan
from pipelines.forgotten import FOLDER, Request, pending
from pipelines.inventory import Inventory
from pipelines.lease import TTL_SECONDS, Lease
from pipelines.store import TEMPORARY_PREFIX, Store
from seekr.errors import StoreError

_STREAMS: Final = "streams"
_REPORT: Final = "report.html"
_RUN_LOG: Final = "last_run.json"
_MLFLOW: Final = "mlflow/artifacts"
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a call has done.

    Attributes:
        completed: requests of calls before it that were stopped.
        plan: its own; None if no rows were given.
        reports: streams whose reports were removed, to be written again.
    """

    completed: tuple[Request, ...]
    plan: Plan | None
    reports: tuple[str, ...]


def forget(
    store: Store,
    row_ids: Sequence[str],
    *,
    reason: str | None = None,
    tell: Tell | None = None,
    ttl: float = TTL_SECONDS,
) -> Outcome:
    """Complete what earlier calls have begun, then take the rows out of the store.

    Args:
        store: opened for writing.
        row_ids: may be empty.
        reason: kept with the request, where everyone can read it.
        tell: told what is done, a sentence at a time.
        ttl: see `lease.Lease`.

    Raises:
        ConfigError: an id is of no row in the store; nothing of this call was done.
        StoreError: a stage is running, or a file cannot be used.
    """
    owner = _owner()
    say = tell or _nobody
    with Lease(store, FOLDER, ttl=ttl, owner=owner) as lease, ExitStack() as stack:
        inventory = Inventory.of(store)
        _refuse_running(inventory, ttl)
        ticks = stack.enter_context(_no_ticks(inventory, owner, ttl))
        begun = pending(store)
        reports: set[str] = set()
        for request in begun:
            say(f"completing the request {request.id} of {request.at[:10]}, which was stopped")
            reports |= _carry_out(store, request, lease, ticks, owner, ttl)
        if not row_ids:
            return Outcome(completed=tuple(begun), plan=None, reports=tuple(sorted(reports)))
        # Looked at anew: what was completed has changed it, and so may a tick that was waited for.
        plan = make_plan(Inventory.of(store), row_ids, owner, reason)
        if plan.request.rows:
            plan.request.begin(store)
            try:
                # Again: a stage that begins after this look finds the request.
                _refuse_running(Inventory.of(store), ttl)
            except BaseException:
                with contextlib.suppress(StoreError):
                    plan.request.withdraw(store)
                raise
            say(f"taking rows out of {len(plan.request.erased)} artifacts")
            reports |= _carry_out(store, plan.request, lease, ticks, owner, ttl)
        return Outcome(completed=tuple(begun), plan=plan, reports=tuple(sorted(reports)))


def look_up(store: Store, row_ids: Sequence[str], reason: str | None = None) -> Plan:
    """Say what `forget` would do; changes nothing.

    Raises:
        ConfigError: an id is of no row in the store.
    """
    return make_plan(Inventory.of(store), row_ids, _owner(), reason)


def _carry_out(
    store: Store,
    request: Request,
    lease: Lease,
    ticks: Mapping[str, Lease],
    owner: Owner,
    ttl: float,
) -> set[str]:
    """Do what a request says; returns streams whose reports were removed."""
    inventory = Inventory.of(store)
    for stream, tick in ticks.items():
        lease.check()
        shorten_copies(inventory, stream, request, tick)
    touched = {*request.erased, *request.learnt}
    for key in inventory.records:
        litter = inventory.litter(key)
        if key not in touched and not litter:
            continue
        lease.check()
        with Lease(store, key, ttl=ttl, owner=owner):
            for name in litter:
                store.remove(f"{key}/{name}")
            if key in touched:
                erase(inventory, key, request)
    for key in inventory.unfinished:
        lease.check()
        with Lease(store, key, ttl=ttl, owner=owner):
            clear_unfinished(inventory, key, request)
    found = _remove_pages(inventory, touched)
    request.end(store)
    return found


@contextmanager
def _no_ticks(inventory: Inventory, owner: Owner, ttl: float) -> Iterator[Mapping[str, Lease]]:
    """Be the only tick of every stream of which something has arrived; provides the leases by stream."""

    def busy(other: Owner) -> None:
        raise StoreError(
            f"{inventory.store.location.shown}: a tick is at work ({other}), which takes in rows. Nothing "
            "was changed. Let it end, then repeat the command"
        )

    with ExitStack() as stack:
        leases = {
            name: Lease(inventory.store, tick_folder(name), ttl=ttl, owner=owner, on_alive=busy)
            for name in streams_with_arrivals(inventory)
        }
        yield {name: stack.enter_context(lease) for name, lease in leases.items()}


def _refuse_running(inventory: Inventory, ttl: float) -> None:
    running = inventory.running(ttl)
    if not running:
        return
    named = "; ".join(f"{key.rpartition('/')[0]} ({owner})" for key, owner in running.items())
    raise StoreError(
        f"{inventory.store.location.shown}: stages are running, which may read the rows or be trained "
        f"on them: {named}. Nothing was changed. Stop them (Ctrl-C lets trainings save) or let "
        "them end, then repeat the command"
    )


def _remove_pages(inventory: Inventory, touched: set[str]) -> set[str]:
    """Remove reports of streams that have touched artifacts, in MLflow's folder too, and what a
    killed writer left; returns the streams."""
    store = inventory.store
    for path in inventory.others:
        folder = path.partition("/")[0]
        name = path.rpartition("/")[2]
        if folder in (_STREAMS, FOLDER) and name.startswith(TEMPORARY_PREFIX):
            store.remove(path)
    pages = [path for path in inventory.others if path.endswith(f"/{_REPORT}")]
    found: set[str] = set()
    for path in pages:
        if path.startswith(f"{_STREAMS}/") and _shows(inventory, path, touched):
            found.add(path.split("/")[1])
            store.remove(path)
    kept = _kept(pages, found)
    for path in pages:
        named = _stream_of(inventory, path) if path.startswith(f"{_MLFLOW}/") else None
        if named is not None and named not in kept:
            store.remove(path)
    return found


def _kept(pages: Sequence[str], removed: set[str]) -> set[str]:
    """Return the streams whose reports stay."""
    own = [path for path in pages if path.startswith(f"{_STREAMS}/")]
    return {path.split("/")[1] for path in own} - removed


def _shows(inventory: Inventory, page: str, touched: set[str]) -> bool:
    """Tell whether a report is about touched artifacts, or may be: its run's log is not complete."""
    path = f"{page.rpartition('/')[0]}/{_RUN_LOG}"
    if path not in inventory.others:
        return True
    log = inventory.store.read_json(path)
    keys = {*log.get("ran", ()), *log.get("reused", ())}
    return "finished_at" not in log or not keys.isdisjoint(touched)


def _stream_of(inventory: Inventory, page: str) -> str | None:
    """Return the stream of a report in MLflow's folder, from the settings beside it."""
    path = f"{page.rpartition('/')[0]}/stream.json"
    return inventory.store.read_json(path)["name"] if path in inventory.others else None


def _owner() -> Owner:
    """Return this process without its arguments: row ids are among them, and leases are files."""
    return replace(Owner.current(), argv=("seekr", "forget"))


def _nobody(text: str) -> None:
    pass
