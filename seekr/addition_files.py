"""Additions beside a model's files: what they are as JSON, their numbers as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from seekr.addition import Addition, attach
from seekr.errors import ConfigError
from seekr.shared_attention import SharedAttention
from seekr.soft_prompts import SoftPrompts

SPEC, TENSORS = "addition.json", "addition.safetensors"
_KINDS: dict[str, type[Addition]] = {
    kind.kind_name: kind for kind in (SoftPrompts, SharedAttention)
}


def read_addition(folder: Path) -> Addition | None:
    """Return what lies beside a model, None if nothing does.

    Raises:
        ConfigError: a kind that this version does not know.
    """
    if not (folder / SPEC).is_file():
        return None
    values: dict[str, Any] = json.loads((folder / SPEC).read_text())
    name = values.pop("addition", None)
    if name not in _KINDS:
        raise ConfigError(
            f"{folder / SPEC} describes {name!r}; this version knows {', '.join(_KINDS)}: use the "
            "version that wrote the model, or train it again"
        )
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return _KINDS[name](**values | lists)


def read_added(folder: Path) -> dict[str, Tensor]:
    """Return the numbers beside a model by parameter name; none if there are none."""
    return load_file(folder / TENSORS) if (folder / TENSORS).is_file() else {}


def write_addition(folder: Path, spec: Addition, tensors: Mapping[str, Tensor]) -> None:
    """Write an addition beside a model's files."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    values = {"addition": spec.kind_name} | asdict(spec)
    (folder / SPEC).write_text(json.dumps(values, indent=1))


def load_addition(model: Any, folder: Path) -> None:
    """Attach to a loaded model what lies beside its files, if anything does."""
    spec = read_addition(folder)
    if spec is None:
        return
    attach(model, spec)
    for name, values in read_added(folder).items():
        model.get_parameter(name).data.copy_(values)
