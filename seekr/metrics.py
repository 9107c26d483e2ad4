"""How good an answer is, and what a stream of tasks did to the model.

Two parts with one border: per-row metrics in [0, 1] of (prediction, references, source), the best over
a row's references where they are compared one by one; and the matrix R[i][j] (score on task j after
learning task i) with the continual-learning figures read off it. The matrix may be partial: a figure
that needs a cell not measured yet is None, never a guess.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Literal

from rapidfuzz import fuzz
from sacrebleu.metrics.bleu import BLEU

from seekr.sari import sari

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

# Of a prediction, its references, and the text it was made from.
Metric = Callable[[str, Sequence[str], str], float]
BASE = "base"
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LABEL = re.compile(r"[+-]?\d+(?:\.\d+)?(?!\w)|\w+")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def exact_match(prediction: str, references: Sequence[str], source: str = "") -> float:
    """Return 1.0 if the prediction equals a reference, else 0.0.

    Both are lower-cased, ASCII punctuation is deleted and blanks are collapsed (SAPT). A reference
    that is punctuation only is compared as it stands, so that it does not equal the empty string.
    """
    return float(any(_equal(prediction, reference) for reference in references))


def _equal(prediction: str, reference: str) -> bool:
    wanted = _normalise(reference)
    return _normalise(prediction) == wanted if wanted else prediction.strip() == reference.strip()


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_DROP_PUNCTUATION).split())


def accuracy(prediction: str, references: Sequence[str], source: str = "") -> float:
    """Return 1.0 if the prediction's first label is the first label of a reference, else 0.0.

    A label is the first number or word, case folded; numbers are compared by value ("5.0" is "5",
    "1,000" is "1000"). So "B. hawkish" matches "B", and "A" matches a reference "A\\nBecause ..."
    (TRACE's choice tasks and NumGLUE). Labels of several words need `exact_match`.
    """
    label = _first_label(prediction)
    return float(label is not None and any(label == _first_label(ref) for ref in references))


def _first_label(text: str) -> str | Decimal | None:
    found = _LABEL.search(_THOUSANDS.sub("", text))
    if found is None:
        return None
    label = found.group()
    return Decimal(label) if _NUMBER.fullmatch(label) else label.casefold()


def rouge_l(prediction: str, references: Sequence[str], source: str = "") -> float:
    """Return the best ROUGE-L F1, Google's scorer with Porter stemming as SuperNI and SAPT use it.

    Its tokens are lower-cased runs of [a-z0-9]: text in other scripts scores 0, use
    `edit_similarity` there.
    """
    scorer = _rouge_scorer()
    return max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references)


@cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # with it comes NLTK, which takes seconds

    return RougeScorer(["rougeL"], use_stemmer=True)


def edit_similarity(prediction: str, references: Sequence[str], source: str = "") -> float:
    """Return the best 1 - indel distance / total length (TRACE's fuzzywuzzy ratio on Py150)."""
    return max(fuzz.ratio(prediction, reference) / 100.0 for reference in references)


def bleu(prediction: str, references: Sequence[str], source: str = "") -> float:
    """Return sacrebleu's sentence BLEU (13a tokens, exponential smoothing, effective order)."""
    return min(1.0, _bleu().sentence_score(prediction, list(references)).score / 100.0)


@cache
def _bleu() -> BLEU:
    return BLEU(effective_order=True)


def simplification(prediction: str, references: Sequence[str], source: str = "") -> float:
    """Return the SARI of a simplification of `source` (TRACE's 20Minuten, whose source is the prompt)."""
    return sari(source, prediction, references)


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "accuracy": accuracy,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "bleu": bleu,
    "sari": simplification,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyMatrix:
    """Scores by (model after, task), tasks in the order learnt; "base" is the untrained model.

    Attributes:
        tasks: Task names in stream order.
        cells: {(model_after, task): score}; absent cells were not measured.
    """

    tasks: tuple[str, ...]
    cells: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {BASE, *self.tasks}
        for after, task in self.cells:
            if after not in known or task not in self.tasks:
                raise ValueError(f"cell ({after!r}, {task!r}) is not among the tasks {self.tasks}")

    @classmethod
    def from_cells(
        cls, tasks: Sequence[str], cells: Iterable[tuple[str, str, float]]
    ) -> AccuracyMatrix:
        """Build from (model_after, task, score) triples; a repeated cell keeps its last value."""
        return cls(tasks=tuple(tasks), cells={(after, task): score for after, task, score in cells})

    def score(self, i: int, j: int) -> float | None:
        """Return R[i][j], counted from 0; i = -1 is the base model."""
        return self.cells.get((BASE if i < 0 else self.tasks[i], self.tasks[j]))

    def rows(self) -> list[list[float | None]]:
        """Return R without the base row, None where a cell is absent."""
        size = range(len(self.tasks))
        return [[self.score(i, j) for j in size] for i in size]

    def op(self, after: int | None = None) -> float | None:
        """Overall performance (14): mean over tasks 0..i of R[i][j], i = `after` or the last."""
        last = self._last(after)
        return _mean([self.score(last, j) for j in range(last + 1)])

    def bwt(
        self, after: int | None = None, denominator: Literal["paper", "trace"] = "paper"
    ) -> float | None:
        """Backward transfer (15): sum over j < i of R[i][j] - R[j][j], over a number of tasks.

        Args:
            after: i, by default the last task.
            denominator: "paper" divides by the T - 1 earlier tasks, "trace" by all T (TRACE and
                SEEKR's own scripts). With one task the paper's is undefined and None is returned.
        """
        last = self._last(after)
        changes = [_difference(self.score(last, j), self.score(j, j)) for j in range(last)]
        return _mean(changes if denominator == "paper" else [*changes, 0.0])

    def fwt(self, after: int | None = None) -> float | None:
        """Forward transfer: mean over j >= 1 of R[j-1][j] - R[base][j] (Lopez-Paz and Ranzato)."""
        last = self._last(after)
        return _mean(
            [_difference(self.score(j - 1, j), self.score(-1, j)) for j in range(1, last + 1)]
        )

    def forgetting(self, after: int | None = None) -> dict[str, float | None]:
        """Per earlier task, the best score since it was learnt minus the last (Chaudhry et al.).

        The best is over the models before the last one, so a task that improved is negative.
        """
        last = self._last(after)
        lost: dict[str, float | None] = {}
        for j in range(last):
            earlier = [self.score(i, j) for i in range(j, last)]
            known = [score for score in earlier if score is not None]
            lost[self.tasks[j]] = _difference(max(known, default=None), self.score(last, j))
        return lost

    def _last(self, after: int | None) -> int:
        return len(self.tasks) - 1 if after is None else after


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if values and len(known) == len(values) else None
