"""Decisions about the champion, the model of a stream that users serve: who it is, since when, and why.

Every decision is an entry of an append-only journal in the store: of the gate, which promotes the newest
model or holds it back with every figure it looked at, and by hand, with a reason. The champion follows
from them alone. MLflow's alias is a view, written again from here.

Promotions pile up; a rollback takes models off the pile until a former champion is on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipelines.artifact import StageRef
from pipelines.journal import Journal
from pipelines.lease import Lease
from pipelines.provenance import now_iso, user_name
from pipelines.store import Store
from seekr.errors import ConfigError, StoreError

Kind = Literal["gate", "promote", "rollback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One bound, looked at.

    Attributes:
        bound: its field of the gate.
        of: the task it is about, or the harness's; empty if it is about all.
        figure: what was compared, None if there is none.
        limit: the bound.
        holds: None where it was not applied.
        why: the figure's parts in words, or why it was not applied.
    """

    bound: str
    of: str = ""
    figure: float | None
    limit: float
    holds: bool | None
    why: str

    def __str__(self) -> str:
        verdict = {True: "holds", False: "FAILS", None: "not applied"}[self.holds]
        about = f"{self.bound} of {self.of}" if self.of else self.bound
        figure = "" if self.figure is None else f"{self.figure:.4f} against {self.limit:g}, "
        return f"{about}: {verdict} ({figure}{self.why})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a model scored on a task, and by what: two scores compare if `measure` is the same."""

    score: float
    measure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One entry.

    Attributes:
        number: from 1; 0 before it is entered.
        model: what it is about: the model that was judged, promoted or gone back to.
        champion: who is the champion from now on; None if nobody has been.
        previous: who was before.
        reason: one sentence.
        checks: every bound of the gate; empty for a decision by hand.
        scores: of the model, by task, as they were.
        gate: the gate's settings.
        at, user: when and by whom; ISO 8601, UTC.
    """

    number: int = 0
    kind: Kind
    model: StageRef
    champion: StageRef | None
    previous: StageRef | None
    reason: str
    checks: tuple[Check, ...] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)
    gate: Mapping[str, Any] | None = None
    at: str = field(default_factory=now_iso)
    user: str = field(default_factory=user_name)

    @property
    def held_back(self) -> bool:
        """Whether the gate has kept the model from becoming the champion."""
        return self.kind == "gate" and self.champion != self.model

    @property
    def verdict(self) -> str:
        """In two words."""
        if self.kind == "rollback":
            return "rolled back"
        return "held back" if self.held_back else "promoted"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Decision:
        """The inverse of `to_json`."""
        refs = {name: _ref(value[name]) for name in ("champion", "previous")}
        return cls(
            **{
                **value,
                **refs,
                "model": StageRef(**value["model"]),
                "checks": tuple(Check(**check) for check in value["checks"]),
                "scores": {task: Score(**score) for task, score in value["scores"].items()},
            }
        )


@dataclass(frozen=True, slots=True)
class Decisions:
    """A stream's decisions, oldest first, and what follows from them."""

    entries: tuple[Decision, ...] = ()

    @property
    def champions(self) -> tuple[StageRef, ...]:
        """The pile: the champion last, below it those that a rollback leads back to."""
        pile: list[StageRef] = []
        for entry in self.entries:
            if entry.kind == "rollback" and entry.champion in pile:
                del pile[pile.index(entry.champion) + 1 :]
            elif entry.champion is not None and entry.champion != entry.previous:
                pile = [ref for ref in pile if ref != entry.champion] + [entry.champion]
        return tuple(pile)

    @property
    def champion(self) -> StageRef | None:
        """What users serve; None as long as nothing was promoted."""
        return self.entries[-1].champion if self.entries else None

    @property
    def since(self) -> Decision | None:
        """The decision that made the champion the champion."""
        changes = [e for e in self.entries if e.champion is not None and e.champion != e.previous]
        return changes[-1] if changes else None

    def about(self, model: StageRef) -> tuple[Decision, ...]:
        """Return the decisions about a model: that judged it, promoted it, or replaced it by hand."""
        return tuple(e for e in self.entries if model in (e.model, e.champion, e.previous))

    def scores_of(self, model: StageRef) -> Mapping[str, Score]:
        """Return a model's scores as they were last recorded; empty if they never were."""
        found = [e.scores for e in self.entries if e.model == model and e.scores]
        return found[-1] if found else {}

    def has_judged(self, model: StageRef, gate: Mapping[str, Any]) -> bool:
        """Return whether the gate has nothing more to say of a model: it was judged by these bounds, it is
        the champion, or somebody has gone back from it, which the gate does not undo."""
        return model == self.champion or any(
            (e.kind == "gate" and e.model == model and e.gate == gate)
            or (e.kind == "rollback" and e.previous == model)
            for e in self.entries
        )


class DecisionLog:
    """Where a stream's decisions lie.

    Args:
        store: the stream's.
        stream: its name.
    """

    def __init__(self, store: Store, stream: str) -> None:
        self.store = store
        self.folder = f"streams/{stream}/decisions"
        self._journal = Journal(store, self.folder)

    def read(self) -> Decisions:
        """Return all of them.

        Raises:
            StoreError: one cannot be read.
        """
        found = enumerate(self._journal.read(), 1)
        return Decisions(tuple(self._entry(number, value) for number, value in found))

    def add(self, decision: Decision, seen: Decisions, lease: Lease) -> Decision:
        """Enter a decision that was made knowing those seen; returns it with its number.

        Args:
            lease: of `folder`, held by the caller.

        Raises:
            LeaseLost: somebody else has decided meanwhile.
        """
        value = {key: item for key, item in decision.to_json().items() if key != "number"}
        self._journal.append(value, after=len(seen.entries), lease=lease)
        return self._entry(len(seen.entries) + 1, value)

    def _entry(self, number: int, value: Mapping[str, Any]) -> Decision:
        try:
            return Decision.from_json({**value, "number": number})
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{self.store.uri_for(self.folder)}: entry {number} is no decision ({error!r}); another "
                "version of seekr?"
            ) from None


def resolve(champions: tuple[StageRef, ...], named: str | None) -> StageRef:
    """Return the former champion that a rollback goes to: the one named, else the one before the last.

    Args:
        champions: the pile, the present one last.
        named: a task, or the beginning of a fingerprint.

    Raises:
        ConfigError: there is none, or `named` is not one of them.
    """
    former = champions[:-1]
    if not former:
        raise ConfigError(
            "there is no former champion to go back to; promote a model by hand: seekr promote"
        )
    if named is None:
        return former[-1]
    found = [ref for ref in former if ref.task == named or ref.fingerprint.startswith(named)]
    if not found:
        listed = ", ".join(f"{ref.task} {ref.fingerprint[:12]}" for ref in reversed(former))
        raise ConfigError(
            f"{named!r} is no former champion; there are {listed}: choose one, or promote another model "
            "by hand: seekr promote"
        )
    return found[-1]


def _ref(value: Mapping[str, str] | None) -> StageRef | None:
    return None if value is None else StageRef(**value)
