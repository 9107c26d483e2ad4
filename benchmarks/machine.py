"""What a measured figure has to be read with: date, processor, versions."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

# For a process whose memory is measured: every tensor gets pages of its own and gives them back, so what is
# resident is what is alive.
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def describe() -> dict[str, Any]:
    """Return date, machine and versions as JSON values."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def reset_peak_memory() -> None:
    """Give freed memory back and let the peak of this process begin anew (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the largest resident size since `reset_peak_memory`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
