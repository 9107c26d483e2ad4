"""What training on new facts did to new and to old ones: figures read off two curves over epochs.

A curve has a value per epoch e = 0..E, of which 0 is before training: the mean token accuracy of probes
(`seekr.fact_probes`) on facts that are being learnt (TO-LEARN) and on facts that shall not be forgotten
(NOT-TO-FORGET). The names of the figures are those of the LAMA-ckl benchmark (Seo et al., NeurIPS 2024).
Its Top Acc picks the best epoch by the facts it then reports, which flatters a method; so the last epoch
is reported beside it, and the floor that a constant answer reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeCurves:
    """Mean token accuracies, in [0, 1], per epoch from 0.

    Raises:
        ValueError: the curves are empty, differ in length or hold something that is no number.
    """

    to_learn: tuple[float, ...]
    not_to_forget: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.to_learn) != len(self.not_to_forget) or not self.to_learn:
            raise ValueError(
                f"the curves have {len(self.to_learn)} and {len(self.not_to_forget)} epochs; as many "
                "in both, and at least one, are needed"
            )
        if not all(math.isfinite(value) for value in (*self.to_learn, *self.not_to_forget)):
            raise ValueError("a curve holds a value that is no number; score every epoch")

    @property
    def top_accuracy(self) -> float:
        """Top Acc: the best accuracy on TO-LEARN."""
        return max(self.to_learn)

    @property
    def epoch(self) -> int:
        """The first epoch that reaches it."""
        return self.to_learn.index(self.top_accuracy)

    @property
    def kept_at_top(self) -> float:
        """NF Acc: accuracy on NOT-TO-FORGET at that epoch."""
        return self.not_to_forget[self.epoch]

    @property
    def total_knowledge(self) -> float:
        """Top Acc + NF Acc, at most 2."""
        return self.top_accuracy + self.kept_at_top

    @property
    def final_accuracy(self) -> float:
        """Accuracy on TO-LEARN after the last epoch."""
        return self.to_learn[-1]

    @property
    def final_kept(self) -> float:
        """Accuracy on NOT-TO-FORGET after the last epoch."""
        return self.not_to_forget[-1]

    @property
    def final_total(self) -> float:
        """Their sum: Total Knowledge without the choice of an epoch."""
        return self.final_accuracy + self.final_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantFloor:
    """The best that one answer to all questions reaches.

    Attributes:
        accuracy: Mean token accuracy, in [0, 1].
        answer: Its tokens.
    """

    accuracy: float
    answer: tuple[int, ...]


def constant_floor(answers: Sequence[Sequence[int]]) -> ConstantFloor:
    """Return the best mean token accuracy of answering everything with one of the answers.

    Constant and answer are laid side by side from their first token. The accuracy on an answer of n
    tokens is (places j < n at which the constant has the answer's token) / n: what the constant lacks
    is wrong, what it has beyond n is not looked at, as a probe has no place for it. Of constants that
    are equally good the one that comes first is named.

    Args:
        answers: Per probe the tokens of its answer, none empty (`Probe.answer_ids`).

    Raises:
        ValueError: there is no answer, or an empty one.
    """
    known = [tuple(int(token) for token in answer) for answer in answers]
    if not known or not all(known):
        raise ValueError("a floor needs answers, each of at least one token")
    counts: dict[tuple[int, ...], int] = {}
    for answer in known:
        counts[answer] = counts.get(answer, 0) + 1

    def reached(constant: tuple[int, ...]) -> float:
        shares = (n * _agreement(constant, answer) for answer, n in counts.items())
        return math.fsum(shares) / len(known)

    best = max(counts, key=reached)
    return ConstantFloor(accuracy=reached(best), answer=best)


def _agreement(constant: tuple[int, ...], answer: tuple[int, ...]) -> float:
    return sum(ours == theirs for ours, theirs in zip(constant, answer, strict=False)) / len(answer)
