"""What a stream's trainings did to facts it asks about: curves over epochs, and the figures read off.

Probes are scored before the first training and after every epoch of every training, so the epochs of all
tasks stand one after the other; 0 is the base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.results import StreamView
from seekr.knowledge import KnowledgeCurves, constant_floor


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeCurve:
    """One set of probes.

    Attributes:
        role: As in the stream: to_learn, not_to_forget or watched.
        accuracy, nll: Means over probes per epoch from 0: token accuracy, and NLL per answer token, nats.
        floor: Token accuracy of the best constant answer.
        rows: How many probes.
    """

    name: str
    role: str
    accuracy: tuple[float, ...]
    nll: tuple[float, ...]
    floor: float
    rows: int


def probe_curves(view: StreamView) -> list[ProbeCurve]:
    """Return the curves of all sets that were scored, in the stream's order."""
    # With it comes Ray, which most streams' reports do without.
    from pipelines.probe import load_probes

    roles = {item["name"]: item["role"] for item in view.config.get("probes", ())}
    steps = [step for history in view.histories() for step in history.steps]
    found: list[ProbeCurve] = []
    for result in view.of("probe"):
        curves = {kind: _curve(steps, f"{result.task}.{kind}") for kind in ("accuracy", "nll")}
        if not curves["accuracy"]:
            continue
        answers = [probe.answer_ids.tolist() for probe in load_probes(result.artifact)]
        found.append(
            ProbeCurve(
                name=result.task,
                role=roles.get(result.task, "watched"),
                accuracy=curves["accuracy"],
                nll=curves["nll"],
                floor=constant_floor(answers).accuracy,
                rows=len(answers),
            )
        )
    return found


def knowledge_of(curves: list[ProbeCurve]) -> KnowledgeCurves | None:
    """Return the pair of curves that LAMA-ckl's figures are read off; None without both roles."""
    by_role = {curve.role: curve for curve in curves}
    if not {"to_learn", "not_to_forget"} <= by_role.keys():
        return None
    return KnowledgeCurves(
        to_learn=by_role["to_learn"].accuracy, not_to_forget=by_role["not_to_forget"].accuracy
    )


def knowledge_figures(view: StreamView) -> dict[str, Any] | None:
    """Return LAMA-ckl's figures of a stream, with those of the last epoch and the constant's floor."""
    curves = probe_curves(view)
    found = knowledge_of(curves)
    if found is None:
        return None
    floor = next(curve.floor for curve in curves if curve.role == "to_learn")
    return {
        "top_accuracy": found.top_accuracy,
        "epoch": found.epoch,
        "nf_accuracy": found.kept_at_top,
        "total_knowledge": found.total_knowledge,
        "final_accuracy": found.final_accuracy,
        "final_nf_accuracy": found.final_kept,
        "final_total": found.final_total,
        "constant_floor": floor,
        "to_learn": list(found.to_learn),
        "not_to_forget": list(found.not_to_forget),
    }


def _curve(steps: list[Any], name: str) -> tuple[float, ...]:
    """Return the value before the first step, then after every epoch."""
    before = [step[f"probes_before.{name}"] for step in steps if f"probes_before.{name}" in step]
    after = [step[f"probes.{name}"] for step in steps if f"probes.{name}" in step]
    return (before[0], *after) if before else ()
