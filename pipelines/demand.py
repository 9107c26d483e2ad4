"""What a stream's stages ask of a cluster: how many processes, and what each of them gets.

Stages may run side by side, and need not: a cluster is large enough when each of them fits by itself.
Nothing here knows of Ray, so that a cluster can be laid out where Ray is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.pool_config import ActorConfig, PoolConfig

if TYPE_CHECKING:
    from pipelines.config import StreamConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """Equal processes that must be placed at once.

    Attributes:
        field: of the YAML, which says so.
        fewest: so many at least.
        most: so many at most; more than the fewest for elastic trainings alone.
        cpus: cores of each.
        gpus: devices of each.
        reading: whether a task that brings rows runs beside them.
    """

    field: str
    fewest: int
    most: int
    cpus: float
    gpus: float
    reading: bool = False


def demands(config: StreamConfig) -> tuple[Processes, ...]:
    """Return what each kind of stage that a stream has asks for."""
    train = config.train
    training = Processes(
        field="train",
        fewest=train.fewest_workers,
        most=train.most_workers,
        cpus=train.cpus_per_worker,
        gpus=train.gpus_per_worker,
    )
    # A pool's actors keep their cores while a task brings them rows.
    pools = [_processes(name, pool, pool.actors, True) for name, pool in _pools(config)]
    weights = config.token_weights
    if weights is not None and weights.trains_network:
        pools.append(_processes("token_weights.meta", weights.meta, 1, True))
    general = [_processes("general", config.general, 1, False)] if config.general.asked else []
    return (training, *pools, *general)


def needed_at_once(config: StreamConfig) -> dict[str, float]:
    """Return how many CPUs and GPUs a cluster must have for each of a stream's stages to fit."""
    found = demands(config)
    return {
        "CPU": max(item.fewest * item.cpus + item.reading for item in found),
        "GPU": max(item.fewest * item.gpus for item in found),
    }


def _processes(field: str, actor: ActorConfig, actors: int, reading: bool) -> Processes:
    return Processes(
        field=field,
        fewest=actors,
        most=actors,
        cpus=actor.cpus,
        gpus=actor.gpus,
        reading=reading,
    )


def _pools(config: StreamConfig) -> list[tuple[str, PoolConfig]]:
    """Return the pools that the stream uses, with their names in the YAML."""
    needs, replay = config.method.needs, config.replay
    pools: list[tuple[str, PoolConfig]] = [("evaluate", config.evaluate)]
    if needs.heads or needs.fisher:
        pools.append(("score", config.score))
    asked = (needs.replay and replay.sampling != "random") or replay.generator is not None
    targets = needs.teacher or needs.task_logits or needs.reference
    if targets or asked or config.token_weights is not None:
        pools.append(("teach", config.teach))
    return pools
