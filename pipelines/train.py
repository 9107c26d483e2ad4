"""Train: one task learnt by a group of workers under Ray Train, resumed where it was left.

The trainer's storage is the stage's own `checkpoints/` folder and its name never changes, so a run
that finds the stage unfinished continues from the newest checkpoint there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines import out_of_memory
from pipelines.artifact import Artifact
from pipelines.checkpoints import RUN, drop_damaged_notes
from pipelines.config import StreamConfig
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource
from pipelines.stage import StageOutcome, Stopped
from pipelines.train_config import TrainConfig
from pipelines.worker import TrainSpec, train_worker
from pipelines.workspace import CHECKPOINTS, Workspace
from seekr.errors import SeekrError

HISTORY = "history.json"
# Groups that do not start: killed at birth, or a minute without the resources they ask for.
_MIN_START_FAILURES = 10


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
        report=report.named("rank-0"),
        attempt=workspace.attempt,
    )
    drop_damaged_notes(workspace.store, workspace.key)
    resources: dict[str, float] = {"CPU": execution.cpus_per_worker}
    if execution.gpus_per_worker:
        resources["GPU"] = execution.gpus_per_worker
    fewest, most = execution.fewest_workers, execution.most_workers
    workers = most if fewest == most else (fewest, most)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=execution.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend=process_group_backend(execution)),
        run_config=RunConfig(
            name=RUN,
            storage_path=workspace.full_path(CHECKPOINTS),
            storage_filesystem=workspace.store.filesystem,
            failure_config=failure_config(execution),
            checkpoint_config=CheckpointConfig(num_to_keep=execution.keep_checkpoints),
        ),
    )
    return _outcome(workspace, _fit(trainer, workspace, execution, task))


def failure_config(execution: TrainConfig) -> FailureConfig:
    """Return how often a training goes on from its last checkpoint by itself.

    A preempted node is nobody's failure and has no limit; groups that never start have one.
    """
    return FailureConfig(
        max_failures=execution.max_failures,
        max_preemption_failures=-1,
        controller_failure_limit=max(_MIN_START_FAILURES, execution.max_failures),
    )


def process_group_backend(execution: TrainConfig) -> str | None:
    """Return torch's backend; None lets Ray choose nccl or gloo by the device.

    What FSDP2 keeps in host memory it also reduces there, beside what lies on the devices.
    """
    offloads = execution.strategy == "fsdp" and execution.offload != "none"
    return "cpu:gloo,cuda:nccl" if offloads and execution.gpus_per_worker else None


def _fit(
    trainer: TorchTrainer, workspace: Workspace, execution: TrainConfig, task: str
) -> dict[str, Any]:
    adapted = workspace.config.get("lora") is not None
    try:
        found: Any = trainer.fit().return_value
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
