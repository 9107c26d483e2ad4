"""Groups of processes that train together on this machine, over gloo, without Ray.

One group runs many cases one after the other, as starting a process costs more than a small training.
"""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[..., Any]


def run_world(
    size: int, function: Case, cases: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    """Call `function(**case, rank=, world_size=)` in `size` processes for each case.

    Returns:
        Rank 0's result by the case's name; a case that failed has its traceback as text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(_work, args=(size, port, function, dict(cases), folder), nprocs=size)
    return torch.load(folder / "results.pt", weights_only=False)


def _work(
    rank: int, size: int, port: int, function: Case, cases: dict[str, Any], folder: Path
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
    }
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            results[name] = function(**case, rank=rank, world_size=size)
        except Exception:
            results[name] = traceback.format_exc()
            if size > 1:
                break  # the others may be waiting for this one
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()
