"""What a replay row carries for its students: logits of its answer and rows of its attention maps.

A target is made by the model that has just learnt the row's task, stored as one binary value beside
the row (`seekr.teacher_store`), and joined to training batches by row id. It keeps the largest
probabilities and the rest as one mass, and no padding, so it fits any batch; `seekr.batch_targets`
puts it there.

Shape suffixes: B batch, L layers, S selected heads, Q query rows, T tokens, A answer positions,
V vocab, R rows of attention maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seekr.attention import evaluation_mode, probing
from seekr.collation import Batch
from seekr.errors import DataError
from seekr.forward import batch_logits
from seekr.losses import answer_positions
from seekr.probes import RowProbe
from seekr.softmax import exact_dtype
from seekr.sparse_rows import SparseRows, keep_largest

HeadsByLayer = Mapping[int, Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How much of its distributions a target keeps; None keeps all.

    logits: probabilities per answer token, on average over the row. attention: entries per query
    row of a map, on average over the row's heads and query rows.
    """

    logits: int | None = None
    attention: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherTarget:
    """One row's targets, without padding, on the CPU.

    Attributes:
        length: Tokens of the row when it was taught.
        shift: Whether logits are those that predict answer tokens (True), or those at the answer
            tokens themselves as in the official code (False).
        logits: In the order of the answer: whole logits [A,V], or next-token distributions of A
            rows, or None.
        heads_by_layer: Heads whose rows are kept, ascending; empty without attention targets.
        query_positions: [Q] unpadded positions of the kept query rows, ascending.
        attention: R = (layer, S, Q) rows in this order, columns are unpadded key positions; None
            without attention targets.
        weights: [S] what the row gave to the blocks of tasks (`seekr.shared_attention`), or None.
    """

    length: int
    shift: bool
    logits: Tensor | SparseRows | None
    heads_by_layer: dict[int, tuple[int, ...]]
    query_positions: NDArray[np.int64]
    attention: SparseRows | None
    weights: Tensor | None = None


def place_positions(positions: Sequence[NDArray[np.int64]], batch: Batch) -> Tensor:
    """Put unpadded query positions on the batch's padding layout.

    Returns:
        positions_BQ, int64 on the batch's device, -1 after a row's last one.

    Raises:
        DataError: a position lies outside its row.
        ValueError: the batch is packed.
    """
    batch.check_one_row_each()
    width = max((len(row) for row in positions), default=0)
    placed_BQ = torch.full((len(positions), width), -1, dtype=torch.int64)
    lengths, starts = batch.lengths_B.tolist(), batch.start_B.tolist()
    for index, row in enumerate(positions):
        if len(row) and not (row.min() >= 0 and row.max() < lengths[index]):
            raise DataError(
                f"row {batch.row_ids[index]} has {lengths[index]} tokens and a query position of "
                f"{row.max()}; 0..{lengths[index] - 1} is allowed: teach the row again"
            )
        placed_BQ[index, : len(row)] = torch.from_numpy(row.astype(np.int64)) + starts[index]
    return placed_BQ.to(batch.input_ids_BT.device)


def teach_batch(
    model: nn.Module,
    batch: Batch,
    heads_by_layer: HeadsByLayer | None,
    query_positions: Sequence[NDArray[np.int64]],
    *,
    logits: bool,
    shift: bool = True,
    keep: Keep | None = None,
) -> list[TeacherTarget]:
    """Run the teacher over a batch and return each row's targets.

    Args:
        model: Any causal LM; with `heads_by_layer`, one loaded with attn_implementation="seekr".
        heads_by_layer: Heads to keep rows of, or None for no attention targets.
        query_positions: Per row, the unpadded positions of the query rows to keep.
        logits: Whether to keep answer logits.
        shift: False keeps the official code's unshifted logit positions.
        keep: How much is kept; all by default.

    Returns:
        One target per row in batch order, float32 (float64 from a float64 model).
    """
    keep = keep or Keep()
    heads = {layer: tuple(sorted(chosen)) for layer, chosen in (heads_by_layer or {}).items()}
    heads = dict(sorted(heads.items()))
    probe = RowProbe(heads, place_positions(query_positions, batch))
    with evaluation_mode(model), torch.no_grad():
        if heads:
            with probing(model, probe):
                logits_BTV = batch_logits(model, batch)
        else:
            logits_BTV = batch_logits(model, batch)
        answers = _answer_logits(logits_BTV, batch, shift) if logits else [None] * len(batch)
        targets: list[TeacherTarget] = []
        for index, length in enumerate(batch.lengths_B.tolist()):
            kept = query_positions[index].astype(np.int64) if heads else np.zeros(0, dtype=np.int64)
            target = TeacherTarget(
                length=length,
                shift=shift,
                logits=_kept_logits(answers[index], keep.logits),
                heads_by_layer=heads,
                query_positions=kept,
                attention=_kept_rows(probe, batch, index, len(kept), keep.attention),
            )
            targets.append(target)
    return targets


def _answer_logits(logits_BTV: Tensor, batch: Batch, shift: bool) -> list[Tensor]:
    row_A, position_A = answer_positions(batch.labels_BT, shift=shift)
    logits_AV = logits_BTV[row_A, position_A].to(exact_dtype(logits_BTV.dtype))
    counts = torch.bincount(row_A, minlength=len(batch)).tolist()
    return list(logits_AV.split(counts))


def _kept_logits(logits_AV: Tensor | None, keep: int | None) -> Tensor | SparseRows | None:
    if logits_AV is None or keep is None:
        return None if logits_AV is None else logits_AV.cpu()
    vocab_A = torch.full((len(logits_AV),), logits_AV.shape[1], device=logits_AV.device)
    return keep_largest(logits_AV.softmax(dim=-1), vocab_A, keep).to("cpu")


def _kept_rows(
    probe: RowProbe, batch: Batch, index: int, num_queries: int, keep: int | None
) -> SparseRows | None:
    """Cut one batch row's maps out of the padding and keep their largest entries."""
    start, length = int(batch.start_B[index]), int(batch.lengths_B[index])
    own = [
        rows[index, :, :num_queries, start : start + length].reshape(-1, length)
        for _, rows in sorted(probe.log_rows.items())
    ]
    if not own:
        return None
    log_rows = torch.cat(own)
    possible_R = (log_rows > -torch.inf).sum(dim=-1)
    return keep_largest(log_rows.exp(), possible_R, keep).to("cpu")
