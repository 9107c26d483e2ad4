"""Which fields decide: how differently the best trials chose them from all trials.

Optuna's PED-ANOVA over a study that is built in memory from the ledger. It compares, field by field, the
distribution of values among the best trials with that among all; a field that is the same in both decides
nothing. Fields that exist only under a condition are weighed by how often they do.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from tune.spaces import Settings, Space

FEWEST = 8
BEST = 0.25


def too_little(values: Sequence[float]) -> str:
    """Return why these values do not tell which fields decide; nothing if they may."""
    if len(values) < FEWEST:
        return f"It takes {FEWEST} trials that learnt all tasks; there are {len(values)}."
    if len(set(values)) == 1:
        return "All trials have the same value, so no field decides."
    return ""


def importances(
    space: Space, settings: Sequence[Settings], values: Sequence[float]
) -> dict[str, float]:
    """Return each field's share, which add up to 1, the largest first; empty if nothing can be told.

    Args:
        settings: of each trial.
        values: of each trial, more is better.
    """
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for own, value in zip(settings, values, strict=True):
        fields = [field for field in space if field in own]
        study.add_trial(
            optuna.trial.create_trial(
                params={field: space[field].coded(own[field]) for field in fields},
                distributions={field: space[field].distribution() for field in fields},
                value=value,
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # what it warns of is an equal share for all: said by zeros here
        found = get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST), normalize=False
        )
    # Of few trials the estimated distributions differ even where all trials chose the same.
    told = {f: found.get(f, 0.0) if _varied(f, settings) else 0.0 for f in space}
    total = sum(told.values())
    if not total > 0:
        return {}
    shares = {field: share / total for field, share in told.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _varied(field: str, settings: Sequence[Settings]) -> bool:
    return len({repr(own.get(field)) for own in settings}) > 1
