"""Actors that hold models, and the way rows of Ray Data reach them.

A host opens what a stage needs (a scorer with two models, a generator with one) when its first batch
arrives, on its own node, from the store. Ray Data's tasks carry the rows to the hosts of a pool; a host
that dies is started again by Ray and its batch is done again. On a local cluster without GPUs hosts stay
for the next stage of the same section of the stream, which saves each stage the seconds that a fresh
process needs to import torch and transformers; so no more of them hold cores than the sections ask for.
Elsewhere they end with the stage, so training finds the devices free.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.data import Dataset

from pipelines.config import PoolConfig, StreamConfig

# Deaths of one host that a stage survives.
_MAX_RESTARTS = 8
# Stages whose models a host keeps open: two run side by side.
_MAX_OPEN = 2
# Hosts that stay, by name. An actor ends with the handle it was made with, so that one is kept.
_kept: dict[str, Any] = {}
_keeping = threading.Lock()

# Sections of a stream that say what actors get.
PoolName = Literal["score", "teach", "evaluate", "meta"]
Through = Callable[[Dataset], Dataset]


class ModelHost:
    """The actor: opens processors by stage and sends tables through them."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Any] = OrderedDict()

    def run(self, stage: str, processor: list[Any], table: pa.Table) -> pa.Table:
        """Send one batch through a stage's processor.

        Args:
            stage: its key, by which the open processor is found again.
            processor: a reference, in a list so that Ray leaves it alone, to (class, arguments).
        """
        if stage not in self._open:
            kind, arguments = ray.get(processor[0])
            while len(self._open) >= _MAX_OPEN:
                self._open.popitem(last=False)
            self._open[stage] = kind(**arguments)
        self._open.move_to_end(stage)
        return self._open[stage](table)


@contextmanager
def model_pool(
    section: PoolName,
    kind: type[Any],
    arguments: dict[str, Any],
    stage: str,
    pool: PoolConfig,
    config: StreamConfig,
) -> Iterator[Through]:
    """Provide a pool of hosts; yields the function that sends a dataset's batches through it.

    Args:
        section: The stream's section that says how many cores and devices the hosts get.
        kind: Class of the processor: made with `arguments` and `pool`, called with Arrow tables.
        stage: The stage's key.
        pool: How many hosts, at most the section's, on what, and the rows of a batch.
    """
    stays = config.ray.address is None and not pool.gpus
    hosts = [
        _kept_host(section, pool, index) if stays else _start_host(section, pool)
        for index in range(pool.actors)
    ]
    processor = [ray.put((kind, arguments | {"pool": pool}))]

    def send(table: pa.Table) -> pa.Table:
        return ray.get(random.choice(hosts).run.remote(stage, processor, table))

    def through(rows: Dataset) -> Dataset:
        return rows.map_batches(send, batch_size=pool.batch_size, batch_format="pyarrow")

    try:
        yield through
    finally:
        for host in hosts if not stays else ():
            ray.kill(host)


def forget_hosts() -> None:
    """Let go of the hosts that stayed; called when their cluster ends."""
    _kept.clear()


def _kept_host(section: PoolName, pool: PoolConfig, index: int) -> Any:
    name = f"{section}/{pool.cpus:g}/{index}"
    with _keeping:
        if name not in _kept:
            _kept[name] = _start_host(section, pool)
        return _kept[name]


def _start_host(section: PoolName, pool: PoolConfig) -> Any:
    titled = type(f"{section.title()}Host", (ModelHost,), {})  # shows in `ps`
    options: dict[str, Any] = {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
        "max_restarts": _MAX_RESTARTS,
        "max_task_retries": _MAX_RESTARTS,
        "scheduling_strategy": "DEFAULT",  # not in the place of a driver that has one of its own
    }
    return ray.remote(titled).options(**options).remote()
