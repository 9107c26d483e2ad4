"""Targets of a batch: unpadded targets of single rows, joined to the padding layout of a batch.

Rows of one batch may come from different tasks with different heads (selections frozen per task).
The batch then distils the union of heads, and a validity mask says which entries are a row's own.

Shape suffixes: B batch, S selected heads, Q query rows, T tokens, A answer positions, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seekr.errors import DataError
from seekr.losses import answer_positions
from seekr.prompts import Batch
from seekr.teacher import TeacherTarget, place_positions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchTargets:
    """Targets of a batch on its padding layout.

    Attributes:
        heads_by_layer: Union of the rows' heads per layer: what the student's RowProbe asks for.
        positions_BQ: Padded query positions, -1 where there is none.
        teacher_rows: Per layer probabilities [B,S,Q,T], 0 at padding and where a row has no target.
        valid: Per layer [B,S,Q], True where a row has a target: its own heads and query rows.
        logits_AV: All rows' teacher logits, by batch row then position, or None.
        logit_row_A: Batch row of each.
        logit_position_A: Padded position of the student's logits to compare each with.
    """

    heads_by_layer: dict[int, tuple[int, ...]]
    positions_BQ: Tensor
    teacher_rows: dict[int, Tensor]
    valid: dict[int, Tensor]
    logits_AV: Tensor | None
    logit_row_A: Tensor
    logit_position_A: Tensor

    def to(self, device: torch.device | str) -> BatchTargets:
        """Return the targets with their tensors on `device`."""
        return BatchTargets(
            heads_by_layer=self.heads_by_layer,
            positions_BQ=self.positions_BQ.to(device),
            teacher_rows={layer: rows.to(device) for layer, rows in self.teacher_rows.items()},
            valid={layer: valid.to(device) for layer, valid in self.valid.items()},
            logits_AV=None if self.logits_AV is None else self.logits_AV.to(device),
            logit_row_A=self.logit_row_A.to(device),
            logit_position_A=self.logit_position_A.to(device),
        )


def collate_targets(targets: Sequence[TeacherTarget | None], batch: Batch) -> BatchTargets:
    """Join targets to the batch whose rows they belong to, on the batch's device.

    Args:
        targets: One per batch row, in batch order; None for a row that is not distilled.
        batch: Padded on either side.

    Raises:
        DataError: a target was made for another length or answer than the row has now.
    """
    if len(targets) != len(batch):
        raise ValueError(
            f"{len(targets)} targets for a batch of {len(batch)} rows; one each is needed"
        )
    for row_id, length, target in zip(
        batch.row_ids, batch.lengths_B.tolist(), targets, strict=True
    ):
        if target is not None and target.length != length:
            raise DataError(
                f"target of row {row_id} was made for {target.length} tokens and the row has "
                f"{length}; they must be equal: teach again after a change of template, tokenizer "
                "or max_length"
            )
    nothing = np.zeros(0, dtype=np.int64)
    positions_BQ = place_positions(
        [nothing if target is None else target.query_positions for target in targets], batch
    )
    union: dict[int, set[int]] = {}
    for target in targets:
        for layer, heads in ({} if target is None else target.heads_by_layer).items():
            union.setdefault(layer, set()).update(heads)
    heads_by_layer = {layer: tuple(sorted(union[layer])) for layer in sorted(union)}
    device = batch.input_ids_BT.device
    collated = {
        layer: _collate_layer(layer, heads, targets, batch, positions_BQ.shape[1])
        for layer, heads in heads_by_layer.items()
    }
    logits_AV, row_A, position_A = _collate_logits(targets, batch)
    return BatchTargets(
        heads_by_layer=heads_by_layer,
        positions_BQ=positions_BQ,
        teacher_rows={layer: rows.to(device) for layer, (rows, _) in collated.items()},
        valid={layer: valid.to(device) for layer, (_, valid) in collated.items()},
        logits_AV=None if logits_AV is None else logits_AV.to(device),
        logit_row_A=row_A.to(device),
        logit_position_A=position_A.to(device),
    )


def _collate_layer(
    layer: int,
    heads: tuple[int, ...],
    targets: Sequence[TeacherTarget | None],
    batch: Batch,
    num_queries: int,
) -> tuple[Tensor, Tensor]:
    """Return (teacher rows [B,S,Q,T], valid [B,S,Q]) of one layer for the union of heads."""
    own = [None if target is None else target.attention.get(layer) for target in targets]
    dtype = np.result_type(np.float32, *(rows.dtype for rows in own if rows is not None))
    shape = (len(targets), len(heads), num_queries)
    rows_BSQT = np.zeros((*shape, batch.input_ids_BT.shape[1]), dtype=dtype)
    valid_BSQ = np.zeros(shape, dtype=np.bool_)
    for index, (target, start) in enumerate(zip(targets, batch.start_B.tolist(), strict=True)):
        rows = own[index]
        if target is None or rows is None:
            continue
        slots = [heads.index(head) for head in target.heads_by_layer[layer]]
        queries = len(target.query_positions)
        rows_BSQT[index, slots, :queries, start : start + target.length] = rows
        valid_BSQ[index, slots, :queries] = True
    return torch.from_numpy(rows_BSQT), torch.from_numpy(valid_BSQ)


def _collate_logits(
    targets: Sequence[TeacherTarget | None], batch: Batch
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return (logits [A,V], batch row [A], padded position [A])."""
    labels_BT = batch.labels_BT.cpu()
    logits: list[Tensor] = []
    rows: list[Tensor] = []
    positions: list[Tensor] = []
    for index, target in enumerate(targets):
        if target is None or target.logits_AV is None:
            continue
        _, position_A = answer_positions(labels_BT[index : index + 1], shift=target.shift)
        if len(position_A) != len(target.logits_AV):
            raise DataError(
                f"target of row {batch.row_ids[index]} has {len(target.logits_AV)} answer logits "
                f"and the row {len(position_A)} answer tokens; they must be equal: teach the row "
                "again"
            )
        logits.append(torch.from_numpy(target.logits_AV))
        rows.append(torch.full_like(position_A, index))
        positions.append(position_A)
    if not logits:
        return None, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return torch.cat(logits), torch.cat(rows), torch.cat(positions)
