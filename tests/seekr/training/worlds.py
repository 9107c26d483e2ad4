"""Groups of processes that train together on this machine, over gloo, without Ray.

Starting a process costs more than a small training, so a group goes through many cases one after the other,
and stays for those of the next test. One in which a case has failed is ended: the others may wait for it.
"""

from __future__ import annotations

import os
import queue
import socket
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[..., Any]
_LOOK_SECONDS = 1.0


def run_world(
    size: int, function: Case, cases: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    """Call `function(**case, rank=, world_size=)` in `size` processes for each case.

    Returns:
        Rank 0's result by the case's name; a case that failed has its traceback as text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = _worlds.get(size)
    if world is None:
        world = _worlds[size] = World(size)
    results, failed = world.run(function, cases, folder)
    if failed:
        _worlds.pop(size).end()
    return results


class World:
    """Processes of one group.

    Args:
        size: how many there are.
    """

    def __init__(self, size: int) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        context = mp.get_context("spawn")
        self._orders = [context.Queue() for _ in range(size)]
        self._done = context.Queue()
        self._processes = [
            context.Process(target=_work, args=(rank, size, port, orders, self._done), daemon=True)
            for rank, orders in enumerate(self._orders)
        ]
        for process in self._processes:
            process.start()

    def run(
        self, function: Case, cases: Mapping[str, Mapping[str, Any]], folder: Path
    ) -> tuple[dict[str, Any], bool]:
        """Go through some cases; returns rank 0's results, and whether one has failed anywhere."""
        for orders in self._orders:
            orders.put((function, {name: dict(case) for name, case in cases.items()}, folder))
        finished: list[bool] = []
        while len(finished) < len(self._processes) and not any(finished):
            try:
                finished.append(self._done.get(timeout=_LOOK_SECONDS))
            except queue.Empty:
                if not all(process.is_alive() for process in self._processes):
                    finished.append(True)
        saved = folder / "results.pt"
        return torch.load(saved, weights_only=False) if saved.exists() else {}, any(finished)

    def end(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
            process.join()


_worlds: dict[int, World] = {}


def end_worlds() -> None:
    """End all groups."""
    while _worlds:
        _worlds.popitem()[1].end()


def _next(orders: Any) -> Any:
    """Wait for cases; the process ends with the one that would have sent them."""
    parent = parent_process()
    while parent is not None and parent.is_alive():
        try:
            return orders.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            continue
    os._exit(1)


def _work(rank: int, size: int, port: int, orders: Any, done: Any) -> None:
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
    while True:
        function, cases, folder = _next(orders)
        results: dict[str, Any] = {}
        failed = False
        for name, case in cases.items():
            try:
                results[name] = function(**case, rank=rank, world_size=size)
            except Exception:
                results[name], failed = traceback.format_exc(), True
                if size > 1:
                    break  # the others may be waiting for this one
        if rank == 0:
            torch.save(results, folder / "results.pt")
        done.put(failed)
