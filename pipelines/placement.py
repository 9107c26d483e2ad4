"""Where small actors live that a run cannot do without: on the driver's own node.

Losing any other host then costs a run time and nothing else. This module must stay light: the monitor
imports it, and with it every process that reports.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def beside_driver() -> dict[str, Any]:
    """Return the options of an actor that takes no resources and lives as long as this process's node."""
    here = ray.get_runtime_context().get_node_id()
    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=here, soft=False),
    }
