"""SARI: how well a simplification keeps, deletes and adds (Xu et al., TACL 2016, equations 3 to 8).

The mean over n = 1..4 and over three operations: F1 of n-grams kept from the source, precision of those
deleted, F1 of those added, each judged by the references. Two conventions decide small cases and are
those of Hugging Face's metric, which TRACE reports: an operation that nobody wanted and nobody made
counts 1, and the recall of kept n-grams divides by all that the references keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

_ORDERS = (1, 2, 3, 4)


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """Return the SARI of one row, in [0, 1].

    Args:
        source: the text to be simplified; lower-cased and tokenised like the others (mteval 13a).
        references: one or more simplifications.
    """
    tokens = [_tokens(text) for text in (source, prediction, *references)]
    total = 0.0
    for order in _ORDERS:
        grams = [_ngrams(words, order) for words in tokens]
        total += _keep(*grams) + _delete(*grams) + _add(*grams)
    return total / (3 * len(_ORDERS))


@cache
def _tokenizer() -> Any:
    return Tokenizer13a()


def _tokens(text: str) -> list[str]:
    return str(_tokenizer()(text.lower())).split(" ")  # "" has one empty token, as in the reference


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


Grams = Counter[tuple[str, ...]]


def _wanted(source: Grams, references: Sequence[Grams]) -> tuple[Grams, Grams]:
    """Return the source's n-grams, each counted once per reference, and all of the references."""
    scaled = Counter({gram: count * len(references) for gram, count in source.items()})
    return scaled, sum(references, Counter())


def _keep(source: Grams, prediction: Grams, *references: Grams) -> float:
    scaled, wanted = _wanted(source, references)
    kept = scaled & Counter({g: count * len(references) for g, count in prediction.items()})
    good, possible = kept & wanted, scaled & wanted
    precision = sum(good[gram] / kept[gram] for gram in good) / len(kept) if kept else 1.0
    recall = good.total() / possible.total() if possible else 1.0
    return _f1(precision, recall)


def _delete(source: Grams, prediction: Grams, *references: Grams) -> float:
    scaled, wanted = _wanted(source, references)
    gone = scaled - Counter({g: count * len(references) for g, count in prediction.items()})
    good = gone - wanted
    return sum(good[gram] / gone[gram] for gram in good) / len(gone) if gone else 1.0


def _add(source: Grams, prediction: Grams, *references: Grams) -> float:
    wanted = set().union(*references) - set(source)
    added = set(prediction) - set(source)
    good = len(added & wanted)
    return _f1(good / len(added) if added else 1.0, good / len(wanted) if wanted else 1.0)


def _f1(precision: float, recall: float) -> float:
    total = precision + recall
    return 2.0 * precision * recall / total if total else 0.0
