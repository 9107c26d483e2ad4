"""What the student measures while it runs forward: the KL of its attention rows to the teacher's.

`DistillationProbe` is attached to the student like any probe and calls `attention_kl` inside each
layer, so queries and keys are at hand and nothing but [B,S,Q] numbers leaves the layer.

Shape suffixes: B batch, S selected heads, Q query rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seekr.attention import Observation
from seekr.attention_kl import Backend, Geometry, Teacher, attention_kl
from seekr.probes import in_backward
from seekr.spans import SpanCache


class DistillationProbe:
    """Keeps the attention KL of the selected heads.

    After a forward pass `kl_by_layer[layer]` is [B,S,Q]. It is differentiable with respect to the
    layer's queries and keys. A next forward pass replaces it.

    Under non-reentrant activation checkpointing the layer runs again during backward; the second
    run gives autograd its operands back, and the values of the forward pass are kept.

    Args:
        heads_by_layer: Query heads per layer, ascending; layers that are absent are not observed.
        positions_BQ: Padded positions of the query rows, -1 where a batch row has fewer.
        teachers: Per layer the teacher's rows, in the order (B, S, Q).
        epsilon: See `Geometry`.
        backend: See `attention_kl`.
    """

    def __init__(
        self,
        heads_by_layer: Mapping[int, tuple[int, ...]],
        positions_BQ: Tensor,
        teachers: Mapping[int, Teacher],
        *,
        epsilon: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        self.kl_by_layer: dict[int, Tensor] = {}
        self._heads, self._positions_BQ = heads_by_layer, positions_BQ
        self._teachers, self._epsilon = teachers, epsilon
        self._backend: Backend = backend
        self._spans = SpanCache()

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(self._heads)

    def observe(self, seen: Observation) -> None:
        """Measure one layer.

        Raises:
            RuntimeError: a model in training mode runs without autograd, so that nothing could be
                distilled (reentrant checkpointing).
        """
        if seen.training and not torch.is_grad_enabled():
            raise RuntimeError(
                f"attention of layer {seen.layer} is distilled in training mode without "
                "gradients; use gradient checkpointing with use_reentrant=False"
            )
        self._measure(seen)  # pyright: ignore[reportAttributeAccessIssue]

    # The spans are read from the mask's numbers, which a compiled graph does not have: a compiled
    # model leaves its graph here, in the distilled layers only.
    @torch.compiler.disable
    def _measure(self, seen: Observation) -> None:
        geometry = Geometry(
            heads=self._heads[seen.layer],
            positions_BQ=self._positions_BQ,
            spans=self._spans.of(seen),
            scaling=seen.scaling,
            epsilon=self._epsilon,
        )
        kl_BSQ = attention_kl(
            seen.query_BHTD, seen.key_BGTD, self._teachers[seen.layer], geometry, self._backend
        )
        if not in_backward():
            self.kl_by_layer[seen.layer] = kl_BSQ
