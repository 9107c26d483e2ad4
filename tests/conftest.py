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


def pytest_sessionfinish() -> None:
    """End the cluster that tests of a process share, if any of them has started it."""
    if "tests.pipelines.running" in sys.modules:
        from tests.pipelines.running import end_shared_cluster

        end_shared_cluster()
