"""Which keys a query may look at, as one interval per query.

Causal masks, padding on either side, sliding windows, chunks and packed sequences all allow a
contiguous run of keys. Two numbers per query say the same as a T x T mask, so what walks over tiles
of a map knows which tiles are empty without reading it.

Shape suffixes: B batch, H heads, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seekr.attention import Observation
from seekr.errors import UnsupportedModel

_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Query (b, i) may look at keys first_BT[b, i] .. last_BT[b, i], both included; at none where
    last < first. Both are int64."""

    first_BT: Tensor
    last_BT: Tensor


def key_spans(mask_BHTT: Tensor | None, batch: int, tokens: int, device: torch.device) -> Spans:
    """Return the spans that a boolean attention mask stands for; None is plain causal attention.

    Raises:
        UnsupportedModel: the mask differs between heads, or some query may look at keys on both
            sides of a key that it may not look at.
    """
    if mask_BHTT is None:
        query_BT = torch.arange(tokens, device=device).expand(batch, tokens)
        return Spans(torch.zeros_like(query_BT), query_BT)
    if mask_BHTT.shape[1] != 1:
        raise UnsupportedModel(
            f"the attention mask differs between {mask_BHTT.shape[1]} heads; one mask for all heads "
            "is needed to measure or distil attention: choose another model"
        )
    first_BT = torch.empty(batch, tokens, dtype=torch.int64, device=device)
    last_BT = torch.empty_like(first_BT)
    for index in range(batch):
        mask_TT = mask_BHTT[index if len(mask_BHTT) > 1 else 0, 0]
        size = max(1, _CHUNK_ELEMENTS // tokens)
        for start in range(0, tokens, size):
            rows = mask_TT[start : start + size]
            first = rows.view(torch.uint8).argmax(dim=-1)
            count = rows.sum(dim=-1)
            edges = (rows[:, 1:] & ~rows[:, :-1]).sum(dim=-1) + rows[:, 0]
            if bool((edges > 1).any()):
                raise UnsupportedModel(
                    f"query {start + int((edges > 1).nonzero()[0])} of batch row {index} may look "
                    "at keys with a gap between them; one contiguous run per query is needed "
                    "(causal, padded, sliding-window or packed): mend the attention mask"
                )
            first_BT[index, start : start + size] = first
            last_BT[index, start : start + size] = first + count - 1
    return Spans(first_BT, last_BT)


class SpanCache:
    """Spans of the masks of one forward pass: layers share their mask, so each is read once."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor | None, tuple[int, int], Spans]] = []

    def of(self, seen: Observation) -> Spans:
        """Return the spans of the mask that a layer was called with."""
        batch, _, tokens, _ = seen.query_BHTD.shape
        for known, shape, spans in self._known:
            if known is seen.mask_BHTT and shape == (batch, tokens):
                return spans
        spans = key_spans(seen.mask_BHTT, batch, tokens, seen.query_BHTD.device)
        self._known.append((seen.mask_BHTT, (batch, tokens), spans))
        return spans
