"""O-LoRA: each task learns low-rank adapters whose input directions are orthogonal to earlier ones'.

The adapters of earlier tasks are merged into the weights and stay as they are; their A matrices are
kept, stacked, as the subspaces that a new task shall not write into. The penalty is the sum of squares
of all products of a new row of A with an earlier one (Wang et al., arXiv 2310.14152).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from seekr.methods.contract import Method, Needs
from seekr.methods.penalty import Past, Shard

_A = ".lora_A."


class OLoRA(Method):
    """L = L_task + orthogonality_weight * sum_k ||A A_k^T||_F^2, over all adapted layers."""

    needs: ClassVar[Needs] = Needs(adapters=True)

    name: Literal["olora"] = "olora"
    orthogonality_weight: float = Field(default=0.5, gt=0)
    """Of the squared products of new and earlier directions."""

    def penalty(self, past: Past) -> OrthogonalityPenalty | None:
        return OrthogonalityPenalty(self.orthogonality_weight, past) if past else None


class OrthogonalityPenalty:
    """Squared products of the rows of A, which lie whole in a shard, with all earlier tasks' rows."""

    def __init__(self, weight: float, past: Past) -> None:
        self.weight = weight
        self._past = past
        self._kept: dict[str, Tensor] = {}

    def add(self, shard: Shard) -> Tensor:
        if _A not in shard.name or not shard.values.numel():
            return shard.values.new_zeros(())
        width = shard.shape[1]
        earlier_PD = self._of(shard, width)
        rows_RD = shard.values.view(-1, width)
        product_RP = rows_RD @ earlier_PD.T
        shard.gradient.view(-1, width).add_(product_RP @ earlier_PD, alpha=2.0 * self.weight)
        return product_RP.square().sum()

    def _of(self, shard: Shard, width: int) -> Tensor:
        if shard.name not in self._kept:
            # Every task had adapters of one rank: a stream has one recipe.
            length = math.prod(shard.shape)
            found = [read(shard.name, 0, length).view(-1, width) for read in self._past.values()]
            self._kept[shard.name] = torch.cat(found).to(shard.values)
        return self._kept[shard.name]
