"""General: what a model can do besides its tasks, by EleutherAI's lm-eval harness.

The base model is measured, and the model after the last task or after every one; the difference is what
learning the tasks has cost or brought. Tasks, prompts and metrics are the harness's own, or definitions
of one's own in its YAML format; its version is part of a stage's identity, since its tasks change.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from pipelines.config import GeneralConfig, StreamConfig
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device
from pipelines.results import GENERAL
from pipelines.stage import StageOutcome
from pipelines.transfer import cache_folder
from pipelines.workspace import Workspace
from seekr.errors import ConfigError
from seekr.models import load_tokenizer

# Of a task's metrics the first of these is its own; else the first by name.
_PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "rougeL", "bleu", "word_perplexity")
_BOOTSTRAPS = 1000


def general(
    workspace: Workspace, config: StreamConfig, task: str, report: Reporter
) -> StageOutcome:
    """Run the stage; writes general.json."""
    pool = config.general
    options = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "max_retries": 3}
    model = ModelSource.of(workspace, config, "model")
    settings = dict(workspace.config)
    report.post(force=True, rows_done=0)
    found = ray.get(ray.remote(_measure).options(**options).remote(model, settings, pool))
    workspace.write_json(GENERAL, found)
    stats = {name: cell["value"] for name, cell in found["tasks"].items()}
    return StageOutcome(rows=sum(cell["rows"] for cell in found["tasks"].values()), stats=stats)


def harness_version() -> str:
    """Return the installed harness's version.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "general.tasks is set and the package lm-eval is not installed; install it: "
            "pip install 'seekr-ray[general]', or leave general.tasks empty"
        )
    return importlib.metadata.version("lm_eval")


def check_tasks(wanted: Sequence[str], folder: Path | None) -> None:
    """Check that the harness knows the tasks.

    Args:
        folder: of definitions of one's own.

    Raises:
        ConfigError: one that it does not know.
    """
    known = _known_tasks(folder)
    missing = [name for name in wanted if name not in known]
    if missing:
        where = "" if folder is None else f" and {folder}"
        raise ConfigError(
            f"general.tasks has {', '.join(missing)}, which lm-eval {harness_version()}{where} does "
            "not know; `lm_eval ls tasks` lists what it knows, general.folder adds definitions"
        )


def _known_tasks(folder: Path | None) -> frozenset[str]:
    """Return the harness's own tasks, and those of a folder."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return _own_tasks()
    more = TaskManager(include_path=str(folder), include_defaults=False).all_tasks
    return _own_tasks() | frozenset(more)


@functools.cache
def _own_tasks() -> frozenset[str]:
    """Return the names of the harness's tasks; it reads thousands of files for them, so a version's names
    are kept in this host's cache."""
    kept = cache_folder() / f"lm-eval-{harness_version()}.json"
    try:
        return frozenset(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        names = sorted(_manager(None).all_tasks)
    kept.parent.mkdir(parents=True, exist_ok=True)
    fresh = kept.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(json.dumps(names), encoding="utf-8")
    fresh.replace(kept)
    return frozenset(names)


def _manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))


def _measure(
    model: ModelSource, settings: Mapping[str, Any], pool: GeneralConfig
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models import huggingface

    adapter: Any = huggingface.HFLM
    measure: Any = lm_eval.simple_evaluate  # decorators hide their parameters
    device, seed = prepare_device(pool), settings["seed"]
    loaded: Any = model.load("sdpa")
    harness = adapter(
        pretrained=loaded.to(device),
        tokenizer=load_tokenizer(model.folder(), trust_remote_code=model.trust_remote_code),
        batch_size=pool.batch_size,
        max_length=settings["max_length"],
    )
    found = measure(
        model=harness,
        tasks=list(settings["tasks"]),
        num_fewshot=settings["num_fewshot"],
        limit=settings["limit"],
        task_manager=_manager(pool.folder),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=False,
    )
    rows = found["n-samples"]
    return {
        "tasks": {
            name: own | {"rows": rows[name]["effective"] if name in rows else 0}
            for name, metrics in found["results"].items()
            if (own := _own(metrics)) is not None
        },
        "versions": found["versions"],
        "harness": settings["harness"],
    }


def _own(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a task's own metric, with its standard error where there is one, and all the others.

    None for a group that has no metric of its own: its tasks have theirs.
    """
    values = {
        name: float(value)
        for name, value in metrics.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    }
    if not values:
        return None
    own = min(values, key=lambda name: (_rank(name.split(",")[0]), name))
    metric, _, filtered = own.partition(",")
    error = metrics.get(f"{metric}_stderr,{filtered}")
    return {
        "metric": metric,
        "value": values[own],
        "error": float(error) if isinstance(error, int | float) else None,
        "all": values,
    }


def _rank(metric: str) -> int:
    return _PREFERRED.index(metric) if metric in _PREFERRED else len(_PREFERRED)
