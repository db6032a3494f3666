"""What the cards themselves say while a bench runs: utilisation, clock, power, memory, four times a second.

One `nvidia-smi` for all cards, beside the accounting of the service: it counts a card as used when any kernel runs, the
service when a take has the right to it. Without `nvidia-smi` there are no samples.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from types import TracebackType

PERIOD_MS = 250
FIELDS = "timestamp,index,utilization.gpu,clocks.sm,power.draw,memory.used"


@dataclass(frozen=True)
class Sample:
    """One card at one time."""

    time: float
    """Seconds since the epoch."""
    card: int
    used_percent: float
    """Of the last moment, with at least one kernel running."""
    clock_mhz: float
    power_w: float
    memory_mib: float


class GpuWatch:
    """Samples from entering to leaving; `samples` may be asked at any time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "samples.csv"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> GpuWatch:
        program = shutil.which("nvidia-smi")
        if program is not None:
            command = [program, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits", "-lms", str(PERIOD_MS)]
            with self._file.open("wb") as out:
                self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def samples(self, since: float, until: float) -> list[Sample]:
        """Those between two times, of all cards."""
        text = self._file.read_text(errors="replace") if self._file.exists() else ""
        return [sample for sample in read_samples(text) if since <= sample.time <= until]


def read_samples(text: str) -> list[Sample]:
    """Lines of `nvidia-smi`; what is cut or not supported is left out."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        try:
            time = datetime.strptime(parts[0], "%Y/%m/%d %H:%M:%S.%f").astimezone().timestamp()
            found.append(Sample(time, int(parts[1]), *(float(part) for part in parts[2:6])))
        except (ValueError, IndexError, TypeError):
            continue
    return found


def by_card(samples: list[Sample]) -> list[dict[str, float]]:
    """Means over time of each card that worked at all, by its number."""
    rows = []
    for card in sorted({sample.card for sample in samples}):
        own = [sample for sample in samples if sample.card == card]
        if max(sample.used_percent for sample in own) == 0:
            continue
        rows.append(
            {
                "card": card,
                "used_percent": fmean(sample.used_percent for sample in own),
                "clock_mhz": fmean(sample.clock_mhz for sample in own),
                "power_w": fmean(sample.power_w for sample in own),
                "memory_mib": max(sample.memory_mib for sample in own),
            }
        )
    return rows
