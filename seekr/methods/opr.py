"""OPR, on-policy replay: old prompts are replayed with the newest model's own answers.

Before a task is learnt the model that will learn it answers the stored prompts of earlier tasks; what
the task's metric accepts is trained on as if it were gold (arXiv 2605.29495, where the rest is dropped:
`replay.rejected: drop`; gold answers stand in for it otherwise). No loss is added and no teacher is
kept. The same rows are there for every method with replay: `replay.answers: on_policy`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from seekr.methods.contract import Needs
from seekr.methods.replay import Replay


class OPR(Replay):
    """L = L_task + replay_weight * L_replay on the model's own accepted answers."""

    needs: ClassVar[Needs] = Needs(replay=True, on_policy=True)

    name: Literal["opr"] = "opr"  # pyright: ignore[reportIncompatibleVariableOverride]
