"""An earlier task's instruction around a new task's input: rows that nobody has stored.

What stands around the input in a stored prompt is the task's frame: template, definition, BOS. Put
around another task's input it asks the earlier question of new text, and the model that has not yet
learnt the new task answers as it always did. Such rows hold the model where the new task's rows pull at
it, and no later training needs them. Where the earlier task means nothing for such inputs, what they
hold is only what the model happens to say there (as in Learning without Forgetting, under each task's
instruction).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from seekr.prompts import (
    Template,
    TokenizedRow,
    Truncate,
    cut,
    data_ids,
    eos_id_of,
    literal_ids,
    row_id_of,
    start_ids,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Token ids before and after the input of a prompt."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def frame_of(
    row: TokenizedRow, template: Template, tokenizer: PreTrainedTokenizerBase, truncate: Truncate
) -> Frame | None:
    """Return what stands around a stored row's input, None if it cannot be told.

    The side of the input that has no definition is known from the template; on the other side the
    input, perhaps cut, is looked for, the longest piece first.

    Args:
        truncate: the end of a long input that was cut off.
    """
    prompt = row.input_ids[: row.prompt_length].tolist()
    whole = data_ids(tokenizer, row.input)
    first, last = (literal_ids(tokenizer, template.literals[i]) for i in (0, -1))
    start, end = len(start_ids(tokenizer)) + len(first), len(prompt) - len(last)
    fixed_start = template.names[0] == "input"
    for length in range(min(len(whole), end - start), 0, -1):
        begin = start if fixed_start else end - length
        if prompt[begin : begin + length] == cut(whole, length, truncate):
            return Frame(before=tuple(prompt[:begin]), after=tuple(prompt[begin + length :]))
    return None


def framed(
    frame: Frame,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_length: int,
    truncate: Truncate,
) -> list[int]:
    """Return a prompt: the frame around a text, which is cut to fit.

    Args:
        prompt_length: most tokens of the prompt.
    """
    room = max(1, prompt_length - len(frame.before) - len(frame.after))
    return [*frame.before, *cut(data_ids(tokenizer, text), room, truncate), *frame.after]


def borrowed_prompts(
    task: str,
    frames: Sequence[Frame],
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_length: int,
    truncate: Truncate,
) -> Iterator[TokenizedRow]:
    """Yield one row without an answer per text, the frames taken in turn.

    Args:
        task: the earlier task, part of the rows' identity.
    """
    for index, text in enumerate(texts):
        frame = frames[index % len(frames)]
        prompt = framed(frame, text, tokenizer, prompt_length=prompt_length, truncate=truncate)
        yield TokenizedRow(
            row_id=row_id_of(text, [task], "borrowed"),
            input=text,
            references=(),
            input_ids=np.asarray(prompt, dtype=np.int32),
            prompt_length=len(prompt),
        )


def answered(
    row: TokenizedRow, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> TokenizedRow:
    """Return the row with the model's own tokens for an answer."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    whole = [*row.input_ids.tolist(), *ids, eos_id_of(tokenizer)]
    return TokenizedRow(
        row_id=row.row_id,
        input=row.input,
        references=(text,),
        input_ids=np.asarray(whole, dtype=np.int32),
        prompt_length=row.prompt_length,
    )
