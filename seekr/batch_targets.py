"""Targets of a batch: unpadded targets of single rows, joined to the padding layout of a batch.

Rows of one batch may come from different tasks with different heads (selections frozen per task).
The batch then distils the union of heads, and a validity mask says which entries are a row's own.

Shape suffixes: B batch, S selected heads, Q query rows, T tokens, A answer positions, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seekr.collation import Batch
from seekr.errors import DataError
from seekr.losses import answer_positions
from seekr.sparse_rows import SparseRows, concatenate
from seekr.teacher import TeacherTarget, place_positions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchTargets:
    """Targets of a batch on its padding layout.

    Attributes:
        heads_by_layer: Union of the rows' heads per layer: what the student's probe asks for.
        positions_BQ: Padded query positions, -1 where there is none.
        attention: Per layer the teacher's rows in the order (B, S, Q), columns being padded key
            positions; no entries where a row has no target.
        valid: Per layer [B,S,Q], True where a row has a target: its own heads and query rows.
        logits: All rows' teacher logits [A,V] or next-token distributions of A rows, by batch row
            then position, or None.
        logit_row_A: Batch row of each.
        logit_position_A: Padded position of the student's logits to compare each with.
        weights_BS: What each row gave to the blocks of tasks, zero for those learnt since, or None.
    """

    heads_by_layer: dict[int, tuple[int, ...]]
    positions_BQ: Tensor
    attention: dict[int, SparseRows]
    valid: dict[int, Tensor]
    logits: Tensor | SparseRows | None
    logit_row_A: Tensor
    logit_position_A: Tensor
    weights_BS: Tensor | None = None

    def to(self, device: torch.device | str) -> BatchTargets:
        """Return the targets with their tensors on `device`."""
        return BatchTargets(
            heads_by_layer=self.heads_by_layer,
            positions_BQ=self.positions_BQ.to(device),
            attention={layer: rows.to(device) for layer, rows in self.attention.items()},
            valid={layer: valid.to(device) for layer, valid in self.valid.items()},
            logits=None if self.logits is None else self.logits.to(device),
            logit_row_A=self.logit_row_A.to(device),
            logit_position_A=self.logit_position_A.to(device),
            weights_BS=None if self.weights_BS is None else self.weights_BS.to(device),
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
    parts = [_by_layer(target) for target in targets]
    joined = {
        layer: _collate_layer(
            layer, heads, targets, [part.get(layer) for part in parts], batch, positions_BQ.shape[1]
        )
        for layer, heads in heads_by_layer.items()
    }
    logits, row_A, position_A = _collate_logits(targets, batch)
    collated = BatchTargets(
        heads_by_layer=heads_by_layer,
        positions_BQ=positions_BQ,
        attention={layer: rows for layer, (rows, _) in joined.items()},
        valid={layer: valid for layer, (_, valid) in joined.items()},
        logits=logits,
        logit_row_A=row_A,
        logit_position_A=position_A,
        weights_BS=_collate_weights(targets),
    )
    return collated.to(batch.input_ids_BT.device)


def _by_layer(target: TeacherTarget | None) -> dict[int, SparseRows]:
    """Split a target's attention rows, which are ordered (layer, S, Q)."""
    if target is None or target.attention is None:
        return {}
    found: dict[int, SparseRows] = {}
    start = 0
    for layer, heads in target.heads_by_layer.items():
        stop = start + len(heads) * len(target.query_positions)
        found[layer] = target.attention.cut(start, stop)
        start = stop
    return found


def _collate_layer(
    layer: int,
    heads: tuple[int, ...],
    targets: Sequence[TeacherTarget | None],
    own: Sequence[SparseRows | None],
    batch: Batch,
    num_queries: int,
) -> tuple[SparseRows, Tensor]:
    """Return (teacher rows, valid [B,S,Q]) of one layer for the union of heads.

    Rows without a target take no entries, so the entries themselves only follow one another.
    """
    valid_BSQ = torch.zeros(len(targets), len(heads), num_queries, dtype=torch.bool)
    moved: list[SparseRows] = []
    for index, (target, start) in enumerate(zip(targets, batch.start_B.tolist(), strict=True)):
        rows = own[index]
        if target is None or rows is None:
            continue
        slots = [heads.index(head) for head in target.heads_by_layer[layer]]
        valid_BSQ[index, slots, : len(target.query_positions)] = True
        moved.append(replace(rows, columns_N=rows.columns_N + start))
    return _spread(concatenate(moved), valid_BSQ.flatten()), valid_BSQ


def _spread(rows: SparseRows, present_R: Tensor) -> SparseRows:
    """Give `rows` the places where `present_R` is True, and no entries to the others."""
    counts_R = torch.zeros(len(present_R), dtype=torch.int64)
    tail_R = rows.tail_R.new_zeros(len(present_R))
    counts_R[present_R], tail_R[present_R] = rows.offsets.diff(), rows.tail_R
    offsets = torch.cat([counts_R.new_zeros(1), counts_R.cumsum(0)])
    return replace(rows, offsets=offsets, tail_R=tail_R)


def _collate_weights(targets: Sequence[TeacherTarget | None]) -> Tensor | None:
    """Return weights [B,S], padded with zeros to the row with most blocks."""
    found = [target.weights for target in targets if target is not None]
    own = [weights for weights in found if weights is not None]
    return pad_sequence(own, batch_first=True) if len(own) == len(targets) else None


def _collate_logits(
    targets: Sequence[TeacherTarget | None], batch: Batch
) -> tuple[Tensor | SparseRows | None, Tensor, Tensor]:
    """Return (logits, batch row [A], padded position [A])."""
    labels_BT = batch.labels_BT.cpu()
    whole: list[Tensor] = []
    sparse: list[SparseRows] = []
    rows: list[Tensor] = []
    positions: list[Tensor] = []
    for index, target in enumerate(targets):
        if target is None or target.logits is None:
            continue
        _, position_A = answer_positions(labels_BT[index : index + 1], shift=target.shift)
        if len(position_A) != len(target.logits):
            raise DataError(
                f"target of row {batch.row_ids[index]} has {len(target.logits)} answer logits "
                f"and the row {len(position_A)} answer tokens; they must be equal: teach the row "
                "again"
            )
        if isinstance(target.logits, SparseRows):
            sparse.append(target.logits)
        else:
            whole.append(target.logits)
        rows.append(torch.full_like(position_A, index))
        positions.append(position_A)
    if not rows:
        return None, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    if whole and sparse:
        raise DataError(
            f"{len(whole)} rows of the batch carry whole logits and {len(sparse)} their largest "
            "ones; all need the same kind: teach again with one setting of logits_kept"
        )
    joined = concatenate(sparse) if sparse else torch.cat(whole)
    return joined, torch.cat(rows), torch.cat(positions)
