"""Trained vectors before the input of a frozen model: a prompt per task, or a pool to choose from.

A vector stands in a row as a virtual token, an id beyond the vocabulary. So batches, masks, positions,
labels and generation know nothing of it; only the input embedding does, which puts vectors in the place
of such ids. The vectors are parameters of the embedding module beside its own, so whatever shards,
gathers or saves a model's parameters has them too.

From a pool each row takes the prompts whose keys are most like its own input: the mean embedding of its
prompt's tokens. `prompting` says which tokens those are.

Shape suffixes: B batch, T tokens, D hidden width, M pool, N selected, L vectors of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from seekr.collation import IGNORE_LABEL, Batch
from seekr.errors import ConfigError
from seekr.prompts import TokenizedRow

SPEC, TENSORS = "soft_prompts.json", "soft_prompts.safetensors"
PREFIX = "seekr_prompt_"
POOL, KEYS = f"{PREFIX}pool", f"{PREFIX}keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPrompts:
    """What prompts a model has.

    Attributes:
        length: Vectors of a prompt, L.
        tasks: Progressive: those that have a prompt, in the order they were learnt.
        pool, selected: Of a pool: prompts in it, M, and taken for a row, N.
    """

    kind: Literal["progressive", "pool"]
    length: int
    tasks: tuple[str, ...] = ()
    pool: int = 0
    selected: int = 0

    def with_task(self, task: str) -> SoftPrompts:
        """Return what there is once a task is learnt."""
        return replace(self, tasks=(*self.tasks, task)) if self.kind == "progressive" else self

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return the parameters' shapes by name; the newest task's comes last."""
        if self.kind == "pool":
            return {POOL: (self.pool, self.length, width), KEYS: (self.pool, width)}
        return {f"{PREFIX}{index}": (self.length, width) for index in range(len(self.tasks))}

    def trained(self) -> tuple[str, ...]:
        """Return the names of what the newest task trains: its own prompt, or the whole pool."""
        return (POOL, KEYS) if self.kind == "pool" else (f"{PREFIX}{len(self.tasks) - 1}",)

    def slots(self, task: str | None = None) -> list[int]:
        """Return the virtual tokens before a row, numbered from 0.

        Args:
            task: Progressive: as it was when this task was learnt; all prompts if None. The newest
                prompt is the first.

        Raises:
            ConfigError: the task has no prompt yet.
        """
        if self.kind == "pool":
            return list(range(self.selected * self.length))
        if task is not None and task not in self.tasks:
            raise ConfigError(
                f"task {task} has no prompt; the model has prompts of {', '.join(self.tasks)}: "
                "learn it first, or use the newest prompts for all tasks"
            )
        last = len(self.tasks) if task is None else self.tasks.index(task) + 1
        return [n * self.length + at for n in reversed(range(last)) for at in range(self.length)]


def prefixed(
    rows: Sequence[TokenizedRow], slots: Sequence[int], vocab_size: int
) -> list[TokenizedRow]:
    """Return rows with virtual tokens before them, as part of their prompts."""
    before = np.asarray(slots, dtype=np.int32) + vocab_size
    return [
        replace(
            row,
            input_ids=np.concatenate([before, row.input_ids]).astype(np.int32),
            prompt_length=row.prompt_length + len(before),
        )
        for row in rows
    ]


class Prompting:
    """What the embedding module does with virtual tokens.

    Attributes:
        mask_BT: Tokens of rows' own inputs, while `prompting` is on.
        pull_B: Of the last batch: sum over the chosen prompts of 1 - cosine of key and query. None
            without a pool.
    """

    def __init__(self, spec: SoftPrompts, vocab_size: int) -> None:
        self.spec, self.vocab_size = spec, vocab_size
        self.mask_BT: Tensor | None = None
        self.pull_B: Tensor | None = None
        self._ids_BT: Tensor | None = None

    def before(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hide ids that the embedding does not have."""
        self._ids_BT = args[0]
        return (args[0].clamp(max=self.vocab_size - 1), *args[1:])

    def after(self, module: nn.Module, _: Any, embedded_BTD: Tensor) -> Tensor | None:
        """Put vectors where the ids were."""
        ids_BT, self._ids_BT = self._ids_BT, None
        assert ids_BT is not None
        virtual_BT = ids_BT >= self.vocab_size
        if not bool(virtual_BT.any()):  # a later token of a generation
            return None
        slots_BT = (ids_BT - self.vocab_size).clamp(min=0)
        if self.spec.kind == "pool":
            vectors_BTD = self._chosen(module, embedded_BTD, slots_BT)
        else:
            names = self.spec.shapes(embedded_BTD.shape[-1])
            vectors_BTD = torch.cat([getattr(module, name) for name in names])[slots_BT]
        return torch.where(virtual_BT[..., None], vectors_BTD.to(embedded_BTD.dtype), embedded_BTD)

    def _chosen(self, module: nn.Module, embedded_BTD: Tensor, slots_BT: Tensor) -> Tensor:
        if self.mask_BT is None:
            raise RuntimeError("a pool of prompts needs to know the inputs: use `prompting`")
        mask_BT = self.mask_BT.to(embedded_BTD.dtype)[..., None]
        query_BD = (embedded_BTD * mask_BT).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)
        keys_MD, pool_MLD = getattr(module, KEYS), getattr(module, POOL)
        likeness_BM = functional.cosine_similarity(
            query_BD.detach().float()[:, None], keys_MD.float()[None], dim=-1
        )
        best_BN, index_BN = likeness_BM.topk(self.spec.selected, dim=-1)
        self.pull_B = (1.0 - best_BN).sum(dim=-1)
        chosen_BSD = pool_MLD[index_BN].flatten(1, 2)
        at_BTD = slots_BT[..., None].expand(-1, -1, chosen_BSD.shape[-1])
        return chosen_BSD.gather(1, at_BTD)


def attach(model: Any, spec: SoftPrompts) -> list[str]:
    """Give a model its prompts, without values, frozen but for the newest; returns their names."""
    embedding: nn.Module = model.get_input_embeddings()
    weight: Any = embedding.weight
    for name, shape in spec.shapes(weight.shape[1]).items():
        values = torch.empty(shape, dtype=torch.float32, device=weight.device)
        embedding.register_parameter(
            name, nn.Parameter(values, requires_grad=name in spec.trained())
        )
    state = Prompting(spec, weight.shape[0])
    embedding.register_forward_pre_hook(state.before)
    embedding.register_forward_hook(state.after)
    embedding._seekr_prompting = state  # pyright: ignore[reportArgumentType]
    return list(spec.shapes(weight.shape[1]))


def prompting_of(model: nn.Module) -> Prompting | None:
    """Return what a model does with virtual tokens, None for one without prompts."""
    for module in model.modules():
        found = module.__dict__.get("_seekr_prompting")
        if found is not None:
            return found
    return None


@contextmanager
def prompting(model: nn.Module, batch: Batch) -> Iterator[Prompting | None]:
    """Say which tokens of a batch are rows' own inputs, for models that choose prompts by them."""
    state = prompting_of(model)
    if state is None:
        yield None
        return
    inputs_BT = (batch.attention_mask_BT > 0) & (batch.labels_BT == IGNORE_LABEL)
    state.mask_BT = inputs_BT & (batch.input_ids_BT < state.vocab_size)
    try:
        yield state
    finally:
        state.mask_BT = state.pull_B = None


def is_prompt(name: str) -> bool:
    """Return whether a parameter is a prompt or a key."""
    return f".{PREFIX}" in name


def read_spec(folder: Path) -> SoftPrompts | None:
    """Return what prompts lie beside a model, None if there are none."""
    if not (folder / SPEC).is_file():
        return None
    values = json.loads((folder / SPEC).read_text())
    return SoftPrompts(**values | {"tasks": tuple(values["tasks"])})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the vectors beside a model, by their names within the embedding; none if there are none."""
    return load_file(folder / TENSORS) if (folder / TENSORS).is_file() else {}


def write_prompts(folder: Path, spec: SoftPrompts, tensors: dict[str, Tensor]) -> None:
    """Write prompts beside a model's files; `tensors` by their names within the embedding."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / SPEC).write_text(json.dumps(asdict(spec), indent=1))


def load_prompts(model: Any, folder: Path) -> None:
    """Attach to a loaded model what lies beside its files, if anything does."""
    spec = read_spec(folder)
    if spec is None:
        return
    attach(model, spec)
    embedding = model.get_input_embeddings()
    for name, values in read_tensors(folder).items():
        getattr(embedding, name).data.copy_(values)
