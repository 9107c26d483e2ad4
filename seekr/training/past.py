"""What a loss on the weights compares them with, read range by range: what earlier tasks have left.

Names are the trained model's own: whatever wrote the files, a method asks for a parameter as the
training knows it.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from seekr.methods.penalty import Reader
from seekr.training.build import WeightFiles, file_name
from seekr.training.ranges import MemorySource, Source


def kept_numbers(folder: Path) -> Reader:
    """Return a reader of files in the layout of a model's weights, such as a Fisher stage writes."""
    return WeightFiles(folder).read


def learnt_adapters(folder: Path) -> Reader:
    """Return a reader of the adapters that a training has exported, under the names of a new one's."""
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {
        name.removeprefix("base_model.model.").replace(".weight", ".seekr.weight"): tensor
        for name, tensor in tensors.items()
    }
    return MemorySource(named).read


def starting_weights(source: Source) -> Reader:
    """Return a reader of the weights that a training starts from, adapters' starts included."""
    return lambda name, start, length: source.read(file_name(name), start, length)
