"""Layer and head budgets: from an importance per head to the heads that are distilled.

Equation (11): the B_L layers with the largest importance summed over their heads, then the B_H most
important heads among all heads of those layers. Ties go to the lowest layer, then the lowest head.

Shape suffixes: L layers, H heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seekr.errors import ConfigError, DataError, StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSelection:
    """Chosen heads of a model of `num_layers` x `num_heads`, as sorted (layer, head) pairs."""

    num_layers: int
    num_heads: int
    heads: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.heads:
            raise ConfigError(
                "head selection is empty; at least 1 head is needed: raise head_budget"
            )
        if list(self.heads) != sorted(set(self.heads)):
            raise ConfigError("head selection repeats a head or is not sorted; list each head once")
        for layer, head in self.heads:
            if not (0 <= layer < self.num_layers and 0 <= head < self.num_heads):
                raise ConfigError(
                    f"head selection has layer {layer}, head {head}; layers "
                    f"0..{self.num_layers - 1} and heads 0..{self.num_heads - 1} are allowed: "
                    "select heads for this model"
                )

    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Return the heads per layer, for the layers that have any, in ascending order."""
        layers = sorted({layer for layer, _ in self.heads})
        return {
            layer: tuple(head for other, head in self.heads if other == layer) for layer in layers
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "heads": [[layer, head] for layer, head in self.heads],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadSelection:
        """Read what `to_dict` wrote; other keys are ignored.

        Raises:
            StoreError: the values are not a head selection.
        """
        try:
            return cls(
                num_layers=int(values["num_layers"]),
                num_heads=int(values["num_heads"]),
                heads=tuple((int(layer), int(head)) for layer, head in values["heads"]),
            )
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise StoreError(
                f"stored head selection is damaged ({error!r}); num_layers, num_heads and a sorted "
                "list of [layer, head] are expected: remove the artifact and run again"
            ) from error


def select_heads(
    importance_LH: NDArray[np.float64], layer_budget: int, head_budget: int
) -> HeadSelection:
    """Equation (11).

    Args:
        importance_LH: Importance per head, finite.
        layer_budget: B_L, in 1..L.
        head_budget: B_H over all chosen layers, in 1..B_L * H.

    Raises:
        ConfigError: a budget is out of range.
        DataError: an importance is NaN or infinite.
    """
    num_layers, num_heads = importance_LH.shape
    if not np.isfinite(importance_LH).all():
        layer, head = np.argwhere(~np.isfinite(importance_LH))[0]
        raise DataError(
            f"importance of layer {layer}, head {head} is {importance_LH[layer, head]}; finite "
            "numbers are needed: look for a diverged model or damaged scores"
        )
    per_layer = importance_LH.sum(axis=1)
    return _choose(
        num_layers,
        num_heads,
        layer_budget,
        head_budget,
        layer_rank=lambda layer: -float(per_layer[layer]),
        head_rank=lambda layer, head: -float(importance_LH[layer, head]),
    )


def random_heads(
    seed: int, num_layers: int, num_heads: int, layer_budget: int, head_budget: int
) -> HeadSelection:
    """Draw layers and heads at random under the same budgets, the first row of the paper's Table 4.

    A pure function of its arguments.

    Raises:
        ConfigError: a budget is out of range.
    """
    return _choose(
        num_layers,
        num_heads,
        layer_budget,
        head_budget,
        layer_rank=lambda layer: _hash64(f"layer\0{seed}\0{layer}"),
        head_rank=lambda layer, head: _hash64(f"head\0{seed}\0{layer}\0{head}"),
    )


def _choose(
    num_layers: int,
    num_heads: int,
    layer_budget: int,
    head_budget: int,
    *,
    layer_rank: Callable[[int], float],
    head_rank: Callable[[int, int], float],
) -> HeadSelection:
    """Take the layers, then the heads among them, with the smallest ranks."""
    _check_budget("layer_budget", layer_budget, num_layers, f"the model has {num_layers} layers")
    _check_budget(
        "head_budget",
        head_budget,
        layer_budget * num_heads,
        f"{layer_budget} layers of {num_heads} heads are left by layer_budget",
    )
    layers = sorted(range(num_layers), key=lambda layer: (layer_rank(layer), layer))[:layer_budget]
    pairs = [(layer, head) for layer in layers for head in range(num_heads)]
    ranked = sorted(pairs, key=lambda pair: (head_rank(*pair), pair))
    return HeadSelection(
        num_layers=num_layers, num_heads=num_heads, heads=tuple(sorted(ranked[:head_budget]))
    )


def _check_budget(name: str, found: int, most: int, reason: str) -> None:
    if not 1 <= found <= most:
        raise ConfigError(
            f"{name} is {found}; 1..{most} is allowed because {reason}: change {name} to fit the "
            "model"
        )


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"seekr\0{text}".encode()).digest()[:8], "big")
