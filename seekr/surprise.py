"""How little a model expects a row's answer: the mean negative log-likelihood of its tokens.

Rows are ranked by it for the replay set (SuRe, arXiv 2511.22367). The mean, and not the sum, so that long
answers are not kept for their length alone. Rows go one at a time: beside others a row's number would
change by rounding, and with it, now and then, which rows are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from seekr.addition import seeing
from seekr.attention import evaluation_mode
from seekr.collation import collate
from seekr.forward import batch_logits
from seekr.losses import answer_nll
from seekr.prompts import TokenizedRow


def surprise(model: nn.Module, rows: Sequence[TokenizedRow]) -> list[float]:
    """Return the mean NLL per answer token of each row, in nats.

    Args:
        model: Any causal LM.
    """
    device = next(model.parameters()).device
    found: list[float] = []
    with evaluation_mode(model), torch.no_grad():
        for row in rows:
            batch = collate([row], pad_id=0).to(device)
            with seeing(model, batch):
                nll_B, count_B = answer_nll(batch_logits(model, batch), batch.labels_BT)
            found.append(float(nll_B) / int(count_B))
    return found
