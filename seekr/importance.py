"""How important each attention head is: task sensitivity and forgettability.

`score_batch` is the only part that runs models. It turns each replay row into a few [L,H] sums of
squares that belong to that row alone, so rows may be scored anywhere, in any batch and order. The
rest are pure float64 functions of those sums, following equations (7) to (10) ("paper") or the
official code ("official").

Shape suffixes: B batch, L layers, H heads, Q query rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from seekr.attention import evaluation_mode, probing
from seekr.collation import IGNORE_LABEL, Batch
from seekr.errors import DataError
from seekr.forward import batch_logits
from seekr.losses import answer_nll, answer_positions
from seekr.score_probes import DifferenceProbe, GradientProbe

Definition = Literal["paper", "official"]
Rule = Literal["product_of_sums", "sum_of_products"]
HeadArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadStatistics:
    """Sums of squares over one row's attention maps, each [L,H] float64.

    Attributes:
        row_id: The row.
        length: Real tokens of the row.
        num_queries: Sampled query rows of the row, at most B_T.
        grad_sq_causal: (dL/dA_ij)^2 over the pairs that the model's mask allows.
        grad_sq_square: The same over all length x length pairs of real tokens.
        diff_sq: (A_after - A_before)^2 over all query rows.
        diff_sq_queries: The same over the sampled query rows.
    """

    row_id: str
    length: int
    num_queries: int
    grad_sq_causal: HeadArray
    grad_sq_square: HeadArray
    diff_sq: HeadArray
    diff_sq_queries: HeadArray


def score_batch(
    before: nn.Module, after: nn.Module, batch: Batch, positions_BQ: Tensor
) -> list[HeadStatistics]:
    """Measure one batch of replay rows on the models before and after a task.

    L is a row's mean answer NLL under the model after the task. Only gradients of activations are
    taken: both models keep their parameters' `.grad`, `requires_grad` and train/eval modes.

    Args:
        before: Model before the task, loaded with attn_implementation="seekr", like `after`.
        after: Model after the task.
        batch: Rows on the models' device, padded on either side.
        positions_BQ: Padded positions of the sampled query rows, -1 where there are fewer.

    Returns:
        One entry per row, in batch order.

    Raises:
        DataError: a row has no answer token.
        UnsupportedModel: an attention mask is not one run of keys per query.
        ValueError: the batch is packed.
    """
    batch.check_one_row_each()
    real_BT = batch.attention_mask_BT.bool()
    gradient = GradientProbe(real_BT)
    with _frozen(after), probing(after, gradient), torch.enable_grad():
        # The graph begins at the first layer's attention; nothing below it is differentiated.
        torch.autograd.grad(_summed_loss(after, batch), gradient.earliest)
    difference = DifferenceProbe(gradient.captured, real_BT, positions_BQ)
    with _frozen(before), probing(before, difference), torch.no_grad():
        batch_logits(before, batch, torch.zeros(1, dtype=torch.long, device=real_BT.device))
    sums = {
        "grad_sq_causal": gradient.causal_BLH,
        "grad_sq_square": gradient.square_BLH,
        "diff_sq": difference.all_BLH,
        "diff_sq_queries": difference.chosen_BLH,
    }
    arrays = {name: value.cpu().numpy() for name, value in sums.items()}
    lengths, counts = real_BT.sum(dim=1).tolist(), (positions_BQ >= 0).sum(dim=1).tolist()
    return [
        HeadStatistics(
            row_id=row_id,
            length=lengths[index],
            num_queries=counts[index],
            **{name: array[index] for name, array in arrays.items()},
        )
        for index, row_id in enumerate(batch.row_ids)
    ]


def _summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the sum of L over rows. Rows do not see each other, so its gradient is each row's."""
    row_A, position_A = answer_positions(batch.labels_BT)
    count_B = torch.bincount(row_A, minlength=len(batch))
    if (count_B == 0).any():
        row_id = batch.row_ids[int((count_B == 0).nonzero()[0])]
        raise DataError(
            f"row {row_id} has no answer token, so no loss to take gradients of; at least 1 is "
            "needed: give the row an answer or drop it"
        )
    kept_T = position_A.unique()
    # `answer_nll` reads the label one place on, so labels move up by one with the logits.
    labels_BT = functional.pad(batch.labels_BT[:, kept_T + 1], (1, 0), value=IGNORE_LABEL)
    nll_B, _ = answer_nll(batch_logits(model, batch, kept_T), labels_BT)
    return (nll_B / count_B).sum()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluate without parameter gradients; flags and modes are as found afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for parameter, flag in flags:
            stack.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        yield


def task_sensitivity(stats: Sequence[HeadStatistics], definition: Definition) -> HeadArray:
    """S~ of one task, [L,H]; a layer's heads sum to 1 (to 0 where no head has any gradient).

    Args:
        stats: Of the task's replay rows, in any order.
        definition: "paper" is equation (7): the mean over rows of ||dL/dA||_F, over the map's area.
            "official" is the mean of squared gradients over the square padded to the longest row of
            the whole replay set. Unlike the official code, padded keys add nothing to it, so
            neither batch nor padding changes the result. The official code probes one row at a time
            as well.
    """
    _check(stats)
    if definition == "paper":
        raw = _mean([np.sqrt(row.grad_sq_causal) for row in stats])
    elif definition == "official":
        longest = max(row.length for row in stats)
        raw = _mean([row.grad_sq_square / longest**2 for row in stats])
    else:
        raise ValueError(f"task sensitivity {definition!r} is unknown; use 'paper' or 'official'")
    per_layer = raw.sum(axis=1, keepdims=True)
    return np.divide(raw, per_layer, out=np.zeros_like(raw), where=per_layer > 0)


def forgettability(stats: Sequence[HeadStatistics], definition: Definition) -> HeadArray:
    """F of one task, [L,H].

    Args:
        stats: Of the task's replay rows, in any order.
        definition: "paper" is the summand of equation (9): the mean over rows of
            ||A_after - A_before||_F over all query rows. "official" is the mean squared difference
            over sampled query rows x longest row of the replay set, so it depends on the row
            lengths.
    """
    _check(stats)
    if definition == "paper":
        return _mean([np.sqrt(row.diff_sq) for row in stats])
    if definition == "official":
        longest, queries = max(row.length for row in stats), sum(row.num_queries for row in stats)
        return _mean([row.diff_sq_queries for row in stats]) * len(stats) / (queries * longest)
    raise ValueError(f"forgettability {definition!r} is unknown; use 'paper' or 'official'")


def combine(
    per_task: Sequence[tuple[HeadArray, HeadArray]], rule: Rule = "product_of_sums"
) -> HeadArray:
    """Importance [L,H] from (sensitivity, forgettability) of each task learnt so far.

    Args:
        rule: "product_of_sums" is equation (10) with (8) and (9); "sum_of_products" the official
            code.
    """
    if not per_task:
        raise ValueError("importance needs at least one task's (sensitivity, forgettability)")
    if rule == "product_of_sums":
        return _sum([task[0] for task in per_task]) * _sum([task[1] for task in per_task])
    if rule == "sum_of_products":
        return _sum([sensitivity * forgot for sensitivity, forgot in per_task])
    raise ValueError(
        f"importance rule {rule!r} is unknown; use 'product_of_sums' or 'sum_of_products'"
    )


def _check(stats: Sequence[HeadStatistics]) -> None:
    """Refuse an empty task and broken numbers."""
    if not stats:
        raise DataError("no row was scored; at least 1 is needed: check the replay set")
    for row in stats:
        for name in ("grad_sq_causal", "grad_sq_square", "diff_sq", "diff_sq_queries"):
            if not np.isfinite(getattr(row, name)).all():
                raise DataError(
                    f"row {row.row_id} has a NaN or infinite {name}; finite numbers are needed: "
                    "look for a diverged model, or score in bfloat16 or float32 instead of float16"
                )


def _mean(arrays: Sequence[HeadArray]) -> HeadArray:
    return _sum(arrays) / len(arrays)


def _sum(arrays: Sequence[HeadArray]) -> HeadArray:
    """Exactly rounded sum, entry by entry, so that it does not depend on who scored first."""
    stacked = np.stack(arrays)
    flat = stacked.reshape(len(arrays), -1).T.tolist()
    return np.array([math.fsum(entry) for entry in flat]).reshape(stacked.shape[1:])
