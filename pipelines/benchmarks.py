"""Streams of the field's benchmarks, written from the files that their authors publish.

What is known of a benchmark (tasks, orders, epochs, metrics, lengths) stands in benchmarks.yaml. Given a
folder, a stream's YAML is made of it, in full and with absolute paths: nothing is decided later that
cannot be read there. Variants of one benchmark lie in folders of different names and are never mixed;
the stream carries its variant into every report.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.model_folder import read_model_config
from seekr.errors import ConfigError, DataError
from seekr.methods import METHODS, SEEKR
from seekr.models import model_shape

_FACTS = Path(__file__).with_name("benchmarks.yaml")


@functools.cache
def known_benchmarks() -> dict[str, Any]:
    """Return the facts by name of benchmark."""
    return yaml.safe_load(_FACTS.read_text(encoding="utf-8"))


def benchmark_stream(
    name: str,
    order: str,
    data: Path,
    model: Path,
    method: str,
    *,
    variant: str | None = None,
    first: int | None = None,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a stream as the mapping of its YAML.

    Args:
        name, order: of benchmarks.yaml.
        data: the folder that holds the tasks' folders, or the variants'.
        model: the base model's folder.
        method: its name; its settings are the method's own defaults.
        variant: needed where a benchmark has several.
        first: so many tasks from the beginning of the order.
        without: tasks to leave out.

    Raises:
        ConfigError: a name that does not exist, or nothing left.
        DataError: files that are not there, all of them at once.
    """
    facts = _one_of(known_benchmarks(), name, "benchmark")
    _one_of(METHODS, method, "method")
    chosen = _one_of(facts["orders"], order, f"order of {name}")
    folder, variant = _variant(facts, name, data, variant)
    epochs, train = chosen["epochs"], facts["train"]
    if isinstance(epochs, int):  # of all tasks: one field to change
        train, epochs = train | {"epochs": epochs}, [None] * len(chosen["tasks"])
    wanted = list(zip(chosen["tasks"], epochs, strict=True))[:first]
    for task in without:
        _one_of(dict(wanted), task, f"task of {name}, order {order}")
    wanted = [(task, count) for task, count in wanted if task not in without]
    if not wanted:
        raise ConfigError(f"benchmark {name}, order {order}: no task is left; leave out fewer")
    tasks = _tasks(facts, folder, wanted)
    label = f"{facts['title']}{f', variant {variant}' if variant else ''}, order {order}"
    if len(tasks) < len(chosen["tasks"]):
        label += f", {len(tasks)} of its {len(chosen['tasks'])} tasks"
    return {
        "name": f"{name}-{order}-{method}",
        "benchmark": label,
        "model": {"path": os.path.abspath(model)},
        "data": facts["data"],
        "tasks": tasks,
        "method": {"name": method} | (_budgets(model) if method == "seekr" else {}),
        "train": train,
    }


def stream_text(name: str, stream: dict[str, Any]) -> str:
    """Return a benchmark's stream as YAML with a heading."""
    source = known_benchmarks()[name]["source"]
    heading = (
        f"# {stream['benchmark']}.\n# {source}.\n# Written by `seekr benchmark`. Published "
        "eval and dev files are not used, as some equal the test files;\n# data.validation_rows holds "
        "rows out of the training rows.\n"
    )
    return heading + yaml.safe_dump(stream, sort_keys=False, allow_unicode=True, width=100)


def _budgets(model: Path) -> dict[str, int]:
    """Return SEEKR's budgets, or less where the model has less."""
    shape = model_shape(read_model_config(model, trust_remote_code=False))
    fields = SEEKR.model_fields
    layers = min(fields["layer_budget"].default, shape.num_layers)
    return {
        "layer_budget": layers,
        "head_budget": min(fields["head_budget"].default, layers * shape.num_heads),
    }


def _variant(
    facts: dict[str, Any], name: str, data: Path, variant: str | None
) -> tuple[Path, str | None]:
    """Return the folder of the tasks and the variant; a folder's own name may tell it."""
    variants: dict[str, str] = facts.get("variants", {})
    if not variants:
        if variant is not None:
            raise ConfigError(f"benchmark {name} has no variants; leave --variant {variant} out")
        return data, None
    told = next((v for v, folder in variants.items() if data.name == folder), None)
    if told is not None:
        if variant not in (None, told):
            raise ConfigError(
                f"folder {data} holds variant {told} and {variant} is asked for; give the folder of "
                "that variant, or the one above both"
            )
        return data, told
    if variant is None:
        there = [v for v, folder in variants.items() if (data / folder).is_dir()]
        raise ConfigError(
            f"benchmark {name} has the variants {', '.join(variants)}, whose figures cannot be "
            f"compared, and folder {data} holds {', '.join(there) or 'none of them'}; choose one "
            "with --variant"
        )
    _one_of(variants, variant, f"variant of {name}")
    return data / variants[variant], variant


def _tasks(
    facts: dict[str, Any], folder: Path, wanted: Sequence[tuple[str, int | None]]
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    missing: list[str] = []
    for task, epochs in wanted:
        place = _folder_of(folder, task)
        files = {part: place / file for part, file in facts["files"].items()}
        gone = [path for path in files.values() if not path.is_file()]
        missing += [f"{task}: {path}" for path in gone]
        paths = {part: os.path.abspath(path) for part, path in files.items()}
        own = {} if epochs is None else {"epochs": epochs}
        found.append({"name": task, **paths, **own, **facts["tasks"][task]})
    if missing:
        raise DataError(
            f"{len(missing)} files of {facts['title']} are not below {folder}: {'; '.join(missing)}. "
            "Give the folder that holds the tasks' folders, or leave tasks out with --without"
        )
    return found


def _folder_of(folder: Path, task: str) -> Path:
    """Return a task's folder; SuperNI's are `task363` or begin with `task363_`."""
    longer = sorted(path for path in folder.glob(f"{task}_*") if path.is_dir())
    exact = folder / task
    return exact if exact.is_dir() or not longer else longer[0]


def _one_of(known: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in known:
        raise ConfigError(f"{name!r} is no {what}; there are {', '.join(known)}")
    return known[name]
