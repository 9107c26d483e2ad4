"""Which settings a trial tries: a pure function of the search and of how earlier trials ended.

Grid and random search look at no outcome. Optuna's tree-structured Parzen estimator does: for trial n it
is told how the trials up to n - lag ended, lag being the number that run side by side, in the order of
their numbers and never more. So the same search proposes the same trials, however fast each runs and
however often the search was killed. The study lives in memory and is told again from the ledger.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.trial import TrialState

from tune.measures import Direction
from tune.spaces import Settings, Space, draw, grid

By = Literal["random", "grid", "tpe"]
_MISSED = "missed"
_CONSTRAINTS = "constraints"  # where Optuna's samplers look for them


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a trial ended.

    Attributes:
        values: of the goal, after the last task it learnt; None if it failed before any.
        tasks: how many it learnt.
        whole: whether these were all, so nobody stopped it early.
        missed: by how much each constraint was missed.
    """

    values: tuple[float, ...] | None
    tasks: int
    whole: bool
    missed: tuple[float, ...] = ()


class Proposals:
    """Settings of trial after trial; ask for them in the order of their numbers.

    Args:
        startup: trials that are drawn at random before outcomes count.
        lag: how many trials run side by side.
    """

    def __init__(
        self,
        space: Space,
        by: By,
        directions: tuple[Direction, ...],
        *,
        seed: int,
        startup: int,
        lag: int,
        constrained: bool,
    ) -> None:
        self._space, self._by, self._lag = space, by, lag
        self._grid = list(grid(space)) if by == "grid" else []
        self._settings: list[dict[str, Any]] = []
        self._other: set[int] = (
            set()
        )  # trials that were begun with settings that are not asked for now
        self._asked: list[optuna.Trial] = []
        self._told = 0
        if by != "grid":
            self._study = optuna.create_study(
                sampler=_sampler(by, seed, startup, constrained),
                directions=["maximize" if way == "max" else "minimize" for way in directions],
            )

    def settings(
        self,
        number: int,
        outcomes: Mapping[int, Outcome],
        begun: Mapping[int, Settings] | None = None,
    ) -> dict[str, Any] | None:
        """Return what trial `number` tries, None while outcomes are missing that it should learn from.

        Args:
            begun: settings of trials that there are already; they hold, though another lag would have
                proposed others.
        """
        while len(self._settings) <= number:
            found = self._next(outcomes)
            if found is None:
                return None
            own = (begun or {}).get(len(self._settings), found)
            if own != found:
                self._other.add(len(self._settings))
            self._settings.append(dict(own))
        return self._settings[number]

    def _next(self, outcomes: Mapping[int, Outcome]) -> dict[str, Any] | None:
        number = len(self._settings)
        if self._by == "grid":
            return self._grid[number]
        if self._by == "tpe":
            while self._told <= number - self._lag:
                if self._told not in outcomes:
                    return None
                self._tell(self._told, outcomes[self._told])
                self._told += 1
        trial = self._study.ask()
        self._asked.append(trial)
        return draw(self._space, trial)

    def _tell(self, number: int, outcome: Outcome) -> None:
        trial, failed = self._asked[number], outcome.values is None
        trial.set_user_attr(_MISSED, list(outcome.missed))
        if failed or number in self._other:
            self._study.tell(trial, state=TrialState.FAIL)
        if failed:
            return
        assert outcome.values is not None
        if number in self._other:
            self._study.add_trial(self._frozen(self._settings[number], outcome))
        elif outcome.whole:
            self._study.tell(trial, list(outcome.values))
        else:
            trial.report(outcome.values[0], outcome.tasks)
            self._study.tell(trial, state=TrialState.PRUNED)

    def _frozen(self, settings: Settings, outcome: Outcome) -> optuna.trial.FrozenTrial:
        assert outcome.values is not None
        return optuna.trial.create_trial(
            state=TrialState.COMPLETE if outcome.whole else TrialState.PRUNED,
            params={field: self._space[field].coded(value) for field, value in settings.items()},
            distributions={field: self._space[field].distribution() for field in settings},
            values=list(outcome.values) if outcome.whole else None,
            intermediate_values={} if outcome.whole else {outcome.tasks: outcome.values[0]},
            user_attrs={_MISSED: list(outcome.missed)},
            system_attrs={_CONSTRAINTS: list(outcome.missed)} if outcome.missed else None,
        )


def _sampler(by: By, seed: int, startup: int, constrained: bool) -> optuna.samplers.BaseSampler:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if by == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=startup,
            multivariate=True,
            group=True,  # fields that exist only under a condition
            constraints_func=_missed if constrained else None,
        )


def _missed(trial: optuna.trial.FrozenTrial) -> list[float]:
    return trial.user_attrs[_MISSED]
