"""Rows as a batch: what padding hides, and where packed rows lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from seekr.collation import collate, collate_packed, collate_prompts
from seekr.importance import score_batch
from seekr.teacher import teach_batch
from tests.seekr import tiny

ROWS = [
    replace(row, prompt_length=prompt)
    for row, prompt in zip(tiny.rows((5, 3, 7)), (3, 1, 6), strict=True)
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_padding_masks_and_labels_as_a_slow_loop_does(side: Any, multiple_of: int) -> None:
    batch = collate(ROWS, 0, side=side, multiple_of=multiple_of)
    width = batch.input_ids_BT.shape[1]
    assert width == -(-7 // multiple_of) * multiple_of
    for index, row in enumerate(ROWS):
        ids = row.input_ids.tolist()
        labels = [-100] * row.prompt_length + ids[row.prompt_length :]
        fill = width - len(ids)
        before, after = (fill, 0) if side == "left" else (0, fill)
        assert batch.input_ids_BT[index].tolist() == [0] * before + ids + [0] * after
        assert batch.labels_BT[index].tolist() == [-100] * before + labels + [-100] * after
        mask = [0] * before + [1] * len(ids) + [0] * after
        assert batch.attention_mask_BT[index].tolist() == mask
        assert batch.start_B[index] == before and batch.lengths_B[index] == len(ids)
    assert batch.input_ids_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert batch.row_ids == tuple(row.row_id for row in ROWS) and len(batch) == 3


def test_collated_prompts_hold_no_answer() -> None:
    batch = collate_prompts(ROWS[:2], 0).to("cpu")
    first, second = (row.input_ids.tolist() for row in ROWS[:2])
    assert batch.input_ids_BT.tolist() == [first[:3], [0, 0, second[0]]]
    assert batch.labels_BT.eq(-100).all()
    assert batch.start_B.tolist() == [0, 2] and batch.lengths_B.tolist() == [3, 1]


@pytest.mark.parametrize("collator", [lambda rows: collate(rows, 0), collate_packed])
def test_collating_nothing_is_an_error(collator: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        collator([])


def test_packed_rows_follow_each_other_and_each_counts_from_zero() -> None:
    batch = collate_packed(ROWS).to("cpu")
    ids = [row.input_ids.tolist() for row in ROWS]
    assert batch.input_ids_BT.tolist() == [ids[0] + ids[1] + ids[2]]
    assert batch.position_ids_BT is not None
    assert batch.position_ids_BT.tolist() == [[*range(5), *range(3), *range(7)]]
    labels = [
        [-100] * row.prompt_length + row.input_ids[row.prompt_length :].tolist() for row in ROWS
    ]
    assert batch.labels_BT.tolist() == [labels[0] + labels[1] + labels[2]]
    assert batch.attention_mask_BT.tolist() == [[1] * 15]
    assert batch.start_B.tolist() == [0, 5, 8] and batch.lengths_B.tolist() == [5, 3, 7]
    assert batch.row_ids == tuple(row.row_id for row in ROWS) and len(batch) == 3
    tensors = (batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT, batch.start_B)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_a_packed_rows_first_token_is_never_a_label() -> None:
    rows = [ROWS[0], replace(ROWS[1], prompt_length=0)]
    labels = collate_packed(rows).labels_BT[0].tolist()
    assert labels[5] == -100 and labels[6:] == rows[1].input_ids[1:].tolist()


def test_a_model_is_given_the_mask_of_padded_rows_and_the_positions_of_packed_ones() -> None:
    padded, packed = collate(ROWS, 0), collate_packed(ROWS)
    assert padded.inputs().keys() == {"input_ids", "attention_mask"}
    assert padded.inputs()["attention_mask"] is padded.attention_mask_BT
    assert packed.inputs().keys() == {"input_ids", "position_ids"}
    assert packed.inputs()["position_ids"] is packed.position_ids_BT


def test_targets_and_scores_refuse_packed_rows() -> None:
    model, batch = tiny.build("llama2-gqa"), collate_packed(ROWS)
    with pytest.raises(ValueError, match="3 packed rows"):
        teach_batch(model, batch, {0: (1,)}, [np.array([1])] * 3, logits=True)
    with pytest.raises(ValueError, match="use collate"):
        score_batch(model, model, batch, torch.zeros(3, 1, dtype=torch.int64))
