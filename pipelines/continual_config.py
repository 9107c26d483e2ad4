"""The schema of continual operation: when new data is taken, what a model has to show, who is told.

All of it is execution: it decides when something is computed and what is called the champion, never what a
stage's result is, so no field here enters a fingerprint.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipelines.section import Section, execution

Event = Literal["failed", "held_back", "quarantined", "promoted"]
HELD_BACK = 3
"""The exit code of a run or a tick whose newest model the gate has held back."""
HELD_BACK_LINE = "seekr: all is done, and the gate has held the newest model back"
"""What it prints last where it is to end with 0 all the same; whoever reads its log knows it by this line."""


class InboxConfig(Section):
    """When something that lies in the inbox is whole, and may be taken."""

    settle_seconds: float = execution(60.0, ge=0)
    """A file on a disk is taken once it has not changed for so long; an object store shows whole files
    only, and a folder is whole when it holds `_SUCCESS`."""


class GateConfig(Section):
    """What the newest model has to show to become the champion; scores are in 0..1, all bounds must hold."""

    min_new_score: float | None = execution(None, ge=0, le=1)
    """Of each task that the champion has not learnt."""
    min_new_gain: float | None = execution(None, ge=-1, le=1)
    """The same score less that of the model before the task; with evaluate.forward_transfer."""
    max_forgetting: float | None = execution(None, ge=0, le=1)
    """Of each task: a reference score less the model's."""
    max_mean_forgetting: float | None = execution(None, ge=0, le=1)
    """Mean of the same over the tasks."""
    against: Literal["best", "champion"] = execution("best")
    """The reference: the best score on the task since it was learnt, or the champion's."""
    max_general_loss: float | None = execution(None, ge=0)
    """Of each of general.tasks: the base model's figure less the model's."""

    @model_validator(mode="after")
    def _bounds_something(self) -> GateConfig:
        bounds = [name for name in type(self).model_fields if name != "against"]
        if all(getattr(self, name) is None for name in bounds):
            raise ValueError(f"no bound is set, so every model would pass; set {', '.join(bounds)}")
        return self

    @property
    def looks_back(self) -> bool:
        """Whether a bound compares with what an earlier model could do."""
        bounds = (self.min_new_gain, self.max_forgetting, self.max_mean_forgetting)
        return any(bound is not None for bound in bounds)


class AlertsConfig(Section):
    """A webhook that ticks tell what happened; its address is a secret and never stands in the YAML."""

    url_env: str | None = execution(None, min_length=1)
    """Environment variable that holds the address."""
    url_file: str | None = execution(None, min_length=1)
    """File that holds it, such as a mounted secret."""
    events: tuple[Event, ...] = execution(
        ("failed", "held_back", "quarantined", "promoted"), min_length=1
    )
    """What is told: a tick that failed, a model held back, an arrival quarantined, a new champion."""
    timeout_seconds: float = execution(10.0, gt=0)
    """For one attempt."""
    attempts: int = execution(3, ge=1)
    """With growing pauses between; what could not be told is told by the next tick."""

    @model_validator(mode="before")
    @classmethod
    def _no_literal_address(cls, values: object) -> object:
        if isinstance(values, dict) and "url" in values:
            raise ValueError(
                "url is not a field, as a webhook's address is a secret; put it into an environment "
                "variable or a file, and name that in url_env or url_file"
            )
        return values

    @model_validator(mode="after")
    def _one_address(self) -> AlertsConfig:
        if (self.url_env is None) == (self.url_file is None):
            found = "both are set" if self.url_env is not None else "neither is set"
            raise ValueError(f"one of url_env and url_file is needed; {found}")
        return self
