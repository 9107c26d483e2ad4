"""The Ray cluster of a run: a running one by address, or a local one sized for the stream.

On a laptop the logical CPUs of the local cluster are set so that the configured workers and actors
always fit beside each other: a placement that could never be met would wait for ever. On a cluster
that is not ours the same is checked and refused.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.data

from pipelines.config import StreamConfig
from pipelines.demand import needed_at_once
from pipelines.hosts import forget_hosts
from pipelines.train_group import end_groups, share_cluster
from seekr.errors import ConfigError

# A stage learns its end from the desk; this is how soon a dead worker is noticed. More often costs CPU.
_TRAIN_POLL_SECONDS = "1"
_QUIET_LOGGERS = ("ray.data", "ray.train", "ray.serve", "ray")


@contextmanager
def ray_session(configs: Sequence[StreamConfig], *, drivers: int = 1) -> Iterator[None]:
    """Connect to the streams' cluster, or start a local one; a session that exists is used as is.

    Args:
        configs: of all streams that will run in it; the first one says where it is.
        drivers: how many processes run such streams in it side by side; a local one is made as large.

    Raises:
        ConfigError: the cluster can never hold what the stream asks for.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _TRAIN_POLL_SECONDS)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    mine = not ray.is_initialized()
    if mine:
        _connect(configs, drivers)
    share_cluster(drivers)
    try:
        for config in configs:
            _check_resources(config)
        _configure_data()
        yield
    finally:
        if mine:
            let_go()
            ray.shutdown()


def let_go() -> None:
    """End what this process has kept on the cluster for further stages."""
    end_groups()
    forget_hosts()


def _connect(configs: Sequence[StreamConfig], drivers: int) -> None:
    let_go()  # whatever stayed on a cluster that somebody else has ended
    config = configs[0]
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.ray.address is not None:
        ray.init(address=config.ray.address, **quiet)
        return
    cpus = max(
        config.ray.num_cpus or 0,
        os.cpu_count() or 1,
        *(math.ceil(other.required_cpus) for other in configs),
    )
    cpus *= drivers
    # Not the cluster that somebody has left running on this machine. The dashboard answers Ray
    # Train's cleaner, which otherwise keeps polling after every stage.
    local: dict[str, Any] = {"address": "local", "include_dashboard": True, "dashboard_port": None}
    ray.init(num_cpus=cpus, **local, **quiet)


def _check_resources(config: StreamConfig) -> None:
    total = ray.cluster_resources()
    for name, needed in needed_at_once(config).items():
        has = total.get(name, 0.0)
        if needed > has:
            raise ConfigError(
                f"the stream needs {needed:g} {name}s at once and the Ray cluster has {has:g}; "
                "lower train.workers, train.cpus_per_worker or the pools, or add nodes"
            )


def _configure_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Sorted in, sorted out: what is written under an address has one order.
    context.execution_options.preserve_order = True
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
