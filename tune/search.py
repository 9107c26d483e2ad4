"""A search from its YAML to its end: checked, driven by Ray Tune, written down, and shown.

`open_search` says all there is to say against a search before anything runs. `run_search` is the only thing
here that computes. One process drives a search at a time; it holds a lease on the search's folder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import tune
from ray.tune import TuneConfig

from pipelines.config import StreamConfig
from pipelines.demand import needed_at_once
from pipelines.lease import Lease, holder
from pipelines.load import Kind, apply_override, read_mapping
from pipelines.monitor import start_monitor
from pipelines.provenance import Provenance
from pipelines.session import ray_session
from seekr.errors import ConfigError, SeekrError
from tune.courses import Courses
from tune.driver import Parcel, PlanSearcher, StepDriver
from tune.ledger import Ledger
from tune.measures import known_measures
from tune.plan import Plan
from tune.search_config import SearchConfig, complaints
from tune.spaces import satisfying
from tune.watching import heartbeat

_LOCAL_TRIALS = 2
_ATTEMPTS = 3
_A_LITTLE = 0.001  # of a resource that says where a driver may be
_SCRATCH = "ray-tune"
_BY_STREAM_FIELD = ("changes", "space", "references")
_FILE = Kind(
    name="search",
    fields="name, stream, space and trials",
    example="concurrent=4",
    schema="seekr tune schema",
)
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search of which nothing is known to be wrong, and its ledger."""

    config: SearchConfig
    courses: Courses
    ledger: Ledger

    def plan(self, lag: int = 1, tell: Tell = lambda _: None) -> Plan:
        """Return what decides; `lag` is how many trials run side by side."""
        return Plan(self.courses, self.ledger, lag=lag, tell=tell)


def load_search(path: Path, changes: Sequence[str] = ()) -> SearchConfig:
    """Read a search's YAML; its paths are relative to it.

    Args:
        changes: `field=value` with a YAML value; `goal.metric=bwt` changes one field of a section.

    Raises:
        ConfigError: naming every field that is wrong.
    """
    values = read_mapping(path, _FILE)
    for change in changes:
        _check_change(change)
        apply_override(values, change, _FILE)
    if isinstance(values.get("stream"), str):
        values["stream"] = str(path.parent.absolute() / Path(values["stream"]).expanduser())
    try:
        return SearchConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"search {path} cannot be run:", *complaints(error)]
        raise ConfigError("\n".join(lines)) from error


def _check_change(change: str) -> None:
    """Refuse a change below what is named by fields of the stream, which have dots of their own."""
    section, below, _ = change.partition("=")[0].partition(".")
    if below and section in _BY_STREAM_FIELD:
        raise ConfigError(
            f"--set {change!r}: {section} is changed as a whole, as the names in it are fields of the "
            f"stream: --set '{section}={{...}}'"
        )


def open_search(
    path: Path, changes: Sequence[str] = (), *, begin: bool = False, writable: bool = False
) -> Search:
    """Open a search and what is in its ledger; nothing is computed.

    Args:
        begin: make its folder if there is none; otherwise one is needed.

    Raises:
        ConfigError, DataError: what is wrong with it, its stream, its space or its folder.
    """
    config = load_search(path, changes)
    courses = Courses.of(config, writable=writable)
    _check(config, courses)
    ledger = Ledger(courses.base.store, config.name)
    ledger.open(config, courses.base, begin=begin)
    return Search(config=config, courses=courses, ledger=ledger)


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


def _check(config: SearchConfig, courses: Courses) -> None:
    """Say what is wrong with a search that is well-formed.

    Raises:
        ConfigError: a field of the space that does not exist, cannot have one of its values or changes
            nothing; a figure that no stage yields; an order of other tasks.
    """
    lines = [*_space_complaints(config, courses), *_figure_complaints(config, courses)]
    rule = config.scheduler
    if rule is not None and rule.first > courses.steps:
        lines.append(
            f"  scheduler.first: after {rule.first} tasks, and the stream has {courses.steps} to learn "
            "one after the other"
        )
    own = {task.name for task in courses.base.config.tasks}
    if config.confirm.order is not None and set(config.confirm.order) != own:
        lines.append(
            f"  confirm.order: {', '.join(config.confirm.order)}; the stream's tasks are "
            f"{', '.join(sorted(own))}, each once"
        )
    if lines:
        raise ConfigError("\n".join([f"search {config.name} cannot be run:", *lines]))


def _figure_complaints(config: SearchConfig, courses: Courses) -> list[str]:
    known = known_measures(courses.base.config)
    asked = [("goal", name) for name in config.goal.measures]
    asked += [("constraints", constraint.measure) for constraint in config.constraints]
    return [
        f"  {where}: no stage of the stream yields {name!r}; there are {', '.join(known)}"
        for where, name in asked
        if name not in known
    ]


def _space_complaints(config: SearchConfig, courses: Courses) -> list[str]:
    found: list[str] = []
    for field, allowed in config.space.items():
        above = satisfying(config.space, field)
        if above is None:
            found.append(
                f"  space.{field}: {allowed.when} never holds; give the field above such a value, or "
                "remove this one"
            )
            continue
        complaint = _field_complaint(config, courses, field, above)
        if complaint:
            found.append(f"  space.{field}: {complaint}")
    return found


def _field_complaint(
    config: SearchConfig, courses: Courses, field: str, above: dict[str, Any]
) -> str:
    """Try a field at its corners: they must be allowed, and some stage must differ between them."""
    graphs: set[str] = set()
    corners = config.space[field].corners()
    tasks = len(courses.base.config.tasks)
    for value in corners:
        try:
            course = courses.open([{**above, field: value}] * tasks, courses.base.config.seed)
        except ConfigError as error:
            return str(error).partition("\n")[2].strip() or str(error)
        graphs.add("".join(stage.fingerprint for stage in course.until(tasks)))
    if len(corners) > 1 and len(graphs) == 1:
        return (
            "no stage of the stream depends on it, so all trials would be the same; it says how or where "
            "something runs, or belongs to another method"
        )
    return ""
