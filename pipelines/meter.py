"""What a training step took: time, memory, and how much of the device's peak was used.

MFU needs a device whose peak is known and a model family whose operations are; where one of them is
missing it is left out, never guessed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from seekr.errors import UnsupportedModel
from seekr.training.flops import device_peak
from seekr.training.loop import Training


class Meter:
    """Adds the measured numbers of a step on one worker to its entry.

    Args:
        devices: How many take part.
    """

    def __init__(self, training: Training, device: torch.device, devices: int) -> None:
        self._training, self._device, self._devices = training, device, devices
        on_gpu = device.type == "cuda"
        self._peak = device_peak(torch.cuda.get_device_name(device)) if on_gpu else None
        self._process = psutil.Process()
        try:
            training.flops(0)
        except UnsupportedModel:
            self._peak = None

    def measured(self, step: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entry with `tokens_per_second`, `memory_bytes`, `at` and perhaps `mfu`.

        Memory is this worker's: the device's peak so far, on a CPU the process at this moment.
        """
        seconds = max(entry["seconds"], 1e-9)
        found = {"tokens_per_second": round(entry["tokens"] / seconds, 1)}
        found |= {"memory_bytes": self._memory(), "at": round(time.time(), 3)}
        if self._peak is not None:
            achieved = self._training.flops(step) / seconds / self._devices
            found["mfu"] = round(achieved / self._peak, 4)
        return dict(entry) | found

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._process.memory_info().rss
