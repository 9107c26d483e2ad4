"""Prompts that nobody has stored: a model that has learnt how a task's prompts read writes others.

What stands before a prompt's first hole in the template is given, the rest is written up to EOS: what
fills the holes, and the template between and after them. A prompt counts if it ended, if the template
is whole, and if it has an input. What is written for a seed depends on that seed and the model alone.

Shape suffixes: N prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from seekr.prompts import (
    Template,
    TokenizedRow,
    eos_id_of,
    literal_ids,
    row_id_of,
    start_ids,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptForm:
    """What all prompts of a task have in common.

    Attributes:
        opening: Token ids before the first hole, with BOS where the tokenizer adds it.
        after: Token ids after each hole, one list or two.
        input_at: Which hole is the input.
    """

    tokenizer: PreTrainedTokenizerBase
    opening: tuple[int, ...]
    after: tuple[tuple[int, ...], ...]
    input_at: int

    @classmethod
    def of(cls, template: Template, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
        """Return the form of a template's prompts, as `encode` writes them."""
        first, *others = (tuple(literal_ids(tokenizer, text)) for text in template.literals)
        return cls(
            tokenizer=tokenizer,
            opening=(*start_ids(tokenizer), *first),
            after=tuple(others),
            input_at=template.names.index("input"),
        )

    @property
    def given(self) -> tuple[int, ...]:
        """What a prompt is begun with; EOS where there is nothing else to begin with."""
        return self.opening or (eos_id_of(self.tokenizer),)

    def lesson(self, row: TokenizedRow) -> TokenizedRow:
        """Return the row that teaches to write this one's prompt; its answer is not in it."""
        rest = row.input_ids[len(self.opening) : row.prompt_length].tolist()
        ids = [*self.given, *rest, eos_id_of(self.tokenizer)]
        return TokenizedRow(
            row_id=row.row_id,
            input=row.input,
            references=(),
            input_ids=np.asarray(ids, dtype=np.int32),
            prompt_length=len(self.given),
        )

    def row(self, written: Sequence[int]) -> TokenizedRow | None:
        """Return the row, with an empty answer, whose prompt goes on as written, or None.

        Args:
            written: Token ids after the opening, without EOS.

        Returns:
            None where a piece of the template is missing or the input is blank.
        """
        holes = self._holes(list(written))
        if holes is None:
            return None
        text = str(self.tokenizer.decode(holes[self.input_at], skip_special_tokens=True))
        if not text.strip():
            return None
        prompt = [*self.opening, *written]
        return TokenizedRow(
            row_id=row_id_of(self.text(prompt), (), "generated"),
            input=text,
            references=(),
            input_ids=np.asarray([*prompt, eos_id_of(self.tokenizer)], dtype=np.int32),
            prompt_length=len(prompt),
        )

    def text(self, prompt: Sequence[int]) -> str:
        """Return a prompt as text, by which two are the same."""
        return str(self.tokenizer.decode(list(prompt)))

    def _holes(self, written: list[int]) -> list[list[int]] | None:
        """Return what is in the holes, None if a piece after one of them is not there."""
        *between, last = (list(piece) for piece in self.after)
        end = len(written) - len(last)
        if end < 0 or written[end:] != last:
            return None
        if not between:
            return [written[:end]]
        (piece,) = between
        if not piece:  # nothing tells the two apart
            return [written[:end]] * 2
        for at in range(end - len(piece) + 1):
            if written[at : at + len(piece)] == piece:
                return [written[:at], written[at + len(piece) : end]]
        return None


@torch.no_grad()
def write_prompts(
    model: Any,
    given: Sequence[int],
    seeds: Sequence[str],
    *,
    temperature: float,
    max_new_tokens: int,
    eos_id: int,
) -> list[list[int] | None]:
    """Sample a continuation of the same beginning for every seed.

    Each seed has its own even numbers in 0..1, one per token, at which the cumulated probabilities are
    read; so a continuation does not depend, but for rounding, on those beside it.

    Args:
        temperature: What logits are divided by.

    Returns:
        Per seed the new token ids without EOS, None where none came within `max_new_tokens`.
    """
    device = next(model.parameters()).device
    draws_NT = torch.stack([_draws(seed, max_new_tokens) for seed in seeds]).to(device)
    ids_NT = torch.tensor([list(given)] * len(seeds), device=device)
    written: list[Tensor] = []
    ended_N = torch.zeros(len(seeds), dtype=torch.bool, device=device)
    cache = None
    for index in range(max_new_tokens):
        found = model(input_ids=ids_NT, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        chances_NV = (found.logits[:, -1].double() / temperature).softmax(dim=-1).cumsum(dim=-1)
        at_N1 = draws_NT[:, index : index + 1] * chances_NV[:, -1:]
        ids_NT = torch.searchsorted(chances_NV, at_N1, right=True)
        written.append(ids_NT[:, 0])
        ended_N |= ids_NT[:, 0] == eos_id
        if bool(ended_N.all()):
            break
    rows = torch.stack(written, dim=1).tolist()
    return [ids[: ids.index(eos_id)] if eos_id in ids else None for ids in rows]


def _draws(seed: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.rand(count, generator=generator, dtype=torch.float64)
