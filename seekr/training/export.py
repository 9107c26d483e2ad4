"""A trained model out of its shards, into files that transformers loads.

Tensors are gathered one at a time and written in files of bounded size, which workers take turns to
hold, so nobody holds the whole of a large model. Adapters are merged: W + (alpha / rank) B A, formed in
float32 and rounded once. They are also written by themselves, as peft reads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from seekr.addition import is_added
from seekr.addition_files import write_addition
from seekr.training.build import Origin, adapter_of, addition_after, file_name, is_adapter
from seekr.training.loop import Workers
from seekr.training.settings import Lora, Recipe
from seekr.training.strategy import Strategy

SHARD_BYTES = 4 << 30
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    file: str
    names: tuple[str, ...]


def export_model(
    strategy: Strategy,
    recipe: Recipe,
    origin: Origin,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    workers: Workers,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model. Called on all workers, each of which writes some of the files.

    Args:
        folder: Of this worker; the files of all workers together are the model.
        shard_bytes: Most of a file, and of what a worker holds at a time.
    """
    model = strategy.model
    shards = _plan(strategy, recipe.dtype, shard_bytes)
    adapters = _whole_adapters(strategy)
    for number, shard in enumerate(shards):
        mine = number % workers.world_size == workers.rank
        tensors: dict[str, Tensor] = {}
        for name in shard.names:
            whole = _merged(name, strategy.whole(name), adapters, recipe)
            if mine:
                tensors[file_name(name)] = whole.to("cpu", recipe.dtype).contiguous()
        if mine:
            save_file(tensors, folder / shard.file, metadata={"format": "pt"})
    added = {
        name: strategy.whole(name).float().to("cpu")
        for name, _ in model.named_parameters()
        if is_added(name)
    }
    if workers.rank != 0:
        return
    if recipe.addition is not None:
        write_addition(folder, addition_after(origin, recipe.addition, recipe.task), added)
    if len(shards) > 1:
        _write_index(strategy, shards, recipe.dtype, folder)
    model.config.architectures = [_plain_class(strategy)]
    model.config.dtype = recipe.dtype
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = origin.folder / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, folder / generation.name)


def export_adapters(strategy: Strategy, lora: Lora, base: str, folder: Path, rank: int) -> None:
    """Write the adapters alone, in peft's layout. Called on all workers; the first one writes.

    Args:
        base: What adapter_config.json names as the model they belong to.
    """
    tensors = {
        f"base_model.model.{name.replace('.seekr.', '.')}": value.to("cpu").contiguous()
        for name, value in _whole_adapters(strategy).items()
    }
    if rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    layers = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=layers,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(folder))


def _names(strategy: Strategy) -> Iterator[tuple[str, int]]:
    """Return (name, number of elements) of the plain model's tensors, shared ones once."""
    for name, parameter in strategy.model.named_parameters():
        if not is_adapter(name) and not is_added(name):
            yield name, getattr(parameter, "ds_numel", parameter.numel())


def _plan(strategy: Strategy, dtype: torch.dtype, shard_bytes: int) -> list[_Shard]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, numel in _names(strategy):
        if groups[-1] and size + numel * dtype.itemsize > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += numel * dtype.itemsize
    if len(groups) == 1:
        return [_Shard(file="model.safetensors", names=tuple(groups[0]))]
    return [
        _Shard(file=f"model-{n + 1:05d}-of-{len(groups):05d}.safetensors", names=tuple(group))
        for n, group in enumerate(groups)
    ]


def _whole_adapters(strategy: Strategy) -> dict[str, Tensor]:
    names = [name for name, _ in strategy.model.named_parameters() if is_adapter(name)]
    return {name: strategy.whole(name).float() for name in names}


def _merged(name: str, whole: Tensor, adapters: dict[str, Tensor], recipe: Recipe) -> Tensor:
    first, second = adapter_of(name)
    if recipe.lora is None or first not in adapters:
        return whole
    product = adapters[second].to(whole.device) @ adapters[first].to(whole.device)
    return whole.float() + (recipe.lora.alpha / recipe.lora.rank) * product


def _write_index(
    strategy: Strategy, shards: list[_Shard], dtype: torch.dtype, folder: Path
) -> None:
    total = sum(numel for _, numel in _names(strategy)) * dtype.itemsize
    places = {file_name(name): shard.file for shard in shards for name in shard.names}
    content = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / _INDEX).write_text(json.dumps(content, indent=2))


def _plain_class(strategy: Strategy) -> str:
    """Name of the model's class; FSDP2 derives one of its own from it."""
    return next(
        kind.__name__
        for kind in type(strategy.model).__mro__
        if kind.__module__.startswith("transformers.") or not kind.__name__.startswith("FSDP")
    )
