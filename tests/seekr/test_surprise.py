"""Which rows surprise a model: the number itself, and the choice made by it."""

from __future__ import annotations

import math
import random

import pytest

from seekr.collation import collate
from seekr.errors import DataError
from seekr.forward import batch_logits
from seekr.models import tiny_llama
from seekr.sampling import most_surprising
from seekr.surprise import surprise
from tests.seekr.tiny import row

SHAPE = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_positions": 32}


ROWS = [row("a", [5, 9, 3, 7, 1], 2), row("b", [8, 8, 2, 1], 3), row("c", [4, 6, 11, 1], 1)]


def test_surprise_is_the_mean_nll_of_the_answer_tokens() -> None:
    model = tiny_llama(**SHAPE, seed=1).double()
    expected: list[float] = []
    for one in ROWS:
        log_p = batch_logits(model, collate([one], pad_id=0))[0].log_softmax(dim=-1)
        answer = range(one.prompt_length, len(one.input_ids))
        nlls = [-float(log_p[t - 1, int(one.input_ids[t])].detach()) for t in answer]
        expected.append(sum(nlls) / len(nlls))
    assert surprise(model, ROWS) == pytest.approx(expected, rel=1e-12)


def test_a_rows_surprise_is_the_same_to_the_bit_beside_any_others() -> None:
    model = tiny_llama(**SHAPE, seed=1)
    assert surprise(model, ROWS) == [surprise(model, [one])[0] for one in ROWS]


def test_the_most_surprising_rows_are_kept_in_any_order_and_ties_go_by_id() -> None:
    draw = random.Random(0)
    values = {f"r{n:03d}": float(draw.randrange(5)) for n in range(40)}
    ranked = sorted(sorted(values), key=lambda name: -values[name])  # stable: ties by id
    shuffled = list(values.items())
    draw.shuffle(shuffled)
    for size in (1, 7, 40):
        assert most_surprising(dict(shuffled), size) == sorted(ranked[:size])


@pytest.mark.parametrize("size", [0, 3])
def test_a_replay_set_that_cannot_be_filled_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=r"1\.\.2 is allowed"):
        most_surprising({"a": 1.0, "b": 2.0}, size)


def test_a_surprise_that_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match="the first is b"):
        most_surprising({"a": 1.0, "b": math.nan}, 1)
