"""Train: one task learnt by a group of workers under Ray Train, resumed where it was left.

Checkpoints lie in the stage's own `checkpoints/` folder, so a run that finds the stage unfinished
continues from the newest one there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import ControllerError, WorkerGroupError

from pipelines import out_of_memory
from pipelines.artifact import Artifact
from pipelines.config import StreamConfig
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource
from pipelines.stage import StageOutcome, Stopped
from pipelines.train_group import train_in_group
from pipelines.worker import TrainSpec
from pipelines.workspace import CHECKPOINTS, Workspace
from seekr.errors import SeekrError

HISTORY = "history.json"
_WORK = "pipelines.worker:train_worker"


def train(workspace: Workspace, config: StreamConfig, task: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes model/ and history.json."""
    execution = config.train
    spec = TrainSpec(
        store=workspace.store,
        key=workspace.key,
        task=task,
        settings=dict(workspace.config),
        execution=execution,
        method=config.method,
        model=ModelSource.of(workspace, config, "model"),
        data=_by_task(workspace, "data"),
        replay=_by_task(workspace, "replay"),
        targets=_by_task(workspace, "targets"),
        task_targets=_by_task(workspace, "task_targets"),
        past=_by_task(workspace, "past"),
        weights=_by_task(workspace, "weights"),
        probes=_by_task(workspace, "probes"),
        report=report.named("rank-0"),
        attempt=workspace.attempt,
    )
    return _outcome(workspace, _fit(spec, workspace, config))


def _fit(spec: TrainSpec, workspace: Workspace, config: StreamConfig) -> dict[str, Any]:
    execution, task = spec.execution, spec.task
    adapted = workspace.config.get("lora") is not None
    try:
        found = train_in_group(_WORK, spec, workspace, config)
    except WorkerGroupError as error:
        noted = out_of_memory.noted(workspace.store, workspace.key, workspace.attempt)
        if noted is not None:
            raise SeekrError(out_of_memory.explain(task, noted, execution, adapted)) from error
        causes = {f"{type(e).__name__}: {e}" for e in error.worker_failures.values()}
        killed = out_of_memory.explain_kill(task, causes, execution, adapted)
        if killed is not None:
            raise SeekrError(killed) from error
        raise SeekrError(
            f"training of {task} failed on {len(error.worker_failures)} workers, after all of "
            f"train.max_failures: {'; '.join(sorted(causes))}"
        ) from error
    except ControllerError as error:
        raise SeekrError(
            f"training of {task} could not start its workers: {error.controller_failure}; check that the "
            "cluster has what train.workers, cpus_per_worker and gpus_per_worker ask for, and run again"
        ) from error
    if "out_of_memory" in found:
        noted = found["out_of_memory"]
        raise SeekrError(out_of_memory.explain(task, noted, execution, adapted))
    if "diverged" in found:
        raise SeekrError(_divergence(task, found["diverged"]))
    if "stopped" in found:
        raise Stopped(f"train/{task} saved after step {found['stopped']} of {found['steps']}")
    return found


def _divergence(task: str, where: Mapping[str, Any]) -> str:
    saved = where["checkpoint"]
    good = f"the checkpoint after step {saved}" if saved else "none: the start of the task"
    return (
        f"training of {task} diverged at step {where['step']}: loss {where['loss']}, gradient norm "
        f"{where['grad_norm']}; both must be finite. The last good state is {good}. The step's "
        f"{len(where['row_ids'])} rows are {', '.join(where['row_ids'])}. Lower "
        "train.learning_rate or the method's weights, or look at these rows"
    )


def _outcome(workspace: Workspace, found: dict[str, Any]) -> StageOutcome:
    steps: list[dict[str, Any]] = found["history"]
    workspace.write_json(HISTORY, {"steps": steps})
    workspace.store.remove(workspace.path(CHECKPOINTS))
    seconds = sum(step["seconds"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    stats = {
        "steps": len(steps),
        "tokens": tokens,
        "step_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "final_loss": steps[-1]["loss"],
    }
    seeds = {"train": workspace.config["seed"]}
    return StageOutcome(rows=tokens, stats=stats, seeds=seeds, outputs=tuple(found["outputs"]))


def _by_task(workspace: Workspace, kind: str) -> dict[str, Artifact]:
    prefix = f"{kind}."
    return {
        name.removeprefix(prefix): artifact
        for name, artifact in workspace.inputs.items()
        if name.startswith(prefix)
    }
