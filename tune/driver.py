"""What Ray Tune runs: steps of a plan, each by an actor that drives a few stages and says how it went.

A Tune trial is one step, not a whole course: to go on after a decision is another step, which finds the
stages before it in the store. So nothing is ever paused or restored, an actor that dies loses at most the
step it was at, and an early stop frees everything because nothing was held. Actors are reused, and with
them the local processes that hold models. A driver itself needs no device; the stages ask for their own.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from pipelines.job import Job
from pipelines.provenance import Provenance
from pipelines.runner import run_stages
from pipelines.session import let_go, ray_session
from pipelines.stage import StageEvent
from pipelines.store import Store
from seekr.errors import SeekrError
from tune.plan import Plan, Step
from tune.watching import BEGUN

_WORK, _RAN, _ERROR = "work", "ran", "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """What an actor gets: the stages of a step, and the circumstances they run in."""

    store: Store
    jobs: Sequence[Job]
    monitor: Any
    provenance: Provenance
    drivers: int


class StepDriver(tune.Trainable):
    """The actor: runs one parcel per Tune trial, and is used again for the next."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the parcel."""
        self._work = config[_WORK]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another parcel."""
        self._work = new_config[_WORK]
        return True

    def step(self) -> dict[str, Any]:
        """Run it; returns which stages were computed, or why it stopped."""
        parcel: Parcel = ray.get(self._work[0])
        try:
            return {"done": True, _RAN: drive(parcel), _ERROR: None}
        except SeekrError as error:
            return {"done": True, _RAN: [], _ERROR: str(error)}
        except Exception as error:  # a stage's own; the search goes on without this trial
            traceback.print_exc()
            return {"done": True, _RAN: [], _ERROR: f"{type(error).__name__}: {error}"}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write nothing: what a step did is in the store."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Read nothing."""

    def cleanup(self) -> None:
        """Let go of the processes that were kept for further stages."""
        let_go()


def drive(parcel: Parcel) -> list[str]:
    """Run what is missing of some stages; returns the keys of those that were computed here."""
    ran: list[str] = []
    configs = list({id(job.config): job.config for job in parcel.jobs}.values())
    parallel = configs[0].ray.parallel_stages
    with ray_session(configs, drivers=parcel.drivers):
        events = run_stages(parcel.store, parcel.jobs, parcel.monitor, parcel.provenance, parallel)
        for event in events:
            if event is not None:
                _show(event, parcel.monitor)
                if event.kind == "finished":
                    ran.append(event.stage.key)
    return ran


def _show(event: StageEvent, monitor: Any) -> None:
    """Let the monitor know which stages run; those that are waited for are somebody else's."""
    if event.kind in ("started", "resumed"):
        monitor.post.remote(event.stage.key, "driver", {BEGUN: time.time()})
    elif event.kind != "waiting":
        monitor.clear.remote(event.stage.key)


class PlanSearcher(Searcher):
    """Ray Tune's view of a plan: what to run next, and what came of it."""

    def __init__(self, plan: Plan, parcel: Parcel) -> None:
        super().__init__(metric=None, mode=None)
        self._plan, self._parcel = plan, parcel
        self._steps: dict[str, Step] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Give Tune nothing to restore it from: whoever goes on with a search makes it from the ledger."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """Return the parcel of the next step, None to be asked again, or that there is no more."""
        step = self._plan.next()
        if step is None:
            if self._plan.ended():
                return Searcher.FINISHED
            if not self._steps:
                raise RuntimeError("the search can neither go on nor end; this is a fault of seekr")
            return None
        self._steps[trial_id] = step
        jobs = [job for course in step.courses for job in course.jobs(step.tasks)]
        # In a list, so that nobody on the way looks into it.
        return {_WORK: [ray.put(replace(self._parcel, jobs=jobs))]}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Note what came of a step."""
        step = self._steps.pop(trial_id, None)
        if step is None:
            return
        if error or result is None or _RAN not in result:
            self._plan.record(step, (), "the process that drove it died again and again")
        else:
            self._plan.record(step, result[_RAN], result[_ERROR])

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the ledger has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing."""
