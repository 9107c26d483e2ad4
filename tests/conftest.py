"""What every test needs: one torch thread, and nothing written outside its own folders."""

from __future__ import annotations

import functools
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

torch.set_num_threads(1)
# The same examples every time, and no limit on a busy machine; HYPOTHESIS=explore looks for new ones.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS", "steady"))
# Local Ray clusters want a token; without one in the environment Ray would write to the home folder.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# As `seekr` itself has it: a thread that a failed test leaves behind must not start another Ray.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep digests and downloads of a test session out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("SEEKR_CACHE_DIR")
    os.environ["SEEKR_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["SEEKR_CACHE_DIR"]
    else:
        os.environ["SEEKR_CACHE_DIR"] = before


ROOT = Path(__file__).parents[1]
SHARED = "streams on one cluster"
WORLDS = "trainings in groups of processes"
FIRST = (SHARED, WORLDS)


@functools.cache
def group_of(file: str) -> str:
    """Return whose tests stay in one process: a file's, and those of all files whose streams share a cluster
    or whose trainings share processes. Where one has run, the next takes a tenth of the time."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if re.search(r"\b(run_to_end|shared_cluster)\b", text) and "end_shared_cluster" not in text:
        return SHARED
    return WORLDS if "run_world(" in text else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with these, then with other files that start a Ray: no long one is left for the end."""
    starts_ray = {item.path for item in items if item.get_closest_marker("ray")}

    def place(item: pytest.Item) -> tuple[int, bool]:
        group = group_of(item.nodeid.partition("::")[0])
        return (
            FIRST.index(group) if group in FIRST else len(FIRST),
            item.path not in starts_ray,
        )

    items.sort(key=place)


class Scheduling(LoadScopeScheduling):
    """Hands groups of files to the processes of pytest-xdist.

    Its own marks of groups are not seen under pytest 9.2, so files are told apart by their names.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Scheduling(config, log)


def pytest_sessionfinish() -> None:
    """End the cluster and the processes that tests of this process share, if any of them has started some."""
    if "tests.pipelines.running" in sys.modules:
        from tests.pipelines.running import end_shared_cluster

        end_shared_cluster()
    if "tests.seekr.training.worlds" in sys.modules:
        from tests.seekr.training.worlds import end_worlds

        end_worlds()
