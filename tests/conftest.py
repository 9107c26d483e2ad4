"""What every test needs: one torch thread, and nothing written outside its own folders."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

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


SHARED = "streams on one cluster"
WORLDS = "trainings in groups of processes"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, and those of all files whose streams share a cluster, which come
    first: on a cluster that has run a stream, the next one takes a tenth of the time. So it is with groups of
    training processes. Then other files that start a Ray, so that no long one is left for the end."""
    starts_ray = {item.path for item in items if item.get_closest_marker("ray")}
    for item in items:
        names = vars(item.module)  # pyright: ignore[reportAttributeAccessIssue]
        shares = "end_shared_cluster" not in names and not names.keys().isdisjoint(
            ("run_to_end", "shared_cluster")
        )
        group = SHARED if shares else WORLDS if "run_world" in names else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    first = {SHARED: 0, WORLDS: 1}
    items.sort(key=lambda item: (first.get(_group(item), 2), item.path not in starts_ray))


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return marker.args[0]


def pytest_sessionfinish() -> None:
    """End the cluster and the processes that tests of this process share, if any of them has started some."""
    if "tests.pipelines.running" in sys.modules:
        from tests.pipelines.running import end_shared_cluster

        end_shared_cluster()
    if "tests.seekr.training.worlds" in sys.modules:
        from tests.seekr.training.worlds import end_worlds

        end_worlds()
