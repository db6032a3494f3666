"""What one task measured: seconds per stage, peak memory. Numbers only; nothing here decides anything."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Stopwatch:
    """Adds up seconds by stage name.

    Args:
        device: The current stream of a CUDA device is waited for at the end of each stage, else its work would count
            for the next one; so a stage must be as long as a chunk's work, never a single step. What runs beside it on
            another stream goes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        finally:
            self._seconds[name] += time.perf_counter() - started

    def add(self, name: str, seconds: float) -> None:
        """What was timed by itself, beside the current stream."""
        self._seconds[name] += seconds

    def seconds(self, name: str) -> float:
        return self._seconds[name]


def reset_peak_gpu_bytes(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gpu_bytes(device: torch.device) -> int:
    """Highest allocation since the last reset; 0 on the CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    try:  # ru_maxrss would begin at what the parent process once held
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def rss_bytes() -> int:
    """Resident memory of this process now; 0 where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()
