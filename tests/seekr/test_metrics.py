"""Row metrics on worked cases, and the stream's figures against matrices worked by hand."""

from __future__ import annotations

import pytest
import sacrebleu
from rapidfuzz.distance import Indel
from rouge_score.rouge_scorer import RougeScorer

from seekr.metrics import METRICS, AccuracyMatrix, accuracy, edit_similarity, exact_match, rouge_l
from seekr.sari import sari


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The  Cat!", ("the cat",), 1.0),
        ("the cat", ("dog", "The cat."), 1.0),
        ("the cats", ("the cat",), 0.0),
        ("", ("-",), 0.0),
        (" - ", ("-",), 1.0),
        ("", ("",), 1.0),
    ],
)
def test_exact_match_ignores_case_punctuation_and_blanks(prediction, references, expected):
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("B. hawkish", "B", 1.0),
        ("b", "B", 1.0),
        ("A\nBecause it is B", "A\nfor another reason", 1.0),
        ("Because A", "A", 0.0),
        ("AB", "A", 0.0),
        ("The answer is A", "the", 1.0),
        ("1,000 km", "1000", 1.0),
        ("5.0", "5", 1.0),
        ("-5", "5", 0.0),
        ("12.5", "12", 0.0),
        ("5th", "5", 0.0),
        ("", "A", 0.0),
        ("...", "...", 0.0),
        ("支持", "支持", 1.0),
    ],
)
def test_accuracy_compares_the_first_label(prediction, reference, expected):
    assert accuracy(prediction, (reference,)) == expected


def slow_lcs(left: list[str], right: list[str]) -> int:
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return 1 + slow_lcs(left[:-1], right[:-1])
    return max(slow_lcs(left[:-1], right), slow_lcs(left, right[:-1]))


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    prediction, reference = "the cat sat on a mat", "a cat was on the mat"
    common = slow_lcs(prediction.split(), reference.split())
    assert common == 3
    assert rouge_l(prediction, (reference,)) == pytest.approx(common / 6)


def test_rouge_l_stems_words():
    assert rouge_l("running cats", ("run cat",)) == 1.0


def test_edit_similarity_is_one_minus_indels_over_total_length():
    assert edit_similarity("abcd", ("abxd",)) == pytest.approx(1 - 2 / 8)
    assert edit_similarity("", ("abc",)) == 0.0


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"sari"}))
def test_every_metric_takes_the_best_reference_and_knows_its_bounds(name: str):
    metric = METRICS[name]
    assert metric("yes", ("no", "yes")) == metric("yes", ("yes", "no")) == 1.0
    assert metric("yes", ("no",)) == metric("qqq", ("no",)) == 0.0


PAIRS = [
    ("the cat sat on the mat", ("a cat sat on a mat", "the dog stood")),
    ("Insgesamt 3 Katzen.", ("Es sind drei Katzen.",)),
    ("for i in range(10):", ("for index in range(10):", "while True:")),
    ("summaries are running well", ("a summary runs well",)),
    ("", ("something",)),
]


@pytest.mark.parametrize(("prediction", "references"), PAIRS)
def test_metrics_agree_with_the_packages_that_define_them(prediction, references):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = scorer.score_multi(list(references), prediction)["rougeL"].fmeasure
    assert METRICS["rouge_l"](prediction, references, "") == pytest.approx(best)
    sentence = sacrebleu.sentence_bleu(prediction, list(references), use_effective_order=True)
    assert METRICS["bleu"](prediction, references, "") == pytest.approx(sentence.score / 100)
    similar = max(Indel.normalized_similarity(prediction, other) for other in references)
    assert METRICS["edit_similarity"](prediction, references, "") == pytest.approx(similar)
    found = METRICS["sari"](prediction, references, "the source")
    assert found == sari("the source", prediction, references)


# R[i][j] in tenths, tasks a, b, c; base row 0.1 0.2 0.3.
TASKS = ("a", "b", "c")
R = [[0.9, 0.4, 0.2], [0.6, 0.8, 0.5], [0.7, 0.5, 1.0]]
BASE = [0.1, 0.2, 0.3]


def full() -> AccuracyMatrix:
    cells = [("base", task, score) for task, score in zip(TASKS, BASE, strict=True)]
    cells += [(TASKS[i], TASKS[j], R[i][j]) for i in range(3) for j in range(3)]
    return AccuracyMatrix.from_cells(TASKS, cells)


def test_figures_of_a_full_matrix_are_those_worked_by_hand():
    matrix = full()
    assert matrix.rows() == R
    assert matrix.op() == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    # (0.7 - 0.9) + (0.5 - 0.8) = -0.5
    assert matrix.bwt() == pytest.approx(-0.5 / 2)
    assert matrix.bwt(denominator="trace") == pytest.approx(-0.5 / 3)
    # (R[a][b] - base b) = 0.2, (R[b][c] - base c) = 0.2
    assert matrix.fwt() == pytest.approx(0.2)
    assert matrix.forgetting() == pytest.approx({"a": 0.2, "b": 0.3})


def test_figures_after_an_earlier_task_use_only_what_was_known_then():
    matrix = full()
    assert matrix.op(after=1) == pytest.approx(0.7)
    assert matrix.bwt(after=1) == pytest.approx(-0.3)
    assert matrix.bwt(after=1, denominator="trace") == pytest.approx(-0.15)
    assert matrix.fwt(after=1) == pytest.approx(0.2)
    assert matrix.forgetting(after=1) == pytest.approx({"a": 0.3})


def test_forgetting_counts_from_the_best_score_since_learnt_and_may_be_negative():
    cells = [("a", "a", 0.5), ("b", "a", 0.8), ("c", "a", 0.6), ("b", "b", 0.3), ("c", "b", 0.4)]
    lost = AccuracyMatrix.from_cells(TASKS, cells).forgetting()
    assert lost == pytest.approx({"a": 0.2, "b": -0.1})


def test_a_figure_that_needs_a_missing_cell_is_none():
    matrix = AccuracyMatrix.from_cells(TASKS, [("a", "a", 0.9), ("b", "a", 0.6), ("b", "b", 0.8)])
    assert matrix.op() is None and matrix.bwt() is None and matrix.fwt() is None
    assert matrix.op(after=1) == pytest.approx(0.7)
    assert matrix.forgetting() == {"a": None, "b": None}
    assert matrix.rows()[2] == [None, None, None]


def test_one_task_has_no_backward_transfer_in_the_paper_and_zero_in_trace():
    matrix = AccuracyMatrix.from_cells(("a",), [("a", "a", 0.9)])
    assert matrix.op() == 0.9
    assert matrix.bwt() is None
    assert matrix.bwt(denominator="trace") == 0.0


def test_a_cell_of_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="'z'"):
        AccuracyMatrix.from_cells(TASKS, [("a", "z", 0.5)])
