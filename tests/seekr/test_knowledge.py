"""The figures of LAMA-ckl on curves worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from seekr.knowledge import KnowledgeCurves, constant_floor


def test_the_figures_of_a_curve_worked_by_hand() -> None:
    curves = KnowledgeCurves(
        to_learn=(0.0, 0.25, 0.5, 0.375, 0.5), not_to_forget=(1.0, 0.875, 0.75, 0.625, 0.25)
    )
    assert curves.top_accuracy == 0.5
    assert curves.epoch == 2  # epoch 4 is as good, and later
    assert curves.kept_at_top == 0.75
    assert curves.total_knowledge == 1.25
    assert curves.final_accuracy == 0.5
    assert curves.final_kept == 0.25
    assert curves.final_total == 0.75


def test_a_model_that_only_gets_worse_was_best_before_training() -> None:
    curves = KnowledgeCurves(to_learn=(0.2, 0.1), not_to_forget=(0.9, 0.3))
    assert (curves.epoch, curves.kept_at_top) == (0, 0.9)
    assert curves.total_knowledge == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("to_learn", "kept", "message"),
    [
        ((0.1, 0.2), (0.1,), "2 and 1 epochs"),
        ((), (), "at least one"),
        ((0.1,), (float("nan"),), "no number"),
    ],
)
def test_curves_that_say_nothing_are_refused(
    to_learn: tuple[float, ...], kept: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KnowledgeCurves(to_learn=to_learn, not_to_forget=kept)


def test_the_floor_of_answers_of_one_token_is_the_share_of_the_commonest() -> None:
    floor = constant_floor([[7], [5], [7], [8], [7]])
    assert (floor.accuracy, floor.answer) == (0.6, (7,))


def test_the_floor_counts_shared_beginnings_and_what_a_constant_lacks_as_wrong() -> None:
    """(1, 2, 3) has all of itself, both of (1, 2), none of (4,) and half of (1, 9): 2.5 of 4."""
    answers = [[1, 2, 3], [1, 2], [4], [1, 9]]
    assert constant_floor(answers).accuracy == 2.5 / 4
    assert constant_floor(answers).answer == (1, 2, 3)
    # The whole of every answer, however much of it there is beyond.
    assert constant_floor([[1], [1, 2], [1, 2, 3, 4]]).answer == (1, 2, 3, 4)
    assert constant_floor([[1], [1], [2, 1]]).accuracy == 2 / 3


def test_no_constant_that_can_be_tried_beats_the_floor() -> None:
    draw = np.random.default_rng(0)
    answers = [draw.integers(0, 4, size=draw.integers(1, 4)).tolist() for _ in range(60)]
    floor = constant_floor(answers)
    for constant in answers:
        shares = [
            sum(j < len(constant) and constant[j] == token for j, token in enumerate(answer))
            / len(answer)
            for answer in answers
        ]
        assert np.mean(shares) <= floor.accuracy + 1e-12
    assert floor.accuracy == constant_floor(answers[::-1]).accuracy


def test_a_floor_without_answers_is_refused() -> None:
    for answers in ([], [[1], []]):
        with pytest.raises(ValueError, match="needs answers"):
            constant_floor(answers)
