"""Population based training, a task at a time: after each task the worst copy the best and vary them.

All members learn a task before anyone learns the next, so what happens next is a function of the figures
and the seed. A member that copies another continues from that one's stages (its model, its replay rows, its
heads) under settings of its own: the other's, some of them moved a little or drawn anew (Jaderberg et al.,
2017). Nothing is copied in the store, as stages are found by what they are made of.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from pydantic import Field

from pipelines.section import Section
from tune.spaces import Settings, Space, draw


class Population(Section):
    """The population, and how it changes after each task."""

    by: Literal["pbt"] = "pbt"
    first: int = Field(default=1, ge=1)
    """Tasks that are learnt before anyone copies."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the members that copies, and share that is copied."""
    factor: float = Field(default=1.25, gt=1)
    """By how much a number of a range is scaled up or down."""
    anew: float = Field(default=0.25, ge=0, le=1)
    """Probability that a field is drawn anew instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """What a member that copies does next.

    Attributes:
        source: the member that it continues from.
        settings: with which.
    """

    source: int
    settings: dict[str, Any]


def copies(
    rule: Population,
    space: Space,
    values: Sequence[float],
    settings: Sequence[Settings],
    *,
    seed: int,
    tasks: int,
) -> dict[int, Copy]:
    """Return which members copy whom after a task.

    Args:
        values: of each member, more is better; NaN for those that have ended, which do not copy.
        settings: with which each member has learnt this task.
        tasks: how many are learnt.
    """
    alive = [member for member, value in enumerate(values) if not math.isnan(value)]
    count = min(math.ceil(len(alive) * rule.quantile), len(alive) // 2)
    if tasks < rule.first or count == 0:
        return {}
    ranked = sorted(alive, key=lambda member: (-values[member], member))
    best, worst = ranked[:count], ranked[-count:]
    found: dict[int, Copy] = {}
    for member in worst:
        if values[member] == values[best[0]]:  # nothing to gain
            continue
        source = random.Random(f"{seed}/{tasks}/{member}")
        chosen = source.choice(best)
        varied = vary(rule, space, settings[chosen], source)
        found[member] = Copy(source=chosen, settings=varied)
    return found


def vary(
    rule: Population, space: Space, settings: Settings, source: random.Random
) -> dict[str, Any]:
    """Return settings near given ones; conditions of the space hold in them."""
    fresh = _draw(space, source.getrandbits(31))
    varied: dict[str, Any] = {}
    for field, allowed in space.items():
        up, anew = source.random() < 0.5, source.random() < rule.anew
        if not allowed.holds(varied):
            continue
        if field not in settings or anew:
            # A condition may hold now that did not hold in the drawn settings.
            value = fresh.get(field, allowed.corners()[0])
        else:
            value = allowed.moved(settings[field], rule.factor, up)
        varied[field] = value
    return varied


def _draw(space: Space, seed: int) -> dict[str, Any]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return draw(space, study.ask())
