"""Whether a cluster still has what running stages need: hosts leave, and most of them come back.

Ray waits for ever for resources that are gone, and says nothing. So a run asks every few seconds what the
cluster has, says when that is too little, and ends with a sentence when it stays so. Ray is imported where
it is asked: whoever opens a stream imports this module.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from pipelines.config import StreamConfig
from pipelines.pool_config import PoolConfig
from pipelines.stage import Stage
from seekr.errors import SeekrError

_ASK_SECONDS = 5.0
# A machine that is busy answers late.
_SILENT_SECONDS = 60.0
_AGAIN = (
    "Run the same command again when it is: finished stages stay, and trainings go on from their last "
    "checkpoint"
)

Totals = Callable[[], Mapping[str, float]]


def cluster_totals() -> Mapping[str, float]:
    """Return what the hosts that are alive have together; raises where none can be asked."""
    import ray

    if not ray.is_initialized():
        raise RuntimeError("there is no cluster")  # and asking must not start one
    return ray.cluster_resources()


class ClusterTooSmall(SeekrError):
    """A cluster has lost what a stage needs, and did not get it back in time."""


def needed_by(stage: str, config: StreamConfig) -> dict[str, float]:
    """Return the CPUs and GPUs without which a stage of that name cannot go on."""
    train = config.train
    if stage == "train":
        workers = train.fewest_workers
        return {"CPU": workers * train.cpus_per_worker, "GPU": workers * train.gpus_per_worker}
    if stage == "general":
        return {"CPU": config.general.cpus, "GPU": config.general.gpus}
    if stage == "meta" and config.token_weights is not None:
        meta = config.token_weights.meta
        return {"CPU": meta.cpus + 1, "GPU": meta.gpus}
    pools: dict[str, PoolConfig] = {
        **dict.fromkeys(("score", "fisher"), config.score),
        **dict.fromkeys(("teach", "generate", "weights"), config.teach),
        **dict.fromkeys(("evaluate", "rollout", "borrow"), config.evaluate),
    }
    pool = pools.get(stage)
    if pool is None:
        return {"CPU": 1}
    # A task brings the actors their rows.
    return {"CPU": pool.actors * pool.cpus + 1, "GPU": pool.actors * pool.gpus}


class Capacity:
    """Compares what running stages need with what the cluster has. A context manager.

    Asking is left to a thread, as a head that is out of reach does not answer.

    Args:
        patience: seconds that the cluster may be too small, or out of reach, before the run ends.
        tell: told when it has become so, and when it is no longer.
        totals: what the cluster has.
    """

    def __init__(
        self,
        patience: float,
        tell: Callable[[str], None],
        totals: Totals = cluster_totals,
    ) -> None:
        self._patience, self._tell, self._totals = patience, tell, totals
        self._has: Mapping[str, float] | None = None
        self._answered = time.monotonic()
        self._wrong: str | None = None
        self._since = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> Capacity:
        self._answered = time.monotonic()
        threading.Thread(target=self._ask, name="capacity", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def check(self, running: Mapping[Stage, StreamConfig]) -> None:
        """Look at the newest answer; cheap, for a loop.

        Raises:
            ClusterTooSmall: it has been too small, or silent, for longer than the patience.
        """
        wrong, now = self._found(running), time.monotonic()
        if wrong is None:
            if self._wrong is not None:
                self._tell("the Ray cluster has what running stages need again")
            self._wrong = None
            return
        if self._wrong is None:
            self._since = now
            self._tell(f"{wrong}: waiting up to {self._patience:g} s (ray.patience) for it")
        self._wrong = wrong
        if now - self._since > self._patience:
            raise ClusterTooSmall(
                f"{wrong}, and that has not changed for {self._patience:g} s (ray.patience). {_AGAIN}"
            )

    def _found(self, running: Mapping[Stage, StreamConfig]) -> str | None:
        silent = time.monotonic() - self._answered
        if silent > _SILENT_SECONDS:
            return "the Ray cluster's head does not answer"
        if self._has is None:
            return None
        for stage, config in running.items():
            for name, needed in needed_by(stage.name, config).items():
                has = self._has.get(name, 0.0)
                if needed > has:
                    return f"the Ray cluster has {has:g} {name}s and {stage} needs {needed:g}"
        return None

    def _ask(self) -> None:
        while not self._ended.wait(_ASK_SECONDS):
            try:
                self._has = self._totals()
                self._answered = time.monotonic()
            except Exception:  # Ray's own, or of what it is made of: no answer either way
                continue
