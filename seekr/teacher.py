"""What a replay row carries for its students: logits of its answer and rows of its attention maps.

A target is made by the model that has just learnt the row's task, stored as one binary value beside
the row (safetensors, never pickle), and joined to training batches by row id. It holds no padding,
so it fits any batch; `seekr.batch_targets` puts it there.

Shape suffixes: B batch, S selected heads, Q query rows, T tokens, A answer positions, V vocab.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn

from seekr.attention import evaluation_mode, probing, token_positions
from seekr.errors import DataError, StoreError
from seekr.losses import answer_positions
from seekr.probes import RowProbe, exact_dtype
from seekr.prompts import Batch

FloatArray = NDArray[np.floating[Any]]
HeadsByLayer = Mapping[int, Sequence[int]]
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherTarget:
    """One row's targets, without padding.

    Attributes:
        length: Tokens of the row when it was taught.
        shift: Whether logits are those that predict answer tokens (True), or those at the answer
            tokens themselves as in the official code (False).
        logits_AV: Logits in the order of the answer, or None.
        heads_by_layer: Heads whose rows are kept, ascending; empty without attention targets.
        query_positions: [Q] unpadded positions of the kept query rows, ascending.
        attention: Per layer probabilities [S,Q,length], heads in the order of `heads_by_layer`.
    """

    length: int
    shift: bool
    logits_AV: FloatArray | None
    heads_by_layer: dict[int, tuple[int, ...]]
    query_positions: NDArray[np.int64]
    attention: dict[int, FloatArray]


def place_positions(positions: Sequence[NDArray[np.int64]], batch: Batch) -> Tensor:
    """Put unpadded query positions on the batch's padding layout.

    Returns:
        positions_BQ, int64 on the batch's device, -1 after a row's last one.

    Raises:
        DataError: a position lies outside its row.
    """
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
) -> list[TeacherTarget]:
    """Run the teacher over a batch and return each row's targets.

    Args:
        model: Any causal LM; with `heads_by_layer`, one loaded with attn_implementation="seekr".
        heads_by_layer: Heads to keep rows of, or None for no attention targets.
        query_positions: Per row, the unpadded positions of the query rows to keep.
        logits: Whether to keep answer logits.
        shift: False keeps the official code's unshifted logit positions.

    Returns:
        One target per row in batch order, float32 (float64 from a float64 model).
    """
    heads = {layer: tuple(sorted(chosen)) for layer, chosen in (heads_by_layer or {}).items()}
    heads = dict(sorted(heads.items()))
    probe = RowProbe(heads, place_positions(query_positions, batch))
    with evaluation_mode(model), torch.no_grad():
        if heads:
            with probing(model, probe):
                logits_BTV = _forward(model, batch)
        else:
            logits_BTV = _forward(model, batch)
        answers = _answer_logits(logits_BTV, batch, shift) if logits else [None] * len(batch)
        rows_by_layer = {layer: probe.log_rows[layer].exp().cpu() for layer in heads}
    lengths, starts = batch.lengths_B.tolist(), batch.start_B.tolist()
    targets: list[TeacherTarget] = []
    for index, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        kept = query_positions[index].astype(np.int64) if heads else np.zeros(0, dtype=np.int64)
        attention: dict[int, FloatArray] = {
            layer: rows[index, :, : len(kept), start : start + length].contiguous().numpy()
            for layer, rows in rows_by_layer.items()
        }
        target = TeacherTarget(
            length=length,
            shift=shift,
            logits_AV=answers[index],
            heads_by_layer=heads,
            query_positions=kept,
            attention=attention,
        )
        targets.append(target)
    return targets


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    return model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=token_positions(batch.attention_mask_BT),
        use_cache=False,
    ).logits


def _answer_logits(logits_BTV: Tensor, batch: Batch, shift: bool) -> list[FloatArray]:
    row_A, position_A = answer_positions(batch.labels_BT, shift=shift)
    logits_AV = logits_BTV[row_A, position_A].to(exact_dtype(logits_BTV.dtype)).cpu()
    counts = torch.bincount(row_A, minlength=len(batch)).tolist()
    return [rows.numpy() for rows in logits_AV.split(counts)]


def encode_target(target: TeacherTarget, dtype: Literal["float32", "float16"] = "float32") -> bytes:
    """Return the target as safetensors bytes with a checksum; equal targets give equal bytes.

    Args:
        dtype: float16 halves the size; probabilities below 6e-8 become 0 and rows then sum to 1
            within about 1e-3.

    Raises:
        StoreError: a value is NaN or infinite, or too large for float16.
    """
    tensors: dict[str, NDArray[Any]] = {
        "meta": np.array([_FORMAT, target.length, target.shift], dtype=np.int64),
        "query_positions": target.query_positions.astype(np.int64),
    }
    if target.logits_AV is not None:
        tensors["logits"] = _narrow("logits", target.logits_AV, dtype)
    for layer, heads in target.heads_by_layer.items():
        tensors[f"heads.{layer}"] = np.array(heads, dtype=np.int64)
        tensors[f"attention.{layer}"] = _narrow("attention", target.attention[layer], dtype)
    return save(tensors | {"checksum": _checksum(tensors)})


def decode_target(data: bytes) -> TeacherTarget:
    """Read what `encode_target` wrote, as float32.

    Raises:
        StoreError: the bytes are damaged or are not a target.
    """
    try:
        tensors = load(data)
        checksum = tensors.pop("checksum")
        version, length, shift = tensors["meta"].tolist()
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(repr(error)) from error
    if not np.array_equal(checksum, _checksum(tensors)):
        raise _damaged("its checksum differs")
    if version != _FORMAT:
        raise _damaged(f"its format is {version} and this version reads {_FORMAT}")
    layers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("heads."))
    logits = tensors.get("logits")
    return TeacherTarget(
        length=length,
        shift=bool(shift),
        logits_AV=None if logits is None else logits.astype(np.float32),
        heads_by_layer={layer: tuple(tensors[f"heads.{layer}"].tolist()) for layer in layers},
        query_positions=tensors["query_positions"].copy(),
        attention={layer: tensors[f"attention.{layer}"].astype(np.float32) for layer in layers},
    )


def _narrow(name: str, values: FloatArray, dtype: Literal["float32", "float16"]) -> FloatArray:
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(values, dtype=dtype)
    if not np.isfinite(narrow).all():
        raise StoreError(
            f"teacher {name} have a NaN or a value that {dtype} cannot hold; finite numbers are "
            "needed: store targets as float32, or look for a diverged model"
        )
    return narrow


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """CRC-32 over names, dtypes, shapes and contents."""
    value = 0
    for name in sorted(tensors):
        array = tensors[name]
        value = zlib.crc32(f"{name}{array.dtype.str}{array.shape}".encode(), value)
        value = zlib.crc32(array.tobytes(), value)
    return np.array([value], dtype=np.int64)


def _damaged(cause: str) -> StoreError:
    return StoreError(
        f"stored teacher target cannot be read: {cause}; bytes written by encode_target are "
        "expected: remove the teach artifact and run again"
    )
