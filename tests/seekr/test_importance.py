"""Scores against autograd on full maps, and the definitions against loops over rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seekr import score_probes
from seekr.collation import Side, collate
from seekr.errors import DataError
from seekr.importance import (
    HeadStatistics,
    combine,
    forgettability,
    score_batch,
    task_sensitivity,
)
from seekr.prompts import TokenizedRow
from seekr.sampling import query_positions
from seekr.teacher import place_positions
from tests.seekr import reference, tiny

FIELDS = ("grad_sq_causal", "grad_sq_square", "diff_sq", "diff_sq_queries")


def queries_of(row: TokenizedRow, budget: int | None = 3) -> np.ndarray:
    return query_positions(0, row.row_id, len(row.input_ids), budget)


def score(
    name: str,
    rows: list[TokenizedRow],
    side: Side = "right",
    multiple_of: int = 1,
    budget: int | None = 3,
) -> list[HeadStatistics]:
    batch = collate(rows, tiny.PAD_ID, side, multiple_of)
    placed = place_positions([queries_of(row, budget) for row in rows], batch)
    return score_batch(tiny.build(name, seed=1), tiny.build(name), batch, placed)


def assert_same(found: HeadStatistics, expected: HeadStatistics, rtol: float = 1e-6) -> None:
    assert (found.row_id, found.length, found.num_queries) == (
        expected.row_id,
        expected.length,
        expected.num_queries,
    )
    for field in FIELDS:
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=rtol)


def slow_score(name: str, row: TokenizedRow, budget: int | None = 3) -> HeadStatistics:
    before = tiny.build(name, attention="reference", seed=1)
    after = tiny.build(name, attention="reference")
    queries = queries_of(row, budget)
    causal, square = reference.gradient_squares(after, row)
    everywhere, chosen = reference.difference_squares(before, after, row, queries)
    return HeadStatistics(
        row_id=row.row_id,
        length=len(row.input_ids),
        num_queries=len(queries),
        grad_sq_causal=causal,
        grad_sq_square=square,
        diff_sq=everywhere,
        diff_sq_queries=chosen,
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_scores_equal_autograd_on_full_maps(name: str, side: Side) -> None:
    rows = tiny.rows()
    for found, row in zip(score(name, rows, side, multiple_of=4), rows, strict=True):
        assert_same(found, slow_score(name, row))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 12), min_size=1, max_size=3),
    name=st.sampled_from(tiny.MODELS),
    side=st.sampled_from(["left", "right"]),
    multiple_of=st.integers(1, 8),
    budget=st.one_of(st.none(), st.integers(1, 5)),
    tile=st.sampled_from([1, 300, 1 << 23]),
)
def test_scores_equal_the_reference_for_any_lengths_padding_budget_and_tile(
    lengths: list[int], name: str, side: Side, multiple_of: int, budget: int | None, tile: int
) -> None:
    rows = tiny.rows(tuple(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_probes, "TILE_ELEMENTS", tile)
        found = score(name, rows, side, multiple_of, budget)
    for statistics, row in zip(found, rows, strict=True):
        assert_same(statistics, slow_score(name, row, budget))


def test_gradients_equal_those_of_transformers_eager_attention_in_float32() -> None:
    (row,) = tiny.rows((9,))
    eager = tiny.build("llama2-gqa", attention="eager", exact=False)
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    out = eager(ids, output_attentions=True, use_cache=False)
    total, count = reference.answer_loss(out.logits[0], row)
    gradients = torch.autograd.grad(total / count, out.attentions)
    expected = torch.stack([g[0].double().square().sum(dim=(1, 2)) for g in gradients]).numpy()
    after = tiny.build("llama2-gqa", exact=False)
    before = tiny.build("llama2-gqa", seed=1, exact=False)
    batch = collate([row], tiny.PAD_ID)
    (found,) = score_batch(before, after, batch, place_positions([queries_of(row)], batch))
    np.testing.assert_allclose(found.grad_sq_square, expected, rtol=1e-4)


def test_scores_do_not_depend_on_batch_composition() -> None:
    rows = tiny.rows()
    together = score("qwen2-mixed-window-gqa", rows)
    for found, row in zip(together, rows, strict=True):
        (alone,) = score("qwen2-mixed-window-gqa", [row], "left", multiple_of=8)
        assert_same(found, alone, rtol=1e-9)


def test_scoring_leaves_no_gradient_and_no_flag_or_mode_changed() -> None:
    before, after = tiny.build("llama2-gqa", seed=1).train(), tiny.build("llama2-gqa").train()
    after.model.layers[1].eval()
    after.lm_head.weight.requires_grad_(False)
    after.model.norm.weight.grad = kept = torch.ones(16, dtype=torch.float64)
    rows = tiny.rows()
    batch = collate(rows, tiny.PAD_ID)
    state = {name: value.clone() for name, value in after.state_dict().items()}
    score_batch(before, after, batch, place_positions([queries_of(row) for row in rows], batch))
    for model in (before, after):
        flags = {name: value.requires_grad for name, value in model.named_parameters()}
        assert [name for name, flag in flags.items() if not flag] == (
            ["lm_head.weight"] if model is after else []
        )
        grads = [name for name, value in model.named_parameters() if value.grad is not None]
        assert grads == (["model.norm.weight"] if model is after else [])
    assert after.model.norm.weight.grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert after.training and not after.model.layers[1].training and after.model.layers[2].training
    assert all(torch.equal(value, state[name]) for name, value in after.state_dict().items())


def test_scoring_works_under_no_grad_and_ignores_dropout() -> None:
    rows = tiny.rows((6,))
    expected = score("llama2-gqa", rows)[0]
    after = tiny.build("llama2-gqa").train()
    for layer in after.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = collate(rows, tiny.PAD_ID)
    before = tiny.build("llama2-gqa", seed=1)
    with torch.no_grad():
        (found,) = score_batch(before, after, batch, place_positions([queries_of(rows[0])], batch))
    assert_same(found, expected, rtol=1e-12)


def test_a_row_without_an_answer_is_refused_by_name() -> None:
    (row,) = tiny.rows((6,), answer=0)
    batch = collate([row], tiny.PAD_ID)
    model = tiny.build("llama2-gqa")
    with pytest.raises(DataError, match=f"{row.row_id} has no answer token"):
        score_batch(model, model, batch, place_positions([queries_of(row)], batch))


def test_a_model_compared_with_itself_forgets_nothing() -> None:
    (row,) = tiny.rows((6,))
    batch = collate([row], tiny.PAD_ID)
    model = tiny.build("llama2-gqa")
    (found,) = score_batch(model, model, batch, place_positions([queries_of(row)], batch))
    assert (found.diff_sq == 0).all() and (found.grad_sq_causal > 0).all()


def random_statistics(rows: int, seed: int = 0, layers: int = 3, heads: int = 4):
    generator = np.random.default_rng(seed)
    return [
        HeadStatistics(
            row_id=f"{generator.integers(1 << 60):x}",
            length=int(generator.integers(5, 50)),
            num_queries=int(generator.integers(1, 5)),
            **{field: 10.0 ** generator.normal(0, 4, (layers, heads)) for field in FIELDS},
        )
        for _ in range(rows)
    ]


def test_paper_definitions_equal_equations_7_and_9() -> None:
    stats = random_statistics(5)
    sensitivity, forgot = task_sensitivity(stats, "paper"), forgettability(stats, "paper")
    for layer in range(3):
        norms = [
            sum(math.sqrt(row.grad_sq_causal[layer, head]) for row in stats) / 5
            for head in range(4)
        ]
        for head in range(4):
            assert math.isclose(sensitivity[layer, head], norms[head] / sum(norms), rel_tol=1e-12)
            changes = [math.sqrt(row.diff_sq[layer, head]) for row in stats]
            assert math.isclose(forgot[layer, head], sum(changes) / 5, rel_tol=1e-12)


def test_official_definitions_equal_means_over_arrays_padded_to_the_longest_row() -> None:
    rows = tiny.rows((9, 5, 7))
    stats = score("llama2-mha", rows, budget=3)
    models = [tiny.build("llama2-mha", attention="reference", seed=seed) for seed in (1, 0)]
    gradients = torch.zeros(3, tiny.LAYERS, tiny.HEADS, 9, 9, dtype=torch.float64)
    differences = torch.zeros(3, tiny.LAYERS, tiny.HEADS, 3, 9, dtype=torch.float64)
    for index, row in enumerate(rows):
        logits, maps = reference.forward(models[1], row)
        total, count = reference.answer_loss(logits, row)
        length = len(row.input_ids)
        for layer, gradient in enumerate(torch.autograd.grad(total / count, maps)):
            gradients[index, layer, :, :length, :length] = gradient[0]
        others = reference.forward(models[0], row)[1]
        for layer, (a, b) in enumerate(zip(maps, others, strict=True)):
            change = (a - b)[0, :, queries_of(row)].detach()
            differences[index, layer, :, :, :length] = change
    mean = gradients.square().mean(dim=(0, 3, 4))
    expected = mean / mean.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(task_sensitivity(stats, "official"), expected, rtol=1e-6)
    expected = differences.square().mean(dim=(0, 3, 4))
    np.testing.assert_allclose(forgettability(stats, "official"), expected, rtol=1e-6)


@pytest.mark.parametrize("definition", ["paper", "official"])
def test_order_of_rows_changes_no_bit(definition) -> None:
    stats = random_statistics(40)
    shuffled = [stats[index] for index in np.random.default_rng(1).permutation(40)]
    for function in (task_sensitivity, forgettability):
        assert np.array_equal(function(stats, definition), function(shuffled, definition))


@pytest.mark.parametrize("definition", ["paper", "official"])
def test_sensitivity_of_a_layer_sums_to_one_or_is_zero_without_gradients(definition) -> None:
    stats = [
        replace(
            row,
            grad_sq_causal=row.grad_sq_causal * [[1], [0], [1]],
            grad_sq_square=row.grad_sq_square * [[1], [0], [1]],
        )
        for row in random_statistics(3)
    ]
    found = task_sensitivity(stats, definition)
    np.testing.assert_allclose(found.sum(axis=1), [1, 0, 1], rtol=1e-12)


def test_importance_is_a_product_of_sums_or_a_sum_of_products() -> None:
    first = (np.array([[1.0, 2.0]]), np.array([[3.0, 5.0]]))
    second = (np.array([[7.0, 11.0]]), np.array([[13.0, 17.0]]))
    assert combine([first, second]).tolist() == [[8 * 16, 13 * 22]]
    assert combine([first, second], "sum_of_products").tolist() == [[3 + 91, 10 + 187]]
    assert np.array_equal(combine([first]), combine([first], "sum_of_products"))


def test_broken_numbers_and_unknown_definitions_are_refused() -> None:
    (row,) = random_statistics(1)
    broken = replace(row, diff_sq=row.diff_sq * math.nan)
    with pytest.raises(DataError, match=f"{row.row_id} has a NaN or infinite diff_sq;"):
        forgettability([broken], "paper")
    with pytest.raises(DataError, match="no row was scored"):
        task_sensitivity([], "paper")
    with pytest.raises(ValueError, match="'Paper' is unknown"):
        task_sensitivity([row], "Paper")
    with pytest.raises(ValueError, match="'paper'"):
        combine([(row.diff_sq, row.diff_sq)], "paper")
    with pytest.raises(ValueError, match="at least one task"):
        combine([])
