"""Losses with a weight per token, against sums over single tokens; and where weights travel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seekr.answers import Answers, HiddenStates, WholeLogits
from seekr.collation import Batch, collate, collate_packed
from seekr.losses import AnswerNLL
from seekr.prompts import TokenizedRow
from seekr.token_weights import relative_weights, relative_weights_of
from tests.seekr import reference, tiny

DOUBLE = torch.float64
LENGTHS, ANSWER = (9, 5, 7), 4
WIDTH = 6


def weighted_rows(seed: int = 0) -> list[TokenizedRow]:
    """Rows whose answers' tokens have weights of their own, one of them 0."""
    draw = np.random.default_rng(seed)
    found = []
    for row in tiny.rows(LENGTHS, answer=ANSWER):
        values = draw.random(len(row.input_ids)).astype(np.float32)
        values[-2] = 0.0
        found.append(replace(row, weights=relative_weights(values, row.prompt_length)))
    return found


def hidden_of(row: TokenizedRow) -> torch.Tensor:
    """Return what the head is given at a row's tokens [T,H]; it follows from the tokens alone."""
    table = torch.randn(tiny.VOCAB, WIDTH, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    return table[torch.from_numpy(row.input_ids.astype(np.int64))]


def head() -> torch.Tensor:
    return torch.randn(tiny.VOCAB, WIDTH, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)


def hidden_in(batch: Batch, rows: list[TokenizedRow]) -> torch.Tensor:
    """Return the head's input for a batch of rows, padded or packed."""
    if batch.position_ids_BT is not None:
        return torch.cat([hidden_of(row) for row in rows])[None]
    hidden_BTH = torch.randn(*batch.input_ids_BT.shape, WIDTH, dtype=DOUBLE)  # padding: anything
    for index, row in enumerate(rows):
        start = int(batch.start_B[index])
        hidden_BTH[index, start : start + len(row.input_ids)] = hidden_of(row)
    return hidden_BTH


def answers_of(hidden_BTH: torch.Tensor, kind: str) -> Answers:
    if kind == "whole":
        return WholeLogits(hidden_BTH @ head().T)
    return HiddenStates(hidden_BTH, head(), chunk_elements=2 * tiny.VOCAB)


def expected_loss(row: TokenizedRow) -> float:
    """sum_i w_i * -log p(token i | tokens before it), over the answer, a token at a time."""
    logits = (hidden_of(row) @ head().T).numpy()
    total = 0.0
    for index in range(max(1, row.prompt_length), len(row.input_ids)):
        scores = logits[index - 1]
        log_p = scores[row.input_ids[index]] - np.log(np.exp(scores).sum())
        total -= log_p * (1.0 if row.weights is None else float(row.weights[index]))
    return total


@pytest.mark.parametrize("kind", ["whole", "chunked"])
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
def test_weighted_nll_is_the_sum_of_weight_times_minus_log_p(kind: str, layout: Any) -> None:
    rows = weighted_rows()
    batch = collate_packed(rows) if layout == "packed" else collate(rows, 0, side=layout)
    (found_B,) = answers_of(hidden_in(batch, rows), kind).sums(AnswerNLL.of(batch))
    wanted = [expected_loss(row) for row in rows]
    wanted = [sum(wanted)] if layout == "packed" else wanted
    np.testing.assert_allclose(found_B.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("kind", ["whole", "chunked"])
def test_equal_weights_give_the_plain_loss_and_gradient_to_the_bit(kind: str) -> None:
    rows = tiny.rows(LENGTHS, answer=ANSWER)
    ones = [
        replace(
            row,
            weights=relative_weights(
                np.full(len(row.input_ids), 0.3, dtype=np.float32), row.prompt_length
            ),
        )
        for row in rows
    ]
    found = []
    for some in (rows, ones):
        batch = collate(some, 0)
        torch.manual_seed(0)
        hidden_BTH = hidden_in(batch, some).requires_grad_()
        (sums_B,) = answers_of(hidden_BTH, kind).sums(AnswerNLL.of(batch))
        sums_B.sum().backward()
        found.append((sums_B, hidden_BTH.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is not None and found[1][1] is not None
    assert torch.equal(found[0][1], found[1][1])


def test_the_gradient_of_a_token_is_its_weight_times_the_plain_one() -> None:
    rows = weighted_rows()
    batch = collate(rows, 0)
    grads = []
    for weights_BT in (None, batch.weights_BT):
        logits_BTV = (hidden_in(batch, rows) @ head().T).requires_grad_()
        (sums_B,) = WholeLogits(logits_BTV).sums(AnswerNLL(batch.labels_BT, weights_BT))
        sums_B.sum().backward()
        grads.append(logits_BTV.grad)
    plain, weighted = grads
    assert plain is not None and weighted is not None and batch.weights_BT is not None
    for index, row in enumerate(rows):
        assert row.weights is not None
        for token in range(row.prompt_length, len(row.input_ids)):
            torch.testing.assert_close(
                weighted[index, token - 1], plain[index, token - 1] * float(row.weights[token])
            )
        # A token that counts nothing teaches nothing.
        assert not weighted[index, len(row.input_ids) - 3].any()


def test_values_are_what_sums_add_up_and_carry_no_gradient() -> None:
    rows = weighted_rows()
    batch = collate(rows, 0)
    loss = AnswerNLL.of(batch)
    for kind in ("whole", "chunked"):
        answers = answers_of(hidden_in(batch, rows).requires_grad_(), kind)
        values_A = answers.values(loss)
        assert not values_A.requires_grad and len(values_A) == len(rows) * ANSWER
        (sums_B,) = answers.sums(loss)
        added_B = torch.zeros(len(rows), dtype=DOUBLE).index_add(0, loss.row_A, values_A)
        assert sums_B.requires_grad and torch.equal(sums_B.detach(), added_B)


# Not so small that a scale would round them.
SHARES = st.just(0.0) | st.floats(2**-20, 1, width=32)
VALUES = st.lists(SHARES, min_size=2, max_size=9)


@settings(max_examples=80)
@given(values=VALUES, prompt=st.integers(0, 1), scale=st.sampled_from([0.125, 4.0, 64.0]))
def test_relative_weights_have_mean_one_whatever_their_scale(
    values: list[float], prompt: int, scale: float
) -> None:
    own = np.asarray(values, dtype=np.float32)
    found = relative_weights(own, prompt)
    assert found.dtype == np.float32 and not found[:prompt].any()
    answer = [float(value) for value in own[prompt:]]
    total = sum(answer)
    wanted = [value / total * len(answer) if total else 0.0 for value in answer]
    np.testing.assert_allclose(found[prompt:], wanted, rtol=1e-6)
    if total > 1e-30:
        assert float(found[prompt:].astype(np.float64).mean()) == pytest.approx(1, rel=1e-6)
        np.testing.assert_array_equal(relative_weights(own * np.float32(scale), prompt), found)


def test_a_batch_is_weighted_as_its_rows_are() -> None:
    draw = np.random.default_rng(3)
    rows = tiny.rows(LENGTHS, answer=ANSWER)
    values = [draw.random(len(row.input_ids)).astype(np.float32) for row in rows]
    values[1][:] = 0.0  # counts nothing, and is not divided by nothing
    batch = collate([replace(r, weights=v) for r, v in zip(rows, values, strict=True)], 0)
    assert batch.weights_BT is not None
    found_BT = relative_weights_of(batch.weights_BT, batch.labels_BT != -100)
    for index, row in enumerate(rows):
        wanted = relative_weights(values[index], row.prompt_length)
        own = found_BT[index, : len(row.input_ids)].numpy()
        np.testing.assert_allclose(own, wanted, rtol=1e-6)
        assert not found_BT[index, len(row.input_ids) :].any()
    assert not found_BT[1].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["weights", "reference_nll"])
def test_what_a_row_carries_stays_beside_its_tokens(side: Any, name: str) -> None:
    rows = [
        replace(row, **{name: np.arange(1, len(row.input_ids) + 1, dtype=np.float32)})
        for row in tiny.rows(LENGTHS)
    ]
    padded, packed = collate(rows, 0, side=side, multiple_of=4), collate_packed(rows)
    numbers = [list(range(1, length + 1)) for length in LENGTHS]
    width = padded.input_ids_BT.shape[1]
    values_BT = getattr(padded, f"{name}_BT")
    for index, own in enumerate(numbers):
        fill = [0] * (width - len(own))
        assert values_BT[index].tolist() == (fill + own if side == "left" else own + fill)
    assert getattr(packed, f"{name}_BT")[0].tolist() == [*numbers[0], *numbers[1], *numbers[2]]
    other = "reference_nll" if name == "weights" else "weights"
    assert getattr(padded, f"{other}_BT") is None and getattr(packed, f"{other}_BT") is None
    assert getattr(padded.to("cpu"), f"{name}_BT").dtype == torch.float32


@pytest.mark.parametrize("collator", [lambda rows: collate(rows, 0), collate_packed])
@pytest.mark.parametrize("name", ["weights", "reference_nll"])
def test_rows_with_and_without_weights_do_not_share_a_batch(collator: Any, name: str) -> None:
    first, second, _ = tiny.rows(LENGTHS)
    whole = replace(first, **{name: np.ones(9, dtype=np.float32)})
    with pytest.raises(ValueError, match=f"{second.row_id} has 5 tokens and none of {name}"):
        collator([whole, second])
    short = replace(first, **{name: np.ones(8, dtype=np.float32)})
    with pytest.raises(ValueError, match=f"{first.row_id} has 9 tokens and 8 of {name}"):
        collator([short])


def test_the_reference_of_these_tests_is_that_of_plain_losses() -> None:
    for row in tiny.rows(LENGTHS, answer=ANSWER):
        plain, count = reference.answer_loss(hidden_of(row) @ head().T, row)
        assert plain == pytest.approx(expected_loss(row), rel=1e-12) and count == ANSWER
