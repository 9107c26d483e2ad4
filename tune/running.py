"""A search run to its end by Ray Tune; nothing else here computes.

One process drives a search at a time: it holds a lease on the search's folder. What Ray Tune itself writes
is scratch, as the ledger has all that matters.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune
from ray.tune import TuneConfig

from pipelines.config import StreamConfig
from pipelines.demand import needed_at_once
from pipelines.lease import Lease, holder
from pipelines.monitor import start_monitor
from pipelines.provenance import Provenance
from pipelines.session import ray_session
from seekr.errors import ConfigError, SeekrError
from tune.driver import Parcel, PlanSearcher, StepDriver
from tune.plan import Plan, Tell
from tune.search import Search
from tune.search_config import SearchConfig
from tune.watching import heartbeat

_LOCAL_TRIALS = 2
_ATTEMPTS = 3
_A_LITTLE = 0.001  # of a resource that says where a driver may be
_SCRATCH = "ray-tune"


def run_search(
    search: Search,
    *,
    tell: Tell,
    note: Callable[[], None] = lambda: None,
    running: Tell = lambda _: None,
) -> None:
    """Run what is missing of a search.

    Args:
        tell: told of everything that happens, a line each.
        running: told now and then what runs, a line per stage, in another thread.
        note: called after every step, when the ledger has changed.

    Raises:
        ConfigError: another process drives this search, or the cluster can never hold a trial.
        SeekrError: it was stopped before its end.
    """
    ledger, base = search.ledger, search.courses.base
    if (owner := holder(ledger.store, ledger.folder)) is not None:
        raise ConfigError(
            f"search {search.config.name} is driven by {owner}; wait for it, or end it first"
        )
    with Lease(ledger.store, ledger.folder) as lease:
        drivers = search.config.concurrent or _LOCAL_TRIALS
        with ray_session([base.config], drivers=drivers):
            _check_driver(search.config)
            if search.config.concurrent is None and base.config.ray.address is not None:
                drivers = room_for(base.config)

            def told(text: str) -> None:
                tell(text)
                note()

            plan = search.plan(drivers, told)
            plan.begin()
            monitor = start_monitor()
            with heartbeat(monitor, running):
                _tune(search, plan, drivers, monitor)
            lease.check()
        if not plan.ended():
            raise SeekrError(
                f"search {search.config.name} was stopped before its end; go on with `seekr tune resume`"
            )


def room_for(config: StreamConfig) -> int:
    """Return how many trials the cluster of this process has room for, at least 1."""
    total, needs = ray.cluster_resources(), needed_at_once(config)
    return max(1, min(int(total.get(kind, 0) // need) for kind, need in needs.items() if need))


def _tune(search: Search, plan: Plan, drivers: int, monitor: Any) -> None:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    ledger, base = search.ledger, search.courses.base
    parcel = Parcel(
        store=ledger.store,
        jobs=(),
        monitor=monitor,
        provenance=Provenance.capture(base.path.parent.absolute()),
        drivers=drivers,
    )
    bundle = {search.config.driver_resource: _A_LITTLE}
    with _scratch(search) as where:
        tuner = tune.Tuner(
            tune.with_resources(StepDriver, tune.PlacementGroupFactory([bundle])),
            tune_config=TuneConfig(
                search_alg=PlanSearcher(plan, parcel),
                num_samples=-1,
                max_concurrent_trials=drivers,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="search",
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=_ATTEMPTS - 1),
                **where,
            ),
        )
        tuner.fit()


@contextmanager
def _scratch(search: Search) -> Iterator[dict[str, Any]]:
    """Provide a place for Tune's own files, which nobody reads: the ledger has what matters."""
    ledger = search.ledger
    if search.courses.base.config.ray.address is None:
        with tempfile.TemporaryDirectory(prefix="seekr-tune-") as folder:
            yield {"storage_path": folder}
        return
    scratch = f"{ledger.folder}/{_SCRATCH}"
    ledger.store.remove(scratch)
    yield {
        "storage_path": ledger.store.full_path(scratch),
        "storage_filesystem": ledger.store.filesystem,
    }
    ledger.store.remove(scratch)


def _check_driver(config: SearchConfig) -> None:
    known = ray.cluster_resources()
    if config.driver_resource not in known:
        raise ConfigError(
            f"driver_resource: no node has {config.driver_resource!r}; the cluster has "
            f"{', '.join(sorted(known))}"
        )
