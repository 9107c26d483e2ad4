"""EWC, elastic weight consolidation: weights that earlier tasks depend on are held where they were.

After a task the diagonal of the empirical Fisher information is estimated on its rows (`seekr.fisher`).
The penalty is the sum over earlier tasks of F_k (theta - theta_k)^2 / 2 (Kirkpatrick et al., arXiv
1612.00796). A sum of parabolas is a parabola, so two numbers per weight are kept however many tasks
there were: the summed Fisher and the mean of the thetas under it. What the sum has beyond that parabola
does not depend on the weights, and is left out of the value.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from seekr.methods.contract import Method, Needs
from seekr.methods.penalty import Past, Reader, Shard

FISHER = "fisher"
PRECISION, ANCHOR = ".precision", ".anchor"


class EWC(Method):
    """L = L_task + penalty_weight * sum_k sum_i F_ki (theta_i - theta_ki)^2 / 2."""

    needs: ClassVar[Needs] = Needs(fisher=True)
    preparation_fields: ClassVar[frozenset[str]] = frozenset({"fisher_rows"})

    name: Literal["ewc"] = "ewc"
    penalty_weight: float = Field(default=100.0, gt=0)
    """Lambda. Fisher information is that of a whole answer's log-likelihood."""
    fisher_rows: int | None = Field(default=256, ge=1)
    """Rows of a task that its Fisher information is estimated on, drawn by hash; null takes all."""

    def penalty(self, past: Past) -> QuadraticPenalty | None:
        return QuadraticPenalty(self.penalty_weight, past[FISHER]) if past else None


class QuadraticPenalty:
    """precision * (theta - anchor)^2 / 2, summed over all weights."""

    def __init__(self, weight: float, read: Reader) -> None:
        self.weight = weight
        self._read = read
        self._kept: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def add(self, shard: Shard) -> Tensor:
        precision, anchor = self._of(shard)
        away = shard.values - anchor
        pulled = precision * away
        shard.gradient.add_(pulled, alpha=self.weight)
        return 0.5 * (pulled * away).sum()

    def _of(self, shard: Shard) -> tuple[Tensor, Tensor]:
        key = shard.name, shard.start
        if key not in self._kept:
            found = [
                self._read(shard.name + kind, shard.start, shard.values.numel()).to(shard.values)
                for kind in (PRECISION, ANCHOR)
            ]
            self._kept[key] = found[0], found[1]
        return self._kept[key]
