"""From configurations and seeds to streams: a base model is taught first, then each learns new facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.planted_facts.data import planted_facts, write
from benchmarks.planted_facts.model import write_model
from pipelines.artifact import Artifact
from pipelines.pool import MODEL_FOLDER
from pipelines.stage import find
from pipelines.stream import Stream, open_stream

HERE = Path(__file__).parent
# Accuracies on the facts to learn at which methods are compared.
LEVELS = (0.3, 0.4, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One configuration with one seed, which draws facts, model, row order."""

    configuration: str
    seed: int
    stream: Stream


def write_lessons(out: Path, seeds: Sequence[int]) -> list[Stream]:
    """Write data and a random model per seed, and open the streams that teach what is not to be forgotten."""
    found: list[Stream] = []
    for seed in seeds:
        model = out / "models" / f"seed-{seed}"
        if not model.is_dir():
            write(_data(out, seed), planted_facts(seed=seed))
            write_model(model, seed=seed)
        values = _read("lessons.yaml") | {"model": {"path": str(model.absolute())}}
        found.append(_open(out, f"lessons-seed-{seed}", seed, values))
    return found


def taught_model(stream: Stream) -> Path:
    """Return the folder of the model that a finished stream of lessons has left."""
    stage = next(stage for stage in stream.stages if stage.name == "train")
    record = find(stream.store, stage)
    assert record is not None
    return Artifact(store=stream.store, record=record).local(MODEL_FOLDER)


def write_streams(
    out: Path, configurations: Mapping[str, Any], taught: Mapping[int, Path]
) -> list[Run]:
    """Open a stream per seed and configuration, each from its seed's taught model."""
    found: list[Run] = []
    for seed, model in taught.items():
        for name, changes in configurations.items():
            values = _read("stream.yaml") | changes | {"model": {"path": str(model.absolute())}}
            weights = values.get("token_weights")
            if weights is not None and weights["by"] == "train_attention":
                values["token_weights"] = weights | {"meta": _read("meta.yaml")}
            stream = _open(out, f"{name}-seed-{seed}", seed, values)
            found.append(Run(configuration=name, seed=seed, stream=stream))
    return found


def row_of(
    run: Run, figures: Mapping[str, Any], steps_per_epoch: int, seconds: float
) -> dict[str, Any]:
    """Return a run's figures; for each level the steps until it is reached, and what is still known."""
    to_learn, kept = figures["to_learn"], figures["not_to_forget"]
    reached: dict[str, Any] = {}
    for level in LEVELS:
        epoch = next((e for e, value in enumerate(to_learn) if value >= level), None)
        reached[str(level)] = {
            "steps": None if epoch is None else epoch * steps_per_epoch,
            "not_to_forget": None if epoch is None else kept[epoch],
        }
    own = {"configuration": run.configuration, "seed": run.seed, "seconds": round(seconds, 1)}
    return own | dict(figures) | {"reached": reached}


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def _data(out: Path, seed: int) -> Path:
    return out / "data" / f"seed-{seed}"


def _open(out: Path, name: str, seed: int, values: Mapping[str, Any]) -> Stream:
    path = out / "streams" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {"name": name, "seed": seed, "storage": str((out / "store").absolute())}
    own["data_root"] = str(_data(out, seed).absolute())
    path.write_text(yaml.safe_dump(dict(values) | own, sort_keys=False), encoding="utf-8")
    return open_stream(path, writable=True)
