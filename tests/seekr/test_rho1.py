"""RHO-1's loss on a batch, against its equations token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from seekr.answers import HiddenStates, WholeLogits
from seekr.collation import Batch, collate
from seekr.methods import RHO1
from seekr.methods.contract import Outputs
from seekr.prompts import TokenizedRow
from tests.seekr import tiny

LENGTHS, ANSWER = (11, 6, 8), 5


def rows() -> list[TokenizedRow]:
    draw = np.random.default_rng(4)
    found = []
    for row in tiny.rows(LENGTHS, answer=ANSWER):
        nll = draw.random(len(row.input_ids)).astype(np.float32) * 4
        nll[: row.prompt_length] = 0
        found.append(replace(row, reference_nll=nll))
    return found


def logits_of(batch: Batch) -> torch.Tensor:
    shape = (*batch.input_ids_BT.shape, tiny.VOCAB)
    generator = torch.Generator().manual_seed(6)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def kept_tokens(row: TokenizedRow, nll: list[float], share: float) -> list[int]:
    """Return the places of the tokens with the highest excess loss, the earlier of equal ones."""
    assert row.reference_nll is not None
    places = list(range(row.prompt_length, len(row.input_ids)))
    order = sorted(places, key=lambda i: (-(nll[i] - float(row.reference_nll[i])), i))
    return order[: max(1, int(np.floor(share * len(places) + 0.5)))]


def token_losses(row: TokenizedRow, logits_TV: torch.Tensor) -> list[float]:
    scores = logits_TV.numpy()
    return [0.0] + [
        float(np.log(np.exp(scores[i - 1]).sum()) - scores[i - 1][row.input_ids[i]])
        for i in range(1, len(row.input_ids))
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 1.0])
def test_each_row_counts_with_the_mean_of_its_kept_tokens_times_its_length(
    side: Any, share: float
) -> None:
    own, batch = rows(), collate(rows(), 0, side=side)
    logits_BTV = logits_of(batch).requires_grad_()
    method = RHO1(share=share)
    terms = method.task_terms(Outputs(answers=WholeLogits(logits_BTV), batch=batch))
    wanted = 0.0
    kept: set[tuple[int, int]] = set()
    for index, row in enumerate(own):
        start = int(batch.start_B[index])
        part = logits_BTV[index, start : start + len(row.input_ids)].detach()
        nll = token_losses(row, part)
        places = kept_tokens(row, nll, share)
        wanted += ANSWER * sum(nll[i] for i in places) / len(places)
        kept |= {(index, start + i - 1) for i in places}
    term = terms["task"]
    assert terms.keys() == {"task"} and term.per == "task_tokens" and term.weight == 1.0
    assert float(term.total.detach()) == pytest.approx(wanted, rel=1e-6)  # weights are float32
    term.total.backward()
    assert logits_BTV.grad is not None
    reached = {(int(b), int(t)) for b, t in logits_BTV.grad.abs().sum(dim=-1).nonzero()}
    assert reached == kept


def test_chunks_of_the_head_give_what_whole_logits_give() -> None:
    batch = collate(rows(), 0)
    generator = torch.Generator().manual_seed(1)
    hidden_BTH = torch.randn(*batch.input_ids_BT.shape, 5, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(tiny.VOCAB, 5, generator=generator, dtype=torch.float64)
    method = RHO1(share=0.5)
    whole, chunked = (
        method.task_terms(Outputs(answers=answers, batch=batch))["task"].total
        for answers in (
            WholeLogits(hidden_BTH @ weight_VH.T),
            HiddenStates(hidden_BTH, weight_VH, chunk_elements=tiny.VOCAB),
        )
    )
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_become_a_loss_that_is_none(broken: float) -> None:
    """Not an error: the training says by itself that it diverged, and where."""
    batch = collate(rows(), 0)
    logits_BTV = logits_of(batch)
    logits_BTV[1, 2, 3] = broken
    terms = RHO1(share=0.2).task_terms(Outputs(answers=WholeLogits(logits_BTV), batch=batch))
    assert not torch.isfinite(terms["task"].total)


def test_the_first_task_is_learnt_by_its_own_settings() -> None:
    assert RHO1(share=0.3).first_task_settings() == {"name": "rho1", "share": 0.3}
