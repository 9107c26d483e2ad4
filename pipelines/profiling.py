"""A torch.profiler trace of some steps of a training, where the configuration asks for one.

The trace is no result: it goes to `profiles/` under the storage's root, beside all stages and in none
of them, so that asking for it changes no artifact.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipelines.store import Store

FOLDER = "profiles"


class StepProfiler:
    """Traces the steps `first` to `last` of the worker that has one.

    Args:
        stage: The stage's key, which names the trace.
        steps: (first, last), from 0; None traces nothing.
    """

    def __init__(self, store: Store, stage: str, steps: tuple[int, int] | None) -> None:
        self._store, self._stage, self._steps = store, stage, steps
        self._running: Any = None

    def before(self, step: int) -> None:
        """Start at the first step; a training that resumes among the steps starts there."""
        if self._steps is None or self._running is not None:
            return
        first, last = self._steps
        if first <= step <= last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._running.__enter__()

    def after(self, step: int, num_steps: int) -> None:
        """Store the trace after the last step."""
        if self._running is None or self._steps is None:
            return
        if step < min(self._steps[1], num_steps - 1):
            return
        self._running.__exit__(None, None, None)
        first, last = self._steps
        with tempfile.TemporaryDirectory(prefix="seekr-profile-") as folder:
            path = Path(folder) / f"steps-{first}-{last}.json.gz"
            self._running.export_chrome_trace(str(path))
            self._store.upload(folder, f"{FOLDER}/{self._stage}")
        self._running = self._steps = None
