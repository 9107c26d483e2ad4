"""Meta-training: one AdamW step of phi after the other, each on some items.

Every item is learnt by a theta that starts anew (`seekr.taalm.hypergradient`), so nothing carries over
from item to item but phi. What a step sees is a function of items, seed and step number; with phi and
the optimizer's means saved, a training that goes on ends with the bits of one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seekr.batches import BatchPlan
from seekr.collation import Side
from seekr.errors import ConfigError, DataError
from seekr.taalm.episodes import MetaItem, collate_items
from seekr.taalm.hypergradient import EpisodeFigures, InnerLoop, hypergradient
from seekr.taalm.inner import AdamState, AdamW, Tensors, adamw_step, trained_parameters
from seekr.taalm.network import TrainAttention

STATE, TENSORS = "meta_training.json", "meta_training.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaSettings:
    """What a meta-training computes.

    Attributes:
        inner: How theta learns from an episode.
        optimizer: Of phi.
        epochs: Passes over the items. batch_size: items per step of phi.
        episode_size: Items that one theta learns from in the same inner steps; 1 in the paper. More
            are faster, and ask for weights that serve documents learnt together.
        seed: Of the items' order.
    """

    inner: InnerLoop = field(default_factory=InnerLoop)
    optimizer: AdamW = field(default_factory=AdamW)
    epochs: int = 30
    batch_size: int = 16
    episode_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "episode_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} of meta-training is {getattr(self, name)}; 1 or more is needed: raise it"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaStep:
    """One step of phi. Figures are means over the step's items, before phi moved.

    Attributes:
        step: Counted from 1. gradient_norm: of the mean hypergradient, all parameters together.
        outer_nll, entropy, mean_weight: As of `EpisodeFigures`.
    """

    step: int
    outer_nll: float
    entropy: float
    mean_weight: float
    gradient_norm: float


class MetaTraining:
    """phi while it is trained. theta is read and never changed.

    Args:
        theta: What has `requires_grad` takes the inner steps, from its present values.
        phi: Changed in place; on theta's device.
        items: To learn from, in any order; no two of one document and task.
        pad_id, side: Of the batches.

    Raises:
        DataError: there are no items, or one is there twice.
        ConfigError: nothing is trained of a model, or in a type too coarse.
    """

    def __init__(
        self,
        theta: nn.Module,
        phi: TrainAttention,
        items: Sequence[MetaItem],
        settings: MetaSettings,
        pad_id: int,
        side: Side = "right",
    ) -> None:
        ids = [item.item_id for item in items]
        if not ids or len(set(ids)) < len(ids):
            found = "an item twice" if ids else "no items"
            raise DataError(
                f"meta-training was given {found}; one or more, each once, are needed: check the data"
            )
        trained_parameters(theta)
        self.theta, self.phi, self.settings = theta, phi, settings
        self._items, self._pad_id = tuple(items), pad_id
        self._side: Side = side
        self._plan = BatchPlan(
            row_ids=ids,
            replay_ids=(),
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            batch_ratio=1.0,
            seed=settings.seed,
        )
        self._state = AdamState.zeros(trained_parameters(phi))

    @property
    def steps_done(self) -> int:
        """Steps that phi has taken."""
        return self._state.step

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self._plan.num_steps

    def step(self) -> MetaStep:
        """Take the next step.

        Raises:
            IndexError: all steps are done.
            DataError: the hypergradient is not finite. phi is as before.
        """
        chosen = [self._items[i] for i in self._plan.step(self.steps_done).task]
        grads, figures = self._gradient(chosen)
        norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads.values()])))
        if not math.isfinite(norm):
            raise DataError(
                f"the hypergradient of step {self.steps_done + 1} is {norm}, on the items "
                f"{', '.join(item.item_id for item in chosen)}; a finite one is needed: raise the "
                "inner optimizer's damping, or lower its learning rate"
            )
        self._move(grads)
        return MetaStep(step=self.steps_done, gradient_norm=norm, **figures)

    def run(
        self, until: int | None = None, report: Callable[[MetaStep], None] | None = None
    ) -> None:
        """Take steps until `until` are done, by default all; `report` is called after each."""
        last = self.num_steps if until is None else min(until, self.num_steps)
        while self.steps_done < last:
            figures = self.step()
            if report is not None:
                report(figures)

    def _gradient(self, chosen: Sequence[MetaItem]) -> tuple[Tensors, dict[str, float]]:
        """Return the mean over items of hypergradients and figures."""
        sums = {n: torch.zeros_like(p) for n, p in trained_parameters(self.phi).items()}
        device = next(iter(sums.values())).device
        means = {f.name: 0.0 for f in fields(EpisodeFigures)}
        size = self.settings.episode_size
        for start in range(0, len(chosen), size):
            episode = collate_items(chosen[start : start + size], self._pad_id, self._side)
            episode = episode.to(device)
            grads, figures = hypergradient(self.theta, self.phi, episode, self.settings.inner)
            share = len(episode) / len(chosen)
            for name, total in sums.items():
                total.add_(grads[name], alpha=share)
            means = {n: mean + share * getattr(figures, n) for n, mean in means.items()}
        return sums, means

    @torch.no_grad()
    def _move(self, grads: Tensors) -> None:
        own = trained_parameters(self.phi)
        new, self._state = adamw_step(own, grads, self._state, self.settings.optimizer)
        for name, p in own.items():
            p.copy_(new[name])

    def save(self, folder: str | Path) -> None:
        """Write where the training stands: trained tensors of phi, the optimizer's, the step.

        Frozen weights are not in it: to go on, phi and theta are made as they were and `load` is
        called. `TrainAttention.save` writes a whole phi.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.cpu().contiguous() for n, t in self._tensors(self._state).items()}
        save_file(tensors, folder / TENSORS)
        values = {"step": self.steps_done} | self._identity()
        (folder / STATE).write_text(json.dumps(values, indent=1))

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            ConfigError: no such state, or that of a training with other settings, items or trained
                tensors.
        """
        folder = Path(folder)
        if not (folder / STATE).is_file():
            raise ConfigError(
                f"folder {str(folder)!r} has no {STATE}; the state of a meta-training is needed: "
                "give the folder that MetaTraining.save wrote, or begin anew"
            )
        values = json.loads((folder / STATE).read_text())
        own = self._identity()
        odd = [name for name, value in own.items() if values.get(name) != value]
        if odd:
            raise ConfigError(
                f"the meta-training in {folder} has other {odd[0]}: {values.get(odd[0])} there, "
                f"{own[odd[0]]} here; they have to be equal to go on: restore them, or begin anew"
            )
        saved = load_file(folder / TENSORS)
        state = AdamState.zeros(trained_parameters(self.phi))
        state = AdamState(step=int(values["step"]), mean=state.mean, square=state.square)
        tensors = self._tensors(state)
        shapes, own_shapes = ({(n, *t.shape) for n, t in some.items()} for some in (saved, tensors))
        if shapes != own_shapes:
            name = min(shapes ^ own_shapes)[0]
            raise ConfigError(
                f"the meta-training in {folder} trains other tensors, the first is {name!r}; phi has "
                "to be made as it was: check its model and adapters"
            )
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        self._state = state

    def _tensors(self, state: AdamState) -> dict[str, Tensor]:
        kinds = {"phi": trained_parameters(self.phi), "mean": state.mean, "square": state.square}
        return {f"{kind}.{n}": t for kind, tensors in kinds.items() for n, t in tensors.items()}

    def _identity(self) -> dict[str, object]:
        """Return what has to be equal for a training to go on, as JSON values."""
        digest = hashlib.sha256(json.dumps(self._plan.row_ids).encode()).hexdigest()
        return {"settings": asdict(self.settings), "items": digest, "side": self._side}
