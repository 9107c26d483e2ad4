"""SAPT's blocks beside a frozen model: a low-rank block and a key per task, and who attends to which.

A query network, shared by all tasks, turns a row's prompt into a query; its product with the tasks' keys
says how much each block adds to every adapted layer, for all positions of the row and all tokens that
are generated after it. So no row has to say its task. Blocks, keys and weights stand in the order in
which tasks were learnt (Zhao et al., SAPT, ACL 2024).

    p = max over the prompt's token embeddings      u = LayerNorm(SiLU(W_up W_down p))
    a = softmax(<k_i, u> / tau)                     h = W x + scale * sum_i a_i B_i A_i x

The sum is formed as B_cat (a * A_cat x), with the A's under and the B's beside each other: two products,
and nothing of the size [B, T, S * D]. Everything about queries is computed in float32.

The first task's block has all the weight, so its key learns nothing; it is trained with the second's.

Shape suffixes: B batch, T tokens, D width of a layer's input, S blocks, R rank, H width of a query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from seekr.addition import (
    PREFIX,
    Addition,
    ReadNumbers,
    Seen,
    drawing,
    embedding_name,
    seeing,
)
from seekr.collation import Batch
from seekr.errors import ConfigError

BLOCK, KEY, QUERY = f"{PREFIX}block_", f"{PREFIX}key_", f"{PREFIX}query_"
DOWN, UP, NORM, SHIFT = (f"{QUERY}{part}" for part in ("down", "up", "norm", "shift"))
Pooling = Literal["max", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAttention(Addition):
    """What blocks a model has.

    Attributes:
        rank, alpha: Of a block; it adds alpha / rank times its product.
        targets: Names of the linear layers that have blocks.
        width: Of the query network between its two matrices.
        temperature: Tau; None is the square root of the model's width.
        pooling: Of a prompt's embeddings.
    """

    kind_name: ClassVar[str] = "shared_attention"

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    width: int = 100
    temperature: float | None = None
    pooling: Pooling = "max"

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Raises ConfigError: a target that the model has no linear layer of."""
        found: dict[str, tuple[int, ...]] = {}
        for name, layer in self.adapted(model).items():
            rows, columns = layer.weight.shape
            for index in range(len(self.tasks)):
                found[f"{name}.{BLOCK}{index}_a"] = (self.rank, columns)
                found[f"{name}.{BLOCK}{index}_b"] = (rows, self.rank)
        place, hidden = embedding_name(model), model.get_input_embeddings().weight.shape[1]
        for index in range(len(self.tasks)):
            found[f"{place}.{KEY}{index}"] = (hidden,)
        return found | {
            f"{place}.{DOWN}": (self.width, hidden),
            f"{place}.{UP}": (hidden, self.width),
            f"{place}.{NORM}": (hidden,),
            f"{place}.{SHIFT}": (hidden,),
        }

    def adapted(self, model: Any) -> dict[str, nn.Linear]:
        """Return the layers that have blocks, by name.

        Raises:
            ConfigError: a target that the model has no linear layer of.
        """
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        known = {name.rpartition(".")[2] for name in layers}
        unknown = [target for target in self.targets if target not in known]
        if unknown:
            raise ConfigError(
                f"method.targets names {unknown[0]!r}; the linear layers of this model are "
                f"{', '.join(sorted(known))}: choose among them"
            )
        return {n: m for n, m in layers.items() if n.rpartition(".")[2] in self.targets}

    @property
    def read_layers(self) -> tuple[str, ...]:
        return self.targets

    @property
    def read_rank(self) -> int:
        return self.rank * len(self.tasks)

    def trained(self, name: str) -> bool:
        """The newest block and key, the query network, and the first key with the second."""
        leaf, newest = name.rpartition(".")[2], len(self.tasks) - 1
        if leaf.startswith(BLOCK):
            return leaf.startswith(f"{BLOCK}{newest}_")
        if leaf.startswith(KEY):
            return leaf == f"{KEY}{newest}" or newest == 1
        return True

    def start(
        self, name: str, shape: Sequence[int], draw: str, read: ReadNumbers, tokens: int
    ) -> Tensor:
        """A block begins as zero: A drawn evenly, B zero. Keys are even in -1..1."""
        leaf = name.rpartition(".")[2]
        generator = drawing(draw, name)
        if leaf.startswith(BLOCK):
            if leaf.endswith("_b"):
                return torch.zeros(*shape)
            bound = 1.0 / math.sqrt(shape[1])  # of kaiming_uniform with a = sqrt(5)
            return (2 * torch.rand(*shape, generator=generator) - 1) * bound
        if leaf.startswith(KEY):
            return 2 * torch.rand(*shape, generator=generator) - 1
        if leaf in (DOWN, UP):
            return 0.02 * torch.randn(*shape, generator=generator)
        return torch.ones(*shape) if leaf == NORM else torch.zeros(*shape)

    def connect(self, model: Any) -> Attending:
        state = Attending(self)
        model.get_input_embeddings().register_forward_hook(state.attend)
        for layer in self.adapted(model).values():
            layer.register_forward_hook(state.add_blocks)
        return state


class Attending(Seen):
    """The weights of the batch under way, from the embedding to the layers that use them."""

    spec: SharedAttention

    def __init__(self, spec: SharedAttention) -> None:
        super().__init__(spec)
        self._ids_BT: Tensor | None = None

    def see(self, batch: Batch) -> None:
        super().see(batch)
        self._ids_BT = batch.input_ids_BT

    def forget(self) -> None:
        super().forget()
        self._ids_BT = None

    def attend(self, module: Any, _: Any, embedded_BTD: Tensor) -> None:
        """Compute a batch's weights from its prompts' embeddings; kept for tokens that follow."""
        mask_BT, self.mask_BT = self.mask_BT, None
        if mask_BT is None:
            if self.weights_BS is None:
                raise RuntimeError("shared attention needs to know the prompts: use `seeing`")
            return
        if embedded_BTD.shape[1] != mask_BT.shape[1]:  # what goes through the layers is not all
            embedded_BTD = module.forward(self._ids_BT)
        with torch.autocast(embedded_BTD.device.type, enabled=False):
            pooled_BH = _pooled(embedded_BTD.detach().float(), mask_BT, self.spec.pooling)
            self.weights_BS = self._weights(module, pooled_BH)

    def _weights(self, module: Any, pooled_BH: Tensor) -> Tensor:
        down, up, norm, shift = (getattr(module, n).float() for n in (DOWN, UP, NORM, SHIFT))
        hidden = pooled_BH.shape[-1]
        inner_BH = functional.silu(functional.linear(functional.linear(pooled_BH, down), up))
        query_BH = functional.layer_norm(inner_BH, (hidden,), norm, shift)
        keys = [getattr(module, f"{KEY}{index}") for index in range(len(self.spec.tasks))]
        tau = self.spec.temperature or math.sqrt(hidden)
        return torch.softmax(query_BH @ torch.stack(keys).float().T / tau, dim=-1)

    def add_blocks(self, layer: Any, inputs: tuple[Tensor, ...], output_BTO: Tensor) -> Tensor:
        """Add the weighted sum of all blocks to a layer's output."""
        assert self.weights_BS is not None
        (x_BTD,), count, rank = inputs, len(self.spec.tasks), self.spec.rank
        names = [f"{BLOCK}{index}" for index in range(count)]
        a_PD = torch.cat([getattr(layer, f"{name}_a") for name in names]).to(x_BTD.dtype)
        b_OP = torch.cat([getattr(layer, f"{name}_b") for name in names], dim=1).to(x_BTD.dtype)
        weights_B1P = self.weights_BS.repeat_interleave(rank, dim=-1)[:, None].to(x_BTD.dtype)
        low_BTP = functional.linear(x_BTD, a_PD) * weights_B1P
        return output_BTO + functional.linear(low_BTP, b_OP) * (self.spec.alpha / rank)


@torch.no_grad()
def weights_of(model: Any, batch: Batch) -> Tensor:
    """Return what a batch's prompts give to the blocks, [B, S]; runs the embedding alone.

    Raises:
        ValueError: the model has no such blocks.
    """
    with seeing(model, batch) as seen:
        if not isinstance(seen, Attending):
            raise ValueError("the model has no shared attention; train it with method sapt")
        model.get_input_embeddings()(batch.input_ids_BT)
        assert seen.weights_BS is not None
        return seen.weights_BS


def _pooled(embedded_BTH: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector per row from the tokens of its prompt, whatever the padding."""
    if pooling == "max":
        return embedded_BTH.masked_fill(~mask_BT[..., None], -torch.inf).amax(dim=1)
    mask_BT1 = mask_BT[..., None].to(embedded_BTH.dtype)
    return (embedded_BTH * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
