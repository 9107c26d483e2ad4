"""What meta-training learns from: documents, and for each a task that the document helps with.

An item is one document and one task, a text in which some tokens are the object: what one should know
after reading. An episode is some items at once, as two batches: documents to learn from, and tasks
whose labels are their object tokens alone.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from seekr.collation import IGNORE_LABEL, Batch, Side, collate
from seekr.errors import DataError
from seekr.prompts import TokenizedRow


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MetaItem:
    """One document and one task on what it says.

    Attributes:
        document: Its labels are what may be learnt; a prompt of one token makes that all.
        task: The whole text, read with the answer in place.
        object_mask_T: One boolean per token of the task: is it part of the object.

    Raises:
        DataError: the mask has another length or marks nothing that is predicted, or the document
            has no labels.
    """

    document: TokenizedRow
    task: TokenizedRow
    object_mask_T: NDArray[np.bool_]

    def __post_init__(self) -> None:
        length = len(self.task.input_ids)
        if self.object_mask_T.shape != (length,):
            raise DataError(
                f"task {self.task.row_id} has {length} tokens and an object mask of shape "
                f"{self.object_mask_T.shape}; one entry per token is needed: mark its object anew"
            )
        if not self.object_mask_T[1:].any():
            raise DataError(
                f"task {self.task.row_id} has no object token behind its first token; one or more "
                "is needed, or nothing would be learnt: mark the object, or drop the item"
            )
        if len(self.document.input_ids) <= max(1, self.document.prompt_length):
            raise DataError(
                f"document {self.document.row_id} has {len(self.document.input_ids)} tokens, "
                f"{self.document.prompt_length} of them prompt; one label or more is needed: drop it"
            )

    @property
    def item_id(self) -> str:
        """Identity by the identities of its rows."""
        return f"{self.document.row_id}/{self.task.row_id}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Episode:
    """Items as batches: row b of `tasks` is the task of row b of `documents`.

    Labels of `tasks` are object tokens alone.
    """

    documents: Batch
    tasks: Batch

    def __len__(self) -> int:
        return len(self.documents)

    def to(self, device: torch.device | str) -> Episode:
        """Return the episode with its tensors on `device`."""
        return Episode(documents=self.documents.to(device), tasks=self.tasks.to(device))


def collate_items(items: Sequence[MetaItem], pad_id: int, side: Side = "right") -> Episode:
    """Pad documents and tasks, each to their longest."""
    documents = collate([item.document for item in items], pad_id, side)
    tasks = collate([item.task for item in items], pad_id, side)
    labels_BT = torch.full_like(tasks.labels_BT, IGNORE_LABEL)
    for index, item in enumerate(items):
        start = int(tasks.start_B[index])
        position_A = torch.from_numpy(item.object_mask_T.nonzero()[0]) + start
        labels_BT[index, position_A] = tasks.input_ids_BT[index, position_A]
    return Episode(documents=documents, tasks=replace(tasks, labels_BT=labels_BT))
