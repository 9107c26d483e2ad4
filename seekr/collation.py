"""From tokens to a batch: rows padded to one length, or packed one after another.

Padding gives every row a sequence of its own. Packing puts whole rows into one sequence and spends
nothing on padding; there positions that count from 0 in every row tell the model where a row begins,
and no row sees another (`seekr.forward.check_packable`).

Shape suffixes: B batch, T tokens. Of a packed batch, `lengths_B` and `start_B` have an entry per row,
and everything [B,T] has the one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from seekr.prompts import TokenizedRow

IGNORE_LABEL = -100

Side = Literal["left", "right"]
# Of a row, and with _BT of a batch.
_PER_TOKEN = ("weights", "reference_nll")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows on one device. Integers are int64; labels are -100 at prompts and padding.

    A row's real tokens are those from start_B (0 under right padding) to start_B + lengths_B, in its
    own sequence or, packed, in the only one. `row_ids` names the rows in order, and `len` counts
    them. What losses sum per batch row (`seekr.losses`) they sum per sequence: a packed batch has
    one such sum, over all its rows.

    `position_ids_BT` is set for packed batches alone; their attention mask is 1 throughout.
    `weights_BT` and `reference_nll_BT` are what rows carry per token (`TokenizedRow`), or None.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    labels_BT: torch.Tensor
    row_ids: tuple[str, ...]
    lengths_B: torch.Tensor
    start_B: torch.Tensor
    position_ids_BT: torch.Tensor | None = None
    weights_BT: torch.Tensor | None = None
    reference_nll_BT: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.row_ids)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        tensors = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **tensors)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what a model is called with, beside use_cache=False.

        A packed batch comes without attention mask: only then, and only without a cache, does
        transformers read from the positions where a row begins.
        """
        if self.position_ids_BT is None:
            return {"input_ids": self.input_ids_BT, "attention_mask": self.attention_mask_BT}
        return {"input_ids": self.input_ids_BT, "position_ids": self.position_ids_BT}

    def check_one_row_each(self) -> None:
        """Check that every row has a sequence of its own. Raises ValueError: the batch is packed."""
        if self.position_ids_BT is not None:
            raise ValueError(
                f"a batch of {len(self)} packed rows is in one sequence; a sequence per row is "
                "needed here: use collate, not collate_packed"
            )


def collate(
    rows: Sequence[TokenizedRow], pad_id: int, side: Side = "right", multiple_of: int = 1
) -> Batch:
    """Pad rows to the longest, rounded up to a multiple of `multiple_of`; label the answers."""
    return _pad(rows, [len(row.input_ids) for row in rows], pad_id, side, multiple_of)


def collate_prompts(rows: Sequence[TokenizedRow], pad_id: int) -> Batch:
    """Pad the prompts alone, on the left, for generation. All labels are -100."""
    return _pad(rows, [row.prompt_length for row in rows], pad_id, "left", 1)


def collate_packed(rows: Sequence[TokenizedRow]) -> Batch:
    """Join rows into one sequence without padding; label the answers.

    A row's first token is never a label, as it would be predicted from the row before it.
    """
    _check_some(rows)
    lengths = [len(row.input_ids) for row in rows]
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    labels = [_labels(row, max(1, row.prompt_length)) for row in rows]
    positions = [np.arange(length, dtype=np.int64) for length in lengths]
    return Batch(
        input_ids_BT=torch.from_numpy(ids)[None],
        attention_mask_BT=torch.ones(1, len(ids), dtype=torch.int64),
        labels_BT=torch.from_numpy(np.concatenate(labels))[None],
        row_ids=tuple(row.row_id for row in rows),
        lengths_B=torch.tensor(lengths, dtype=torch.int64),
        start_B=torch.from_numpy(np.cumsum([0, *lengths[:-1]], dtype=np.int64)),
        position_ids_BT=torch.from_numpy(np.concatenate(positions))[None],
        **{
            f"{name}_BT": torch.from_numpy(np.concatenate(values))[None]
            for name in _PER_TOKEN
            if (values := _per_token(rows, name)) is not None
        },
    )


def _labels(row: TokenizedRow, first: int) -> NDArray[np.int64]:
    labels = row.input_ids.astype(np.int64)
    labels[:first] = IGNORE_LABEL
    return labels


def _per_token(rows: Sequence[TokenizedRow], name: str) -> list[NDArray[np.float32]] | None:
    """Return what rows carry per token, None if none does; one of them without any is an error."""
    values = [getattr(row, name) for row in rows]
    if all(value is None for value in values):
        return None
    for row, value in zip(rows, values, strict=True):
        if value is None or len(value) != len(row.input_ids):
            found = "none" if value is None else f"{len(value)}"
            raise ValueError(
                f"row {row.row_id} has {len(row.input_ids)} tokens and {found} of {name}; one per "
                "token is needed when another row of the batch has them"
            )
    return values


def _check_some(rows: Sequence[TokenizedRow]) -> None:
    if not rows:
        raise ValueError("cannot collate an empty list of rows")


def _pad(
    rows: Sequence[TokenizedRow], lengths: Sequence[int], pad_id: int, side: Side, multiple_of: int
) -> Batch:
    _check_some(rows)
    width = -(-max(lengths) // multiple_of) * multiple_of
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, IGNORE_LABEL)
    starts = [width - length if side == "left" else 0 for length in lengths]
    for index, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        ids[index, start : start + length] = row.input_ids[:length]
        mask[index, start : start + length] = 1
        answer = row.input_ids[row.prompt_length : length]
        labels[index, start + row.prompt_length : start + length] = answer
    per_token: dict[str, torch.Tensor] = {}
    for name in _PER_TOKEN:
        if (values := _per_token(rows, name)) is not None:
            padded = np.zeros(ids.shape, dtype=np.float32)
            for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                padded[index, start : start + length] = values[index][:length]
            per_token[f"{name}_BT"] = torch.from_numpy(padded)
    return Batch(
        input_ids_BT=torch.from_numpy(ids),
        attention_mask_BT=torch.from_numpy(mask),
        labels_BT=torch.from_numpy(labels),
        row_ids=tuple(row.row_id for row in rows),
        lengths_B=torch.tensor(list(lengths), dtype=torch.int64),
        start_B=torch.tensor(starts, dtype=torch.int64),
        **per_token,
    )
