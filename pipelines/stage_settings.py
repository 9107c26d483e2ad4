"""What of a stream's config bears on a stage's result, as the settings that enter its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config import StreamConfig
from pipelines.data_config import TaskConfig
from pipelines.section import identity
from seekr.methods.sapt import SAPT
from seekr.methods.seekr import SEEKR
from seekr.models import ModelShape

# Raise it when what is written beside a frozen model changes.
_ADDITION = 2


def precision(config: StreamConfig) -> dict[str, Any]:
    """Return the seed and the dtype of the forward passes."""
    return {"seed": config.seed, "dtype": config.model.dtype}


def training(config: StreamConfig, epochs: int, *, earlier: bool) -> dict[str, Any]:
    """Return the settings of a training, with earlier tasks to keep or without."""
    needs = config.method.needs
    another = needs.earlier and earlier
    method = config.method.loss_settings() if another else config.method.first_task_settings()
    settings = identity(config.train) | {"epochs": epochs, "method": method, **precision(config)}
    if needs.addition:
        settings["addition"] = _ADDITION
    replayed = needs.replay and earlier
    return settings | ({"batch_ratio": config.replay.batch_ratio} if replayed else {})


def reading(config: StreamConfig, task: TaskConfig, template: str) -> dict[str, Any]:
    """Return how a task's rows are read and tokenised; where there are no documents, nothing of them."""
    options = config.options(task)
    settings: dict[str, Any] = identity(options) | {"template": template}
    del settings["metric"]
    if options.columns.text is None:
        del settings["columns"]["text"], settings["columns"]["focus"]
    return settings


def generating(config: StreamConfig, task: TaskConfig, template: str) -> dict[str, Any]:
    """Return how prompts like a task's are written by a generator."""
    replay, options = config.replay, config.options(task)
    assert replay.generator is not None
    return {
        **identity(replay.generator),
        "ratio": replay.ratio,
        "rows": replay.rows,
        "template": template,
        "prompt_length": options.max_length - options.max_answer_length,
        **precision(config),
    }


def scoring(config: StreamConfig, method: SEEKR, shape: ModelShape) -> dict[str, Any]:
    """Return how heads are scored."""
    return {
        "query_budget": method.query_budget,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        **precision(config),
    }


def answering(config: StreamConfig, name: str) -> dict[str, Any]:
    """Return how a kept prompt of a task is answered by the newest model, and what becomes of answers."""
    replay, dtype = config.replay, config.model.dtype
    accepted = {"accept": replay.accept, "rejected": replay.rejected, "dtype": dtype}
    return decoding(config, [name])["tasks"][name] | accepted


def measuring(config: StreamConfig, harness: str | None) -> dict[str, Any]:
    """Return how general ability is measured, by a version of the harness."""
    fields = {"tasks", "num_fewshot", "limit", "max_length"}
    asked = config.general.model_dump(mode="json", include=fields)
    return asked | precision(config) | {"harness": harness}


def borrowing(config: StreamConfig, templates: Mapping[str, str]) -> dict[str, Any]:
    """Return how earlier tasks' questions are put around new inputs; templates of these by name."""
    options = {task.name: config.options(task) for task in config.tasks}
    fields = {"max_length", "max_answer_length", "truncate"}
    tasks = {
        name: options[name].model_dump(mode="json", include=fields) | {"template": template}
        for name, template in templates.items()
    }
    return {"tasks": tasks, "rows": config.replay.borrowed, **precision(config)}


def everything(config: StreamConfig) -> dict[str, Any]:
    """Return the settings of a sample of all rows there are."""
    return {"ratio": 1.0, "rows": None, "seed": config.seed}


def targets(config: StreamConfig, *, logits: bool) -> dict[str, Any]:
    """Return what is written of a row by a teacher."""
    settings = {
        "logits": logits,
        "logit_shift": getattr(config.method, "logit_shift", True),
        "bits": config.teach.bits,
        **precision(config),
    }
    return settings | ({"logits_kept": config.teach.logits_kept} if logits else {})


def replay_targets(config: StreamConfig) -> dict[str, Any]:
    """Return what is written of a replayed row."""
    if isinstance(config.method, SAPT):
        return {"weights": config.method.reflection, **precision(config)}
    settings = targets(config, logits=config.method.needs.logits)
    if isinstance(config.method, SEEKR):
        settings["query_budget"] = config.method.query_budget
        settings["attention_kept"] = config.teach.attention_kept
    return settings


def decoding(config: StreamConfig, tasks: Sequence[str]) -> dict[str, Any]:
    """Return how tasks are answered and scored."""
    by_name = {task.name: config.options(task) for task in config.tasks}
    cells = {
        name: {"metric": by_name[name].metric, "max_new_tokens": by_name[name].max_answer_length}
        for name in tasks
    }
    if getattr(config.method, "inference", None) == "task":
        cells = {name: cell | {"prompts": "task"} for name, cell in cells.items()}
    found = {"decoding": "greedy", "tasks": cells, "dtype": config.model.dtype}
    split = config.evaluate.split
    return found if split == "test" else found | {"split": split}
