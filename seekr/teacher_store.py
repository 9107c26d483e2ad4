"""Teacher targets as bytes: few, checked, and readable without pickle.

A target is one safetensors value beside its replay row. Sparse rows are written as entry counts,
column differences and probabilities. With 16 bits a probability is a multiple of 1 / 65535, rounded
so that a row and its tail add up to exactly 1 and the tail needs no place; with 32 bits values and
tails are stored as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from seekr.errors import StoreError
from seekr.packing import pack, unpack
from seekr.sparse_rows import SparseRows
from seekr.teacher import TeacherTarget

Bits = Literal[16, 32]
Arrays = dict[str, NDArray[Any]]
_FORMAT = 2
_WHOLE = 65535  # the code of probability 1


def encode_target(target: TeacherTarget, bits: Bits = 16) -> bytes:
    """Return the target as safetensors bytes with a checksum.

    Args:
        bits: Of a stored number. 16: probabilities to within 1 / 65535, whole logits as float16.
            32: float32.

    Raises:
        StoreError: a value is NaN or infinite, or too large for its type, or a row is no
            distribution.
    """
    heads = [(layer, head) for layer, chosen in target.heads_by_layer.items() for head in chosen]
    arrays: Arrays = {
        "meta": np.array([_FORMAT, target.length, target.shift, bits], dtype=np.int64),
        "heads": np.array(heads, dtype=np.int32).reshape(-1, 2),
        "positions": pack(target.query_positions),
    }
    if isinstance(target.logits, SparseRows):
        arrays |= _encode_rows("logits", target.logits, bits)
    elif target.logits is not None:
        arrays["logits"] = _narrow(target.logits, "float16" if bits == 16 else "float32")
    if target.attention is not None:
        arrays |= _encode_rows("attention", target.attention, bits)
    if target.weights is not None:
        arrays["weights"] = _narrow(target.weights, "float32", "weights")
    return save(arrays | {"checksum": _checksum(arrays)})


def decode_target(data: bytes) -> TeacherTarget:
    """Read what `encode_target` wrote, as float32.

    Raises:
        StoreError: the bytes are damaged or are not a target.
    """
    try:
        arrays = load(data)
        checksum = arrays.pop("checksum")
        if not np.array_equal(checksum, _checksum(arrays)):
            raise _damaged("its checksum differs")
        version, *meta = arrays["meta"].tolist()
        if version != _FORMAT:
            raise _damaged(f"its format is {version} and this version reads {_FORMAT}")
        length, shift, _ = meta
        heads: dict[int, tuple[int, ...]] = {}
        for layer, head in arrays["heads"].tolist():
            heads[layer] = (*heads.get(layer, ()), head)
        whole, weights = arrays.get("logits"), arrays.get("weights")
        logits = _decode_rows("logits", arrays) if whole is None else _floats(whole)
        return TeacherTarget(
            length=length,
            shift=bool(shift),
            logits=logits,
            heads_by_layer=heads,
            query_positions=unpack(arrays["positions"]),
            attention=_decode_rows("attention", arrays),
            weights=None if weights is None else _floats(weights),
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(repr(error)) from error


def _encode_rows(name: str, rows: SparseRows, bits: Bits) -> Arrays:
    _check_rows(name, rows)
    row_N = rows.rows_N().numpy()
    columns_N, values_N = rows.columns_N.numpy(), rows.values_N.numpy()
    if bits == 16:
        code_N = _codes(row_N, values_N, rows)
        stored = code_N > 0
        row_N, columns_N, code_N = row_N[stored], columns_N[stored], code_N[stored]
        numbers = {"values": pack(code_N)}
    else:
        numbers = {
            "values": pack(np.ascontiguousarray(values_N, dtype=np.float32).view(np.uint32)),
            "tails": pack(rows.tail_R.float().numpy().view(np.uint32)),
        }
    counts_R = np.bincount(row_N, minlength=len(rows))
    first_N = np.diff(row_N, prepend=-1) != 0
    steps_N = np.where(first_N, columns_N, np.diff(columns_N, prepend=0))
    numbers |= {"counts": pack(counts_R), "columns": pack(steps_N)}
    return {f"{name}.{key}": value for key, value in numbers.items()}


def _codes(row_N: NDArray[np.int64], values_N: NDArray[Any], rows: SparseRows) -> NDArray[np.int64]:
    """Round to multiples of 1 / 65535 by largest remainders, so that sums stay what they were.

    A row without a tail sums to exactly 1, one with a tail to at most 1; no entry moves by a whole
    step.
    """
    exact_N = values_N.astype(np.float64) * _WHOLE
    code_N = np.floor(exact_N).astype(np.int64)
    sums_R, floors_R = (
        np.bincount(row_N, weights=part, minlength=len(rows)) for part in (exact_N, code_N)
    )
    wanted_R = np.where(rows.tail_R.numpy() > 0, np.rint(sums_R).clip(max=_WHOLE), _WHOLE)
    order = np.lexsort((code_N - exact_N, row_N))
    starts_R = np.searchsorted(row_N[order], np.arange(len(rows)))
    rank_N = np.arange(len(order)) - starts_R[row_N[order]]
    code_N[order] += rank_N < (wanted_R - floors_R)[row_N[order]]
    return code_N


def _decode_rows(name: str, arrays: Arrays) -> SparseRows | None:
    if f"{name}.counts" not in arrays:
        return None
    counts_R, steps_N = unpack(arrays[f"{name}.counts"]), unpack(arrays[f"{name}.columns"])
    offsets = np.concatenate([[0], counts_R.cumsum()])
    # Running sums start anew with each row: take off what had been summed before its first entry.
    running_N = steps_N.cumsum()
    before_R = np.concatenate([[0], running_N])[offsets[:-1]]
    columns_N = running_N - before_R.repeat(counts_R)
    numbers = unpack(arrays[f"{name}.values"])
    if f"{name}.tails" in arrays:
        values_N = numbers.astype(np.uint32).view(np.float32)
        tail_R = unpack(arrays[f"{name}.tails"]).astype(np.uint32).view(np.float32)
    else:
        values_N = (numbers / _WHOLE).astype(np.float32)
        row_N = np.arange(len(counts_R)).repeat(counts_R)
        sums_R = np.bincount(row_N, weights=numbers, minlength=len(counts_R))
        tail_R = ((_WHOLE - sums_R) / _WHOLE).astype(np.float32)
    return SparseRows(
        columns_N=torch.from_numpy(columns_N),
        values_N=torch.from_numpy(values_N),
        offsets=torch.from_numpy(offsets.astype(np.int64)),
        tail_R=torch.from_numpy(tail_R),
    )


def _floats(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _narrow(
    values: Tensor, dtype: Literal["float16", "float32"], name: str = "logits"
) -> NDArray[Any]:
    narrow = values.to(getattr(torch, dtype))
    _check_finite(name, narrow)
    return narrow.numpy()


def _check_rows(name: str, rows: SparseRows) -> None:
    _check_finite(name, rows.values_N)
    _check_finite(name, rows.tail_R)
    off_R = (rows.mass_R().double() - 1.0).abs()
    if len(rows) and float(off_R.max()) > 0.01:
        raise StoreError(
            f"row {int(off_R.argmax())} of the teacher's {name} sums to "
            f"{float(rows.mass_R()[off_R.argmax()]):.4g}; every row must be a distribution: teach "
            "again with seekr.teacher.teach_batch"
        )


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise StoreError(
            f"teacher {name} have a NaN or a value that {values.dtype} cannot hold; finite numbers "
            "are needed: store targets with 32 bits, or look for a diverged model"
        )


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """CRC-32 over names, dtypes, shapes and contents."""
    value = 0
    for name in sorted(arrays):
        array = arrays[name]
        value = zlib.crc32(f"{name}{array.dtype.str}{array.shape}".encode(), value)
        value = zlib.crc32(array.tobytes(), value)
    return np.array([value], dtype=np.int64)


def _damaged(cause: str) -> StoreError:
    return StoreError(
        f"stored teacher target cannot be read: {cause}; bytes written by encode_target are "
        "expected: remove the teach artifact and run again"
    )
