"""Trained vectors before the input of a frozen model: a prompt per task, or a pool to choose from.

A vector stands in a row as a virtual token, an id beyond the vocabulary. So batches, masks, positions,
labels and generation know nothing of it; only the input embedding does, which puts vectors in the place
of such ids. The vectors are parameters of the embedding module beside its own.

From a pool each row takes the prompts whose keys are most like its own input: the mean embedding of its
prompt's tokens.

Shape suffixes: B batch, T tokens, D hidden width, M pool, N selected, L vectors of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from seekr.addition import PREFIX, Addition, ReadNumbers, Seen, drawing, embedding_name
from seekr.collation import Batch
from seekr.errors import ConfigError
from seekr.prompts import TokenizedRow

PROMPT = f"{PREFIX}prompt_"
POOL, KEYS = f"{PROMPT}pool", f"{PROMPT}keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPrompts(Addition):
    """What prompts a model has; `tasks` that have one of their own, if it is progressive.

    Attributes:
        length: Vectors of a prompt, L.
        pool, selected: Of a pool: prompts in it, M, and taken for a row, N.
    """

    kind_name: ClassVar[str] = "soft_prompts"

    kind: Literal["progressive", "pool"]
    length: int
    pool: int = 0
    selected: int = 0

    def with_task(self, task: str) -> SoftPrompts:
        return replace(self, tasks=(*self.tasks, task)) if self.kind == "progressive" else self

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        width, place = model.get_input_embeddings().weight.shape[1], embedding_name(model)
        return {f"{place}.{leaf}": shape for leaf, shape in self.leaves(width).items()}

    def leaves(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return the parameters' shapes by name within the embedding; the newest task's comes last."""
        if self.kind == "pool":
            return {POOL: (self.pool, self.length, width), KEYS: (self.pool, width)}
        return {f"{PROMPT}{index}": (self.length, width) for index in range(len(self.tasks))}

    def trained(self, name: str) -> bool:
        """The newest task trains its own prompt, or the whole pool."""
        return self.kind == "pool" or name.endswith(f".{PROMPT}{len(self.tasks) - 1}")

    def start(
        self, name: str, shape: Sequence[int], draw: str, read: ReadNumbers, tokens: int
    ) -> Tensor:
        """Prompts begin as the embeddings of drawn tokens, keys as normal draws."""
        generator = drawing(draw, name)
        if name.endswith(KEYS):
            return torch.randn(shape, generator=generator)
        width, embedding = shape[-1], f"{name.partition(PREFIX)[0]}weight"
        count = int(np.prod(shape)) // width
        drawn = torch.randint(tokens, (count,), generator=generator)
        rows = [read(embedding, int(row) * width, width) for row in drawn]
        return torch.stack(rows).float()

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

    def connect(self, model: Any) -> Prompting:
        embedding: nn.Module = model.get_input_embeddings()
        state = Prompting(self, embedding.weight.shape[0])  # pyright: ignore
        embedding.register_forward_pre_hook(state.before)
        embedding.register_forward_hook(state.after)
        return state

    def before(
        self, rows: Sequence[TokenizedRow], vocab_size: int, task: str | None = None
    ) -> list[TokenizedRow]:
        return prefixed(rows, self.slots(task), vocab_size)

    @property
    def virtual_tokens(self) -> int:
        return len(self.slots())


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


class Prompting(Seen):
    """What the embedding module does with virtual tokens.

    `pull_B` is the sum over the chosen prompts of 1 - cosine of key and query; None without a pool.
    """

    spec: SoftPrompts

    def __init__(self, spec: SoftPrompts, vocab_size: int) -> None:
        super().__init__(spec)
        self.vocab_size = vocab_size
        self._ids_BT: Tensor | None = None

    def see(self, batch: Batch) -> None:
        super().see(batch)
        assert self.mask_BT is not None
        self.mask_BT = self.mask_BT & (batch.input_ids_BT < self.vocab_size)

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
            names = self.spec.leaves(embedded_BTD.shape[-1])
            vectors_BTD = torch.cat([getattr(module, name) for name in names])[slots_BT]
        return torch.where(virtual_BT[..., None], vectors_BTD.to(embedded_BTD.dtype), embedded_BTD)

    def _chosen(self, module: nn.Module, embedded_BTD: Tensor, slots_BT: Tensor) -> Tensor:
        if self.mask_BT is None:
            raise RuntimeError("a pool of prompts needs to know the inputs: use `seeing`")
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
