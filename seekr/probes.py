"""Chosen rows of chosen heads' attention maps, computed from queries and keys.

`RowProbe` returns them for teacher targets and for the student's loss. What is summed over whole
maps is in `seekr.score_probes`.

Arithmetic is in float32 or better whatever the model's dtype, outside autocast.

Shape suffixes: B batch, S selected heads, T tokens, Q query rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from seekr.attention import Observation
from seekr.attention_kl import Geometry, student_log_rows
from seekr.spans import SpanCache


class RowProbe:
    """Keeps log-probabilities of chosen query rows of chosen heads.

    After a forward pass `log_rows[layer]` is [B,S,Q,T]: the heads in the order given, the query
    rows in the order of `positions_BQ`, -inf at masked keys and at missing rows. It is
    differentiable with respect to queries and keys. A next forward pass replaces it.

    Under non-reentrant activation checkpointing the layer runs again during backward; the second
    run computes the rows again, for autograd, and the rows of the forward pass are kept.

    Args:
        heads_by_layer: Query heads per layer; layers that are absent are not observed.
        positions_BQ: Padded positions of the query rows, -1 where a row of the batch has fewer.
    """

    def __init__(self, heads_by_layer: Mapping[int, Sequence[int]], positions_BQ: Tensor) -> None:
        self.heads_by_layer = {layer: tuple(heads) for layer, heads in heads_by_layer.items()}
        self.positions_BQ = positions_BQ
        self.log_rows: dict[int, Tensor] = {}
        self._spans = SpanCache()

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(self.heads_by_layer)

    def observe(self, seen: Observation) -> None:
        """Compute the rows of one layer.

        Raises:
            RuntimeError: a model in training mode runs without autograd, so that the rows could not
                be trained on (reentrant checkpointing) or would be a teacher's with dropout.
        """
        if seen.training and not torch.is_grad_enabled():
            raise RuntimeError(
                f"attention rows of layer {seen.layer} are asked of a model in training mode "
                "without gradients; use gradient checkpointing with use_reentrant=False, or "
                "model.eval() to teach"
            )
        geometry = Geometry(
            heads=self.heads_by_layer[seen.layer],
            positions_BQ=self.positions_BQ,
            spans=self._spans.of(seen),
            scaling=seen.scaling,
        )
        rows = student_log_rows(seen.query_BHTD, seen.key_BGTD, geometry)
        if not in_backward():
            self.log_rows[seen.layer] = rows


def in_backward() -> bool:
    """Tell a recomputation of a checkpointed layer from its forward pass."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore
