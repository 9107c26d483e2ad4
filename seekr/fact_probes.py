"""Facts asked for as sentences with the answer inside, scored under teacher forcing.

A model is fed the whole sentence. At each token of the answer its likeliest token is compared with the
one that stands there, and that one's log-likelihood is taken. Nothing is generated. Which tokens are the
answer follows from character offsets, never from a search for token ids: the ids of a word alone are
often not those it has in a sentence.

Shape suffixes: N probes, B batch, T tokens, K columns whose logits are computed, P answer tokens of a
batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from seekr.attention import evaluation_mode
from seekr.collation import collate
from seekr.errors import ConfigError, DataError
from seekr.forward import batch_logits
from seekr.prompts import TokenizedRow, row_id_of, start_ids
from seekr.softmax import exact_dtype

# (first, last + 1) characters.
Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """A sentence as tokens, and where its answer is.

    Attributes:
        input_ids: [T] int32, with the start token where the tokenizer has one, without EOS.
        positions: [P] int64, ascending, of the answer's tokens; all are 1 or more.
    """

    row_id: str
    input_ids: NDArray[np.int32]
    positions: NDArray[np.int64]

    @property
    def answer_ids(self) -> NDArray[np.int32]:
        """The answer's tokens [P], as they are in the sentence."""
        return self.input_ids[self.positions]


def document_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Tokenise text from a file, as `prompts.data_ids` does, with the characters of each token.

    Returns:
        Ids [T], and offsets [T,2] into `text`: first character, last + 1.

    Raises:
        ConfigError: the tokenizer is a slow one, which does not know offsets.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} is a slow one ({type(tokenizer).__name__}) and "
            "does not say which characters a token stands for; a fast one is needed to find answers "
            "in sentences: put a tokenizer.json beside the model"
        )
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.asarray(encoded["input_ids"], dtype=np.int32), offsets


def occurrences(text: str, answer: str) -> list[Span]:
    """Return where the answer stands in the text, overlapping occurrences included.

    Raises:
        DataError: the answer is empty.
    """
    if not answer:
        raise DataError(
            f"the answer to {text[:60]!r} is empty; at least one character is needed: mend the row"
        )
    found: list[Span] = []
    start = text.find(answer)
    while start >= 0:
        found.append((start, start + len(answer)))
        start = text.find(answer, start + 1)
    return found


def tokens_in(offsets: NDArray[np.int64], span: Span) -> NDArray[np.bool_]:
    """Return which tokens [T] share a character with a span; one that does in part belongs to it."""
    first, last = span
    return (offsets[:, 0] < last) & (offsets[:, 1] > first)


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, document: str, answer: str
) -> NDArray[np.bool_]:
    """Return which of a document's own tokens belong to an occurrence of the answer.

    Returns:
        [T] over the tokens of `document_tokens`: neither a start token nor EOS is among them. All
        False if the answer does not occur.

    Raises:
        DataError: the answer is empty. ConfigError: the tokenizer knows no offsets.
    """
    _, offsets = document_tokens(tokenizer, document)
    found = np.zeros(len(offsets), dtype=np.bool_)
    for span in occurrences(document, answer):
        found |= tokens_in(offsets, span)
    return found


def make_probe(
    tokenizer: PreTrainedTokenizerBase,
    sentence: str,
    answer: str,
    *,
    start: int | None = None,
    row_id: str | None = None,
) -> Probe:
    """Tokenise a sentence the way training documents are, and find its answer.

    Args:
        start: First character of the answer; the last occurrence if not given.
        row_id: By default the hash of sentence and answer.

    Raises:
        DataError: the answer is empty, is not in the sentence, not at `start`, or begins with the
            sentence's very first token, which nothing predicts.
        ConfigError: the tokenizer knows no offsets.
    """
    span = _answer_span(sentence, answer, start)
    begin = start_ids(tokenizer)
    ids, offsets = document_tokens(tokenizer, sentence)
    positions = np.flatnonzero(tokens_in(offsets, span)) + len(begin)
    if not len(positions):
        raise DataError(
            f"the answer {answer!r} in {sentence[:60]!r} has no token of its own; the tokenizer "
            "drops its characters: use another tokenizer or leave the row out"
        )
    if positions[0] == 0:
        raise DataError(
            f"the answer {answer!r} begins with the first token of {sentence[:60]!r}, which no token "
            "stands before to predict; use a tokenizer with a start token, a sentence in which the "
            "answer comes later, or leave the row out"
        )
    return Probe(
        row_id=row_id_of(sentence, (answer,)) if row_id is None else row_id,
        input_ids=np.concatenate([np.asarray(begin, dtype=np.int32), ids]),
        positions=positions,
    )


def _answer_span(sentence: str, answer: str, start: int | None) -> Span:
    found = occurrences(sentence, answer)
    if not found:
        raise DataError(
            f"the answer {answer!r} is not in the sentence {sentence[:120]!r}; it has to be there "
            "letter by letter: mend the row or leave it out"
        )
    if start is None:
        return found[-1]
    for span in found:
        if span[0] == start:
            return span
    places = ", ".join(str(first) for first, _ in found)
    raise DataError(
        f"the answer {answer!r} does not begin at character {start} of {sentence[:120]!r}; it begins "
        f"at {places}: mend the place or leave it out"
    )


def score_probes(
    model: nn.Module,
    probes: Sequence[Probe],
    *,
    batch_size: int,
    pad_id: int,
    device: torch.device | str,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score probes: how much of each answer is right, and how unlikely it is.

    Batches are of similar length; how they are cut changes results by rounding alone. The arithmetic
    after the model is in float32, or float64 for a float64 model.

    Args:
        model: Any causal LM without an addition, on `device`.
        batch_size: Probes of a forward pass.

    Returns:
        Accuracy [N], the share of an answer's tokens that are the model's likeliest (the first of
        several that are), and NLL [N], mean per answer token in nats; both in the order of `probes`.

    Raises:
        ValueError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    accuracy, nll = np.zeros(len(probes)), np.zeros(len(probes))
    lengths = np.array([len(probe.input_ids) for probe in probes], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(probes), batch_size):
            chosen = order[start : start + batch_size]
            right_P, nll_P = _score([probes[i] for i in chosen], model, pad_id, device)
            counts = [len(probes[i].positions) for i in chosen]
            for index, right, own in zip(
                chosen, right_P.split(counts), nll_P.split(counts), strict=True
            ):
                accuracy[index] = float(right.double().mean())
                nll[index] = float(own.double().mean())
    return accuracy, nll


def _score(
    probes: Sequence[Probe], model: nn.Module, pad_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return which answer tokens [P] of a batch are right, and their NLL [P], probe after probe."""
    batch = collate(list(_rows(probes)), pad_id).to(device)
    row_P = np.repeat(np.arange(len(probes)), [len(probe.positions) for probe in probes])
    before_P = np.concatenate([probe.positions - 1 for probe in probes])
    columns_K, column_P = np.unique(before_P, return_inverse=True)
    logits_BKV = batch_logits(model, batch, torch.from_numpy(columns_K).to(device))
    at = torch.from_numpy(row_P).to(device), torch.from_numpy(column_P).to(device)
    logits_PV = logits_BKV[at]
    log_p_PV = logits_PV.to(exact_dtype(logits_PV.dtype)).log_softmax(dim=-1)
    answer_P = (
        torch.from_numpy(np.concatenate([probe.answer_ids for probe in probes])).to(device).long()
    )
    right_P = log_p_PV.argmax(dim=-1) == answer_P
    return right_P.cpu(), -log_p_PV.gather(1, answer_P[:, None])[:, 0].cpu()


def _rows(probes: Sequence[Probe]) -> Iterator[TokenizedRow]:
    for probe in probes:
        yield TokenizedRow(
            row_id=probe.row_id,
            input="",
            references=("",),
            input_ids=probe.input_ids,
            prompt_length=0,
        )
