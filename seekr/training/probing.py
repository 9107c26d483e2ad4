"""Facts asked of the model under way, between optimizer steps, on all workers together.

Every worker scores its share of the probes, all with as many forward passes, because sharded parameters
are gathered together. What comes back are means over all probes, the same on every worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from seekr.fact_probes import Probe, score_probes
from seekr.training.loop import Workers
from seekr.training.strategy import Strategy


class Probing:
    """Sets of probes, and the model they are asked of.

    Args:
        probes: By the name of their set, each with one or more, in an order that is the same on all
            workers.
        batch_size: Probes of a forward pass of a worker.
    """

    def __init__(
        self,
        probes: Mapping[str, Sequence[Probe]],
        strategy: Strategy,
        workers: Workers,
        *,
        batch_size: int,
        pad_id: int,
        device: torch.device,
    ) -> None:
        self._probes, self._strategy, self._workers = probes, strategy, workers
        self._batch_size, self._pad_id, self._device = batch_size, pad_id, device

    def scores(self, prefix: str) -> dict[str, float]:
        """Return `prefix.set.accuracy` and `prefix.set.nll`, means over a set's probes.

        Called on all workers.
        """
        found: dict[str, float] = {}
        for name, probes in sorted(self._probes.items()):
            rank, size = self._workers.rank, self._workers.world_size
            own = list(probes[rank::size])
            missing = -(-len(probes) // size) - len(own)
            with self._strategy.watching():
                accuracy, nll = score_probes(
                    self._strategy.module,
                    own + list(probes[:missing]),
                    batch_size=self._batch_size,
                    pad_id=self._pad_id,
                    device=self._device,
                )
            sums = [float(np.sum(values[: len(own)])) for values in (accuracy, nll)]
            totals = torch.tensor(sums, dtype=torch.float64, device=self._device)
            if size > 1:
                dist.all_reduce(totals)
            accuracy_mean, nll_mean = (totals / len(probes)).tolist()
            found |= {f"{prefix}.{name}.accuracy": accuracy_mean, f"{prefix}.{name}.nll": nll_mean}
        return found
