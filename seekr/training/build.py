"""A model made without its weights, and weights read from its files range by range.

Parameters begin on the meta device, so that sharding can be laid out before any number exists; then
each worker reads the ranges it holds. No process holds a whole large model on the way in. Adapters are
no part of the files: they start from a draw that depends on the seed, the task and their name alone.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from seekr import attention
from seekr.addition import Addition, attach, is_added
from seekr.addition_files import read_added, read_addition
from seekr.errors import ConfigError, StoreError
from seekr.models import check_weights, load_model, model_shape
from seekr.training.ranges import MemorySource, Source, copy_in, flat, range_of
from seekr.training.settings import Lora, Recipe

_BASE = ".base_layer."
_ADAPTER = "seekr"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The model a training starts from: a local folder in Hugging Face layout."""

    folder: Path
    trust_remote_code: bool = False


def empty_model(origin: Origin, recipe: Recipe) -> PreTrainedModel:
    """Build the model with all parameters on the meta device and its buffers real.

    What is trained is float32; frozen weights, under adapters, have the recipe's dtype.

    Raises:
        ConfigError: the recipe's adapters name layers that the model lacks.
    """
    attention.register()
    config = AutoConfig.from_pretrained(
        origin.folder, local_files_only=True, trust_remote_code=origin.trust_remote_code
    )
    dtype = recipe.dtype if recipe.frozen else torch.float32
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=attention.ATTENTION,
            dtype=dtype,
            trust_remote_code=origin.trust_remote_code,
        )
    model.tie_weights()
    if recipe.lora is not None:
        inject_adapters(model, recipe.lora)
    if recipe.addition is not None:
        model.requires_grad_(False)
        attach(model, addition_after(origin, recipe.addition, recipe.task))
    return model.train()


def addition_after(origin: Origin, addition: Addition, task: str) -> Addition:
    """Return what there is once a task is learnt from a model that may have something already."""
    return (read_addition(origin.folder) or addition).with_task(task)


def check_adapters(origin: Origin, recipe: Recipe) -> None:
    """Check that the model has the layers that adapters or an addition name; reads no weights.

    Raises:
        ConfigError: it lacks one of them.
    """
    named = recipe.lora is not None and recipe.lora.targets is not None
    if named or recipe.addition is not None:
        empty_model(origin, recipe)


def inject_adapters(model: PreTrainedModel, lora: Lora) -> None:
    """Put adapters into the model in place, on the meta device, and freeze everything else.

    Raises:
        ConfigError: the adapters name layers that the model lacks.
    """
    decoder: Any = model.get_decoder()
    linear = {n.rpartition(".")[2] for n, m in decoder.named_modules() if type(m) is nn.Linear}
    unknown = sorted(set(lora.targets or ()) - linear)
    if unknown:
        raise ConfigError(
            f"train.lora.targets names {unknown[0]!r}; the linear layers of this model are "
            f"{', '.join(sorted(linear))}: choose among them, or leave targets null for all"
        )
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=sorted(lora.targets or linear),
        task_type="CAUSAL_LM",
    )
    with init_empty_weights(include_buffers=False):
        inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers, wherever a family keeps them: the units that are gathered,
    compiled, computed again."""
    count = model_shape(model.config).num_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return list(lists[0]) if lists else []


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give meta parameters memory without values, and move what is real to the device."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


def set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a buffer, whether the buffer is part of the state or not."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._buffers[leaf] = value


def file_name(name: str) -> str:
    """Return a parameter's name in the model's files, where adapters wrap its layer or not."""
    return name.replace(_BASE, ".")


def adapter_of(name: str) -> tuple[str, str]:
    """Return the names of A and B of the adapter that a layer's weight would have."""
    layer = name.rpartition(_BASE)[0]
    return f"{layer}.lora_A.{_ADAPTER}.weight", f"{layer}.lora_B.{_ADAPTER}.weight"


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return f".{_ADAPTER}." in name


def adapter_start(draw: str, name: str, shape: torch.Size) -> Tensor:
    """Return an adapter's numbers before training: A drawn evenly, B zero, so that B A is zero."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{draw}/{name}".encode()))
    bound = 1.0 / math.sqrt(shape[1])  # of kaiming_uniform with a = sqrt(5), as peft has it
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def origin_source(origin: Origin, model: PreTrainedModel, recipe: Recipe) -> Source:
    """Return where the model's weights, and its adapters' starts, are read from.

    The files are read range by range where their tensors are the model's own. A few architectures
    store them otherwise (experts one by one): there the whole model is loaded first.
    """
    names = {
        file_name(name)
        for name, _ in model.named_parameters(remove_duplicate=True)
        if not is_adapter(name) and not is_added(name)
    }
    files: Source = WeightFiles(origin.folder)
    if not names <= files.names:
        whole = load_model(
            origin.folder,
            dtype=torch.float32,
            trust_remote_code=origin.trust_remote_code,
        )
        files = MemorySource(whole.state_dict())
    draw = f"{recipe.seed}/{recipe.task}"
    if recipe.addition is not None:
        embedding: Any = model.get_input_embeddings()
        return _WithAddition(
            files,
            addition_after(origin, recipe.addition, recipe.task),
            {name: p.shape for name, p in model.named_parameters() if is_added(name)},
            draw,
            read_added(origin.folder),
            int(embedding.weight.shape[0]),
        )
    return _WithAdapters(files, dict(_adapters(model)), draw)


def fill(model: PreTrainedModel, source: Source) -> None:
    """Read every parameter's own range into it."""
    for name, parameter in model.named_parameters():
        start, _ = range_of(parameter)
        copy_in(source, file_name(name), start, flat(parameter))


class WeightFiles:
    """A folder's safetensors as a source of ranges."""

    def __init__(self, folder: Path) -> None:
        check_weights(folder)
        self._folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")
        self.names = frozenset(self._files)

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return numbers of a tensor, reading only the rows that hold them."""
        if name not in self._files:
            raise StoreError(
                f"model folder {self._folder} has no tensor {name}; all are needed, or they would "
                "be random: use a complete checkpoint"
            )
        with safe_open(self._folder / self._files[name], framework="pt") as file:
            part = file.get_slice(name)
            shape = part.get_shape()
            if not shape:
                return file.get_tensor(name).reshape(1)
            row = math.prod(shape[1:])
            first, last = start // row, -(-(start + length) // row)
            values = part[first:last].reshape(-1)
        return values[start - first * row : start - first * row + length]


@dataclass(frozen=True, slots=True, eq=False)
class _WithAdapters:
    """A model's files, and adapters as they start."""

    files: Source
    shapes: dict[str, torch.Size]
    draw: str

    def read(self, name: str, start: int, length: int) -> Tensor:
        if name not in self.shapes:
            return self.files.read(name, start, length)
        values = adapter_start(self.draw, name, self.shapes[name])
        return values.view(-1)[start : start + length]


@dataclass(frozen=True, slots=True, eq=False)
class _WithAddition:
    """A model's files, and an addition: as learnt so far, else as it starts."""

    files: Source
    addition: Addition
    shapes: dict[str, torch.Size]
    draw: str
    learnt: dict[str, Tensor]
    tokens: int

    def read(self, name: str, start: int, length: int) -> Tensor:
        if name not in self.shapes:
            return self.files.read(name, start, length)
        values = self.learnt.get(name)
        if values is None:
            shape = self.shapes[name]
            values = self.addition.start(name, shape, self.draw, self.files.read, self.tokens)
        return values.reshape(-1)[start : start + length]


def _adapters(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            yield name, parameter.shape
