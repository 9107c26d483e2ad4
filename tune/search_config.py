"""The schema of a search's YAML, and what can be said against one before anything runs.

A search lays settings over a stream. What decides which trials there are and how they are judged is its
identity; how many run side by side, or what is confirmed afterwards, may change while it goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from pipelines.data_config import Name
from pipelines.section import Section, execution, identity
from tune.goals import Constraint, Goal
from tune.population import Population
from tune.proposals import By
from tune.rules import Halving, Median
from tune.spaces import Range, condition, grid, grid_size


class SearchBy(Section):
    """Who proposes settings."""

    by: By = "tpe"
    """`grid` tries all there are, `random` draws, `tpe` draws near what was good (Optuna)."""
    startup: int = Field(default=8, ge=1)
    """Trials that tpe draws at random first."""


def _scheduler(value: Any) -> Any:
    return value.get("by") if isinstance(value, dict) else getattr(value, "by", None)


AnyScheduler = Annotated[
    Annotated[Halving, Tag("asha")]
    | Annotated[Median, Tag("median")]
    | Annotated[Population, Tag("pbt")],
    Discriminator(_scheduler),
]


class Confirm(Section):
    """What is run once more when all trials have ended, on what the search did not see."""

    best: int = execution(1, ge=0)
    """How many of the best trials; the stream as it is runs beside them."""
    order: tuple[str, ...] | None = execution(None)
    """The tasks' names in another order; null turns theirs round."""
    seeds: tuple[int, ...] = execution((), max_length=50)
    """Seeds; nothing is confirmed without."""


class SearchConfig(Section):
    """A search: a stream, what may be changed in it, and what is wanted."""

    name: Name
    """Names its folder in the stream's storage, and its run in MLflow."""
    stream: Path = execution(...)
    """The stream's YAML file."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Fields of the stream that are different in all trials, such as `train.epochs: 2`."""
    space: dict[str, Range] = Field(min_length=1)
    """What may be chosen, by field of the stream; conditions speak of fields above."""
    search: SearchBy = SearchBy()
    """Who proposes settings."""
    trials: int | None = execution(None, ge=1)
    """How many settings are tried, or members of a population; null is all of a grid. May grow later."""
    seed: int = Field(default=0, ge=0)
    """Of proposals and variations."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, max_length=50)
    """Seeds of the stream that each trial runs with; figures are means over them."""
    goal: Goal = Goal(metric="op")
    """What is wanted."""
    constraints: tuple[Constraint, ...] = ()
    """What must hold of a trial that is chosen."""
    references: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Streams that constraints compare with, by name: fields that differ from the stream's."""
    scheduler: AnyScheduler | None = None
    """Who learns further tasks; null lets every trial learn all."""
    confirm: Confirm = execution(Confirm())
    """What is run once more on another order and other seeds."""
    concurrent: int | None = execution(None, ge=1)
    """Trials side by side; null is as many as the cluster has room for, 2 on a local one."""
    driver_resource: str = execution("node:__internal_head__")
    """Resource of the nodes on which trials are driven, which need no device; the head's by default."""

    @model_validator(mode="after")
    def _parts_go_together(self) -> SearchConfig:
        for check in (self._check_conditions, self._check_search, self._check_constraints):
            check()
        return self

    @property
    def num_trials(self) -> int:
        """How many settings are tried."""
        return self.trials or len(list(grid(self.space)))

    @property
    def bearing(self) -> dict[str, Any]:
        """What makes it this search, as plain values: all that decides which trials there are."""
        members = {"members": self.trials} if isinstance(self.scheduler, Population) else {}
        return identity(self) | members

    @property
    def asked(self) -> tuple[str, ...]:
        """The figures that the goal and the constraints are about."""
        return (*self.goal.measures, *(constraint.measure for constraint in self.constraints))

    def _check_conditions(self) -> None:
        above: list[str] = []
        for field, allowed in self.space.items():
            if allowed.when is not None and (name := condition(allowed.when)[0]) not in above:
                raise ValueError(
                    f"space.{field}: its condition speaks of {name}, which is not a field above it; "
                    f"above are {', '.join(above) or 'none'}"
                )
            above.append(field)
        both = sorted(set(self.space) & set(self.changes))
        if both:
            raise ValueError(f"{', '.join(both)}: in space and in changes; remove it from one")

    def _check_search(self) -> None:
        by, population = self.search.by, isinstance(self.scheduler, Population)
        if by == "grid":
            endless = [name for name, allowed in self.space.items() if allowed.listed() is None]
            if endless:
                raise ValueError(
                    f"search by grid needs lists and {', '.join(endless)} is a range of numbers: give a "
                    "choice, or search by random or tpe"
                )
            if self.trials is not None and self.trials > grid_size(self.space):
                raise ValueError(
                    f"trials is {self.trials} and the grid has {grid_size(self.space)}; leave trials out"
                )
        elif self.trials is None:
            raise ValueError("trials: missing; how many settings are tried?")
        if population and (by != "random" or (self.trials or 0) < 2):
            raise ValueError(
                "scheduler pbt begins with members drawn at random: set search.by to random, and trials "
                "to their number, 2 or more"
            )
        if self.scheduler is not None and self.goal.pareto:
            raise ValueError(
                f"scheduler {self.scheduler.by} ranks trials by one number and goal.pareto has several: "
                "remove the scheduler, or give weights"
            )

    def _check_constraints(self) -> None:
        for constraint in self.constraints:
            if constraint.reference and constraint.reference not in self.references:
                known = ", ".join(self.references) or "none"
                raise ValueError(
                    f"constraint {constraint.text!r} speaks of {constraint.reference}, which is not among "
                    f"the references ({known}); add references: {{{constraint.reference}: "
                    "{method: {name: seqft}}}"
                )


def complaints(error: ValidationError) -> list[str]:
    """Return one line per thing that is wrong with a search: field, what is needed, what was found."""
    lines: list[str] = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"] if part not in ("asha", "median", "pbt"))
        message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if item["type"] == "missing":
            lines.append(f"  {field}: missing; add it")
        elif item["type"] == "extra_forbidden":
            lines.append(f"  {field}: unknown field; see `seekr tune --help`")
        elif not field:
            lines.append(f"  {message}")
        else:
            lines.append(f"  {field}: {message}; found {item.get('input')!r}")
    return lines
