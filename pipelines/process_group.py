"""How training workers on several hosts find each other: torch's process group as Ray Train sets it up,
between the addresses that Ray knows the hosts by.

Left alone gloo takes the address of the host's own name, which Debian has as 127.0.1.1: workers on two such
hosts would wait for each other until the group's half hour is up. NCCL looks for an interface by itself.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeTorchConfig(TorchConfig):
    """Ray Train's, with gloo on the interface of the node's address."""

    @property
    def backend_cls(self) -> type[Any]:
        """What sets the group up."""
        return _NodeTorchBackend


class _NodeTorchBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Have gloo listen where this node's Ray does, unless the environment says where."""
    if os.environ.get(INTERFACE):
        return
    address = ray.util.get_node_ip_address()
    for name, known in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in known):
            os.environ[INTERFACE] = name
            return
