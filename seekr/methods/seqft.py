"""Sequential fine-tuning: learn each task, keep nothing. The floor every method is measured from."""

from __future__ import annotations

from typing import Literal

from seekr.methods.contract import Method


class SeqFT(Method):
    """Plain fine-tuning, task after task."""

    name: Literal["seqft"] = "seqft"
