"""From a row of text to tokens.

A prompt is a template with a hole for the row's input. Template, input and answer are tokenised
piece by piece and joined as ids, so three things hold by construction: only the input is ever cut,
the loss mask falls exactly between prompt and answer, and the prompt of training is the prompt of
evaluation (its budget is `max_length - max_answer_length`, however long the answer is). Text that
comes from data is never read as a control token: an input with "</s>" in it is spelt out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from seekr.errors import ConfigError, DataError

PLAIN_TEMPLATE = "{input}"
NATURAL_INSTRUCTIONS_TEMPLATE = (
    "Definition: {definition}\n\nNow complete the following example -\nInput: {input}\nOutput: "
)
# Default template per data layout. TRACE keeps its instruction inside each prompt.
DEFAULT_TEMPLATES: dict[str, str] = {
    "plain": PLAIN_TEMPLATE,
    "trace": PLAIN_TEMPLATE,
    "natural_instructions": NATURAL_INSTRUCTIONS_TEMPLATE,
}
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")

Truncate = Literal["head", "tail"]


def row_id_of(input: str, references: Sequence[str], definition: str | None = None) -> str:
    """Return the row's identity: 32 hex digits of the sha256 of its content's canonical JSON."""
    content = {"definition": definition, "input": input, "references": list(references)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def document_id_of(text: str, focus: Sequence[str] = ()) -> str:
    """Return the identity of a row that is a text: the same, of the text and what matters in it."""
    content = json.dumps({"document": text, "focus": list(focus)}, sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row as text. `references[0]` is the answer trained on; all of them are scored."""

    input: str
    references: tuple[str, ...]
    definition: str | None = None

    def __post_init__(self) -> None:
        if not self.references:
            raise DataError(
                f"row with input {self.input[:60]!r} has no reference answer; one is needed: "
                "add an answer or drop the row"
            )

    @property
    def row_id(self) -> str:
        return row_id_of(self.input, self.references, self.definition)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A prompt layout split at its placeholders: literals[i] comes before names[i]."""

    text: str
    literals: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Parse text with one `{input}` and at most one `{definition}`; other braces are literal.

        Raises:
            ConfigError: `{input}` is missing or repeated, or another `{name}` is present.
        """
        parts = _PLACEHOLDER.split(text)
        literals, names = tuple(parts[0::2]), tuple(parts[1::2])
        unknown = sorted(set(names) - {"input", "definition"})
        if unknown:
            raise ConfigError(
                f"template {text!r} has the unknown placeholder {{{unknown[0]}}}; allowed are "
                "{input} (once) and {definition} (at most once): rename or remove it"
            )
        if names.count("input") != 1:
            raise ConfigError(
                f"template {text!r} has {names.count('input')} {{input}} placeholders; exactly one "
                "is needed: put it where a row's input goes"
            )
        if names.count("definition") > 1:
            raise ConfigError(
                f"template {text!r} repeats {{definition}}; one is allowed: remove the others"
            )
        return cls(text=text, literals=literals, names=names)

    @property
    def wants_definition(self) -> bool:
        return "definition" in self.names


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenizedRow:
    """One row as stored in Parquet: input_ids = prompt, answer, EOS; the prompt bears no loss."""

    row_id: str
    input: str
    references: tuple[str, ...]
    input_ids: NDArray[np.int32]
    prompt_length: int
    # What its tokens count in the loss, [tokens], where they differ (`token_weights`); 0 in the prompt.
    weights: NDArray[np.float32] | None = None
    # Negative log-likelihood of its tokens under a reference model, [tokens]; 0 in the prompt.
    reference_nll: NDArray[np.float32] | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TokenizedRow:
        """Build from a mapping with the Parquet columns (lists or arrays for the list columns)."""
        return cls(
            row_id=str(record["row_id"]),
            input=str(record["input"]),
            references=tuple(str(reference) for reference in record["references"]),
            input_ids=np.asarray(record["input_ids"], dtype=np.int32),
            prompt_length=int(record["prompt_length"]),
        )

    def to_record(self) -> dict[str, Any]:
        """Return the Parquet columns as plain Python values."""
        record = {name: getattr(self, name) for name in ("row_id", "input", "prompt_length")}
        return record | {
            "references": list(self.references),
            "input_ids": self.input_ids.tolist(),
        }


def eos_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the end-of-sequence id. Raises ConfigError: none, so answers would never end."""
    eos_id = tokenizer.eos_token_id
    if not isinstance(eos_id, int):
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token; one is needed so "
            "that answers end: set eos_token in its tokenizer_config.json"
        )
    return eos_id


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding id, or EOS where there is none: padding is masked, never seen."""
    pad_id = tokenizer.pad_token_id
    return pad_id if isinstance(pad_id, int) else eos_id_of(tokenizer)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Check that every id the tokenizer can produce has a row in the model's embedding.

    Raises:
        ConfigError: an id is outside the model's vocabulary, or the tokenizer has no EOS.
    """
    eos_id_of(tokenizer)
    vocab_size = int(config.get_text_config().vocab_size)
    token, token_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if token_id >= vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} has token {token!r} with id {token_id}; the "
            f"model's vocabulary allows 0..{vocab_size - 1}: use the tokenizer that belongs to the "
            "model, or resize the model's embedding"
        )


def check_limits(
    template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int, max_answer_length: int
) -> None:
    """Check that template, answer budget and at least one input token fit into a row.

    Args:
        max_length: Tokens of a whole row: prompt, answer and EOS.
        max_answer_length: Tokens of the answer with its EOS, reserved for every row.

    Raises:
        ConfigError: they do not fit, or a length is not positive.
    """
    if max_answer_length < 2:
        raise ConfigError(
            f"max_answer_length is {max_answer_length}; at least 2 is needed (one token and EOS): "
            "raise it"
        )
    fixed = len(start_ids(tokenizer)) + sum(
        len(literal_ids(tokenizer, text)) for text in template.literals
    )
    if fixed + 1 + max_answer_length > max_length:
        raise ConfigError(
            f"max_length {max_length} cannot hold the template ({fixed} tokens), one token of "
            f"input and max_answer_length {max_answer_length}; {fixed + 1 + max_answer_length} or "
            "more is needed: raise max_length, lower max_answer_length or shorten the template"
        )


def encode(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_answer_length: int,
    truncate: Truncate = "tail",
) -> TokenizedRow:
    """Tokenise one row.

    Args:
        max_length: Tokens of a whole row. The prompt gets `max_length - max_answer_length` of them.
        max_answer_length: Tokens of the answer with its EOS, which also ends an answer that is cut.
        truncate: The end of a too long input that is cut off: "tail" keeps its beginning (SAPT on
            SuperNI), "head" keeps its end (TRACE's left truncation).

    Raises:
        DataError: the template wants a definition and the row has none, or the definition leaves
            no room for the input.
    """
    before, after = _surroundings(example, template, tokenizer)
    input_ids = data_ids(tokenizer, example.input)
    room = max_length - max_answer_length - len(before) - len(after)
    if room < min(1, len(input_ids)):
        raise DataError(
            f"row {example.row_id}: template and definition take {len(before) + len(after)} of the "
            f"{max_length - max_answer_length} tokens of a prompt, no room is left for the input: "
            "raise max_length or drop the row"
        )
    prompt = before + cut(input_ids, room, truncate) + after
    answer = data_ids(tokenizer, example.references[0])[: max_answer_length - 1]
    return TokenizedRow(
        row_id=example.row_id,
        input=example.input,
        references=example.references,
        input_ids=np.asarray([*prompt, *answer, eos_id_of(tokenizer)], dtype=np.int32),
        prompt_length=len(prompt),
    )


def encode_document(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    focus: Sequence[str] = (),
) -> TokenizedRow:
    """Tokenise a text that is learnt whole: BOS where it is added, the beginning of the text, EOS.

    The prompt is BOS, or the first token where there is none: nothing predicts it.

    Args:
        focus: Parts of the text that matter, which enter the row's identity.
    """
    start = start_ids(tokenizer)
    ids = [*start, *data_ids(tokenizer, text)[: max_length - 1 - len(start)]]
    return TokenizedRow(
        row_id=document_id_of(text, focus),
        input="",
        references=(text,),
        input_ids=np.asarray([*ids, eos_id_of(tokenizer)], dtype=np.int32),
        prompt_length=max(1, len(start)),
    )


def cut(ids: list[int], room: int, truncate: Truncate) -> list[int]:
    """Return at most `room` ids of an input: its beginning for "tail", its end for "head"."""
    return ids[:room] if truncate == "tail" else ids[max(0, len(ids) - room) :]


def _surroundings(
    example: Example, template: Template, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Return the ids before and after the input: BOS where it is added, literals, definition."""
    if template.wants_definition and example.definition is None:
        raise DataError(
            f"row {example.row_id} has no definition and template {template.text!r} asks for one: "
            "add the definition to the row or remove {definition} from the template"
        )
    sides: tuple[list[int], list[int]] = (start_ids(tokenizer), [])
    side = 0
    for literal, name in zip(template.literals, (*template.names, ""), strict=True):
        sides[side].extend(literal_ids(tokenizer, literal))
        if name == "input":
            side = 1
        elif name == "definition":
            sides[side].extend(data_ids(tokenizer, example.definition or ""))
    return sides


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [bos] if the tokenizer itself starts a sequence with it, else []."""
    ids = list(tokenizer("").input_ids)
    bos_id = tokenizer.bos_token_id
    return [ids[0]] if ids and bos_id is not None and ids[0] == bos_id else []


def literal_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise text the user wrote in the template: control tokens in it are meant."""
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []


def data_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise text that came from a file: whatever looks like a control token is only text."""
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
