"""Checkpoints of a training in progress: every worker's shards as safetensors, no pickle anywhere.

A worker writes the pieces it owns, with their place in the whole tensor; replicated tensors are
written by rank 0. On the way in each worker reads the pieces that overlap its own, from whichever
files hold them, so the world size may change in between. torch.distributed.checkpoint is not used
because its metadata file is a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from seekr.errors import StoreError

PROGRESS = "progress.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A block of a whole tensor: where it starts, its size, and the file that holds it."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def training_state(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return weights and optimizer state under flat names; tensors are not copied."""
    state: dict[str, Tensor] = {f"model.{name}": p for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{key}.{name}"] = value
    return state


def save_shards(folder: Path, state: Mapping[str, Tensor], rank: int) -> bool:
    """Write this worker's pieces; returns whether there were any."""
    pieces: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for name, tensor in state.items():
        local, offset, whole = _own_piece(tensor)
        if local.numel() == 0 or (rank != 0 and not isinstance(tensor, DTensor)):
            continue
        pieces[name] = local.detach().contiguous().cpu()
        index[name] = {"offset": offset, "shape": list(local.shape), "whole": whole}
    if not pieces:
        return False
    save_file(pieces, folder / f"shard-{rank:05d}.safetensors")
    (folder / f"shard-{rank:05d}.json").write_text(json.dumps(index))
    return True


def load_training_state(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Fill weights and optimizer state in place, exactly as they were saved.

    Raises:
        StoreError: the checkpoint lacks a tensor or a part of one.
    """
    pieces = _read_index(folder)
    keys = sorted({name.split(".")[1] for name in pieces if name.startswith("optimizer.")})
    with torch.no_grad():
        for name, parameter in parameters.items():
            _fill(folder, pieces, f"model.{name}", parameter)
            for key in keys:
                stored = f"optimizer.{key}.{name}"
                if stored not in pieces:
                    continue
                like_parameter = _whole_shape(pieces[stored]) == tuple(parameter.shape)
                value = (
                    torch.zeros_like(parameter)
                    if like_parameter
                    else torch.zeros(_whole_shape(pieces[stored]))
                )
                _fill(folder, pieces, stored, value)
                optimizer.state[parameter][key] = value


def _own_piece(tensor: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Return (local values, their offset in the whole, shape of the whole)."""
    if not isinstance(tensor, DTensor):
        return tensor, [0] * tensor.dim(), list(tensor.shape)
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), list(offset), list(tensor.shape)


def _read_index(folder: Path) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for path in sorted(folder.glob("shard-*.json")):
        for name, entry in json.loads(path.read_text()).items():
            piece = Piece(
                file=path.with_suffix(".safetensors").name,
                offset=tuple(entry["offset"]),
                shape=tuple(entry["shape"]),
            )
            found.setdefault(name, []).append(piece)
    return found


def _whole_shape(pieces: list[Piece]) -> tuple[int, ...]:
    ends = [[o + s for o, s in zip(p.offset, p.shape, strict=True)] for p in pieces]
    return tuple(max(sizes) for sizes in zip(*ends, strict=True)) if ends[0] else ()


def _fill(folder: Path, pieces: Mapping[str, list[Piece]], name: str, target: Tensor) -> None:
    """Copy every stored block that overlaps this worker's part of `target` into it."""
    local, offset, _ = _own_piece(target)
    copied = 0
    for piece in pieces.get(name, []):
        starts = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(offset, local.shape, piece.offset, piece.shape, strict=True)
        ]
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            continue
        source = tuple(
            slice(s - o, e - o) for s, e, o in zip(starts, ends, piece.offset, strict=True)
        )
        place = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, offset, strict=True))
        with safe_open(folder / piece.file, framework="pt") as file:
            block = file.get_slice(name)[source] if source else file.get_tensor(name)
        local[place].copy_(block) if place else local.copy_(block)
        copied += block.numel()
    if copied != local.numel():
        raise StoreError(
            f"checkpoint {folder} holds {copied} of the {local.numel()} values of {name} that this "
            "worker needs; it is damaged or belongs to another model: remove the stage's "
            "checkpoints folder and run again"
        )
