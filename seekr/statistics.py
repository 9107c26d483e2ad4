"""How sure a figure is: standard errors over rows, and paired tests between two models on the same rows.

OP is a mean over tasks of means over a task's test rows, so rows of a small task weigh more. Everything
here follows that weighting. What it speaks of is the rows: how far the figure would move with other test
rows of the same tasks. How far it moves with another seed only other seeds can tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

# Scores of rows, by task and row id.
Scores = Mapping[str, Mapping[str, float]]
_RESAMPLES = 9999


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """One model against another on the same rows.

    Attributes:
        difference: of OP, the first minus the second.
        standard_error: of the difference over rows.
        p_value: two-sided; how often a difference as large would come about if each row's two scores
            were exchanged at random.
        rows: how many both have.
    """

    difference: float
    standard_error: float
    p_value: float
    rows: int


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, None for fewer than two values."""
    if len(values) < 2:
        return fmean(values), None
    from scipy.stats import sem  # takes a second, and most who summarise have one value

    return fmean(values), float(sem(values))


def op_error(scores: Scores) -> float | None:
    """Return the standard error of OP over test rows; None if a task has fewer than two."""
    errors = [mean_and_error(list(rows.values()))[1] for rows in scores.values()]
    if not errors or any(error is None for error in errors):
        return None
    return math.sqrt(math.fsum(error**2 for error in errors if error is not None)) / len(errors)


def paired(first: Scores, second: Scores, seed: int = 0) -> Paired | None:
    """Compare two models by the rows that both were scored on.

    The test flips the sign of each row's weighted difference (Fisher's randomisation test, 9999 random
    flips, all of them where there are fewer).

    Returns:
        None if there is no task with such rows in both.
    """
    by_task = [_differences(first[task], second[task]) for task in first if task in second]
    by_task = [differences for differences in by_task if differences]
    if not by_task:
        return None
    tasks = len(by_task)
    weighted = np.concatenate([np.asarray(d) / (len(d) * tasks) for d in by_task])
    errors = [mean_and_error(d)[1] or 0.0 for d in by_task]
    return Paired(
        difference=float(weighted.sum()),
        standard_error=math.sqrt(math.fsum(error**2 for error in errors)) / tasks,
        p_value=_sign_flips(weighted, seed),
        rows=len(weighted),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for being several (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _differences(first: Mapping[str, float], second: Mapping[str, float]) -> list[float]:
    return [first[row] - second[row] for row in sorted(first) if row in second]


def _sign_flips(weighted: np.ndarray, seed: int) -> float:
    moved = weighted[weighted != 0]  # a sign of zero changes nothing
    if len(moved) < 2:
        return 1.0
    from scipy.stats import permutation_test

    found = permutation_test(
        (moved,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=500,  # of all resamples at once: rows x resamples numbers
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
