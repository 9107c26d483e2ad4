"""RecAdam: a task's update fades in while weights are pulled towards where its training began.

No data of earlier tasks is needed: what they taught is in the weights that training starts from. Of step
t = 1, 2, ... the share a = sigmoid(k (t - t0)) of the learning rate goes to Adam's update u, which sees
the task's gradient alone, and the rest to a pull of its own (Chen et al., EMNLP 2020, arXiv 2004.12651):

    theta <- theta - rate * (a * u + (1 - a) * gamma * (theta - theta_0))

So the pull is neither divided by Adam's second moments nor clipped. Weight decay, if any, is part of u and
acts on the weights that were pulled.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from seekr.methods.contract import Method, Needs
from seekr.methods.penalty import Reader, Shard


class RecAdam(Method):
    """L = a(t) * L_task + (1 - a(t)) * pull_weight * |theta - theta_0|^2 / 2, decoupled from Adam."""

    needs: ClassVar[Needs] = Needs(start=True)

    name: Literal["recadam"] = "recadam"
    pull_weight: float = Field(default=5000.0, gt=0)
    """Gamma. Times the learning rate it is the share of the way back that a step goes: at most 1."""
    steepness: float = Field(default=0.5, gt=0)
    """How fast the task takes over, k per step."""
    midpoint: int = Field(default=250, ge=0)
    """Step at which task and pull count alike, t0; well before it next to nothing is learnt."""

    def pull(self, start: Reader) -> AnnealedPull:
        return AnnealedPull(self, start)

    def first_task_settings(self) -> dict[str, Any]:
        return self.loss_settings()


def annealing(step: int, steepness: float, midpoint: int) -> float:
    """Return the task's share of step `step` (from 0): sigmoid(steepness * (step + 1 - midpoint))."""
    x = steepness * (step + 1 - midpoint)
    small = math.exp(-abs(x))
    return (1.0 if x >= 0 else small) / (1.0 + small)


class AnnealedPull:
    """(theta - theta_0)^2 / 2, summed over all trained weights, and the step towards theta_0."""

    def __init__(self, method: RecAdam, start: Reader) -> None:
        self._method = method
        self._read = start
        self._kept: dict[tuple[str, int], Tensor] = {}

    def share(self, step: int) -> float:
        return annealing(step, self._method.steepness, self._method.midpoint)

    def weight(self, step: int) -> float:
        return (1.0 - self.share(step)) * self._method.pull_weight

    def move(self, shard: Shard, step: int, rate: float) -> Tensor:
        away = shard.values - self._of(shard)
        shard.values.sub_(away, alpha=rate * self.weight(step))
        return 0.5 * away.square().sum()

    def _of(self, shard: Shard) -> Tensor:
        key = shard.name, shard.start
        if key not in self._kept:
            found = self._read(shard.name, shard.start, shard.values.numel())
            self._kept[key] = found.to(shard.values)
        return self._kept[key]
