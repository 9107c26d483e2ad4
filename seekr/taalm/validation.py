"""What phi is good for: theta learns held-out documents with its weights, and is asked what they say.

Unlike in meta-training one theta learns all documents, over some epochs, as it will when phi is used.
It works on values of its parameters; the model itself stays as it is.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from seekr.attention import evaluation_mode
from seekr.batches import BatchPlan
from seekr.collation import Batch, Side
from seekr.errors import ConfigError
from seekr.taalm.episodes import Episode, MetaItem, collate_items
from seekr.taalm.inner import (
    AdamState,
    AdamW,
    Tensors,
    logits_with,
    trained_parameters,
    weighted_step,
)
from seekr.taalm.network import TrainAttention
from seekr.taalm.weighted import counted, object_nll, token_nll


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSettings:
    """How theta learns the held-out documents.

    Attributes:
        optimizer: Plain AdamW, as continual training has it.
        batch_size: Documents per step. seed: of their order.
    """

    optimizer: AdamW = field(default_factory=AdamW)
    epochs: int = 4
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1:
            raise ConfigError(
                f"validation has epochs {self.epochs} and batch_size {self.batch_size}; 0 or more, "
                "and 1 or more, are allowed: change them"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Means over tasks: NLL of object tokens in nats, and the share of them that is the argmax.

    Both are teacher-forced. Before learning, and after.
    """

    nll_before: float
    accuracy_before: float
    nll: float
    accuracy: float


def validate(
    theta: nn.Module,
    phi: TrainAttention | None,
    items: Sequence[MetaItem],
    settings: ValidationSettings,
    pad_id: int,
    side: Side = "right",
) -> Validation:
    """Train theta on the items' documents and score it on their tasks; theta stays as it is.

    Args:
        phi: Weighs the tokens; None weighs all alike, which is what to compare with.
        items: At least one, not seen in meta-training.

    Raises:
        ConfigError: there are no items, or nothing of theta is trained.
    """
    params = trained_parameters(theta)
    device = next(iter(params.values())).device
    plan = BatchPlan(
        row_ids=[item.item_id for item in items],
        replay_ids=(),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        batch_ratio=1.0,
        seed=settings.seed,
    )
    size = settings.batch_size
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    episodes = [collate_items(part, pad_id, side).to(device) for part in parts]
    with evaluation_mode(theta):
        nll_before, accuracy_before = _scores(theta, params, episodes)
        state = AdamState.zeros(params)
        for index in range(plan.num_steps):
            chosen = [items[i] for i in plan.step(index).task]
            documents = collate_items(chosen, pad_id, side).to(device).documents
            params, state = weighted_step(
                theta,
                params,
                state,
                documents,
                document_weights(phi, documents),
                settings.optimizer,
            )
        nll, accuracy = _scores(theta, params, episodes)
    return Validation(
        nll_before=nll_before, accuracy_before=accuracy_before, nll=nll, accuracy=accuracy
    )


@torch.no_grad()
def document_weights(phi: TrainAttention | None, documents: Batch) -> Tensor:
    """Return the weights [B,T] that documents are learnt with: phi's, or 1 for all labels."""
    if phi is None:
        return counted(documents.labels_BT).float()
    with evaluation_mode(phi):
        return phi(documents)


@torch.no_grad()
def _scores(theta: nn.Module, params: Tensors, episodes: Sequence[Episode]) -> tuple[float, float]:
    """Return the means over tasks of object NLL and object accuracy."""
    nll, accuracy, count = 0.0, 0.0, sum(len(episode) for episode in episodes)
    for episode in episodes:
        labels_BT = episode.tasks.labels_BT
        logits_BTV = logits_with(theta, params, episode.tasks)
        nll += len(episode) * float(object_nll(token_nll(logits_BTV, labels_BT), labels_BT))
        wrong_BT = torch.ones_like(labels_BT, dtype=torch.float32)
        wrong_BT[:, 1:] = (logits_BTV[:, :-1].argmax(dim=-1) != labels_BT[:, 1:]).float()
        accuracy += len(episode) * (1.0 - float(object_nll(wrong_BT, labels_BT)))
    return nll / count, accuracy / count
