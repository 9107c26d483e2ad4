"""What trainings are measured on: shapes of models, rows with the lengths of real data, batches of them.

Everything is drawn from a seed, so all that take part see the same numbers. It needs neither Ray nor
any trainer but the loop of `seekr.training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seekr.batches import BatchPlan
from seekr.models import byte_tokenizer, save_model
from seekr.prompts import TokenizedRow
from seekr.training.settings import Recipe

PAD_ID = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama, and the lengths of the rows it is trained on."""

    layers: int
    width: int
    heads: int
    groups: int
    inner: int
    vocabulary: int
    tied: bool = False
    shortest: int = 32
    median: int = 90
    longest: int = 256

    def config(self) -> LlamaConfig:
        """Return the model's configuration."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=PAD_ID,
        )

    def write(self, folder: Path, device: str) -> None:
        """Write a random model, drawn on a device, and the byte tokenizer beside it."""
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM._from_config(self.config(), dtype=torch.bfloat16)
        save_model(model, byte_tokenizer(), folder)

    def rows(self, count: int, seed: int = 0) -> list[TokenizedRow]:
        """Return rows of random tokens: many short and few long ones, a third of each its answer."""
        draw = np.random.default_rng(seed)
        lengths = draw.lognormal(np.log(self.median), 0.6, count).clip(self.shortest, self.longest)
        return [self.row(draw, index, int(length), 3) for index, length in enumerate(lengths)]

    def row(self, draw: np.random.Generator, index: int, length: int, part: int) -> TokenizedRow:
        """Return one row of random tokens, the last 1/part of it the answer."""
        return TokenizedRow(
            row_id=f"{index:06}",
            input="",
            references=("",),
            input_ids=draw.integers(2, self.vocabulary, size=length).astype(np.int32),
            prompt_length=length - max(1, length // part),
        )


SHAPES = {
    "tiny": Shape(layers=2, width=64, heads=4, groups=2, inner=176, vocabulary=512),
    "small": Shape(layers=8, width=512, heads=8, groups=8, inner=1376, vocabulary=32000),
    "1b": Shape(
        layers=16,
        width=2048,
        heads=32,
        groups=8,
        inner=8192,
        vocabulary=128256,
        tied=True,
        shortest=64,
        median=400,
        longest=2048,
    ),
    "7b": Shape(
        layers=32,
        width=4096,
        heads=32,
        groups=32,
        inner=11008,
        vocabulary=32000,
        shortest=64,
        median=400,
        longest=2048,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What all trainings that are compared are given; a turn is an epoch over the rows."""

    folder: Path
    rows: Sequence[TokenizedRow]
    recipe: Recipe
    steps: int
    micro_batch_size: int
    pack_tokens: int
    device: torch.device

    @property
    def plan(self) -> BatchPlan:
        """Return the batches of all turns, as our loop makes them."""
        return BatchPlan(
            row_ids=[row.row_id for row in self.rows],
            replay_ids=[],
            epochs=self.recipe.epochs,
            batch_size=self.recipe.batch_size,
            batch_ratio=1.0,
            seed=self.recipe.seed,
        )

    def settle(self) -> None:
        """Wait until the device has done what it was given."""
        settle(self.device)


@dataclass(slots=True, kw_only=True)
class Turn:
    """What one way did in one turn: `columns` are tokens with padding, `loss` is the steps' mean.

    Losses and norms are those of each step, in the first turn only.
    """

    seconds: float
    tokens: int
    columns: int
    loss: float
    losses: list[float] = field(default_factory=list[float])
    norms: list[float] = field(default_factory=list[float])


class Way(Protocol):
    """One of the trainings that take turns."""

    def take(self, turn: int) -> Turn:
        """Take the steps of one turn."""
        ...


def settle(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
