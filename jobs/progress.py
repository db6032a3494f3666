"""Progress for eyes: a live display on a terminal, one plain line per interval elsewhere.

What is shown is a `JobProgress`, a plain value that the driver makes; rates and ETA are computed here from its history.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.view import ActorView

logger = logging.getLogger(__name__)

LINE_INTERVAL_S = 30.0
RATE_WINDOW_S = 300.0
"""Long enough for takes of different length, short enough to notice a loss."""
MAX_ACTOR_LINES = 24


@dataclass(frozen=True)
class JobProgress:
    """Where a job stands. Counts are of tasks; `frames_done` includes takes that are half rendered."""

    num_tasks: int | None
    num_succeeded: int
    num_failed: int
    num_rejected: int
    num_running: int
    frames_done: int
    num_frames: int | None
    usd: float | None = None
    actors: tuple[ActorView, ...] = ()
    note: str = ""

    @property
    def num_settled(self) -> int:
        return self.num_succeeded + self.num_failed


class ProgressDisplay(Protocol):
    """Where progress goes."""

    def update(self, progress: JobProgress) -> None: ...

    def close(self) -> None: ...


class FrameRate:
    """Frames per second over a sliding window, and the ETA that follows from it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._points: deque[tuple[float, int]] = deque()

    def add(self, frames_done: int) -> None:
        now = self._clock()
        if self._points and frames_done < self._points[-1][1]:
            self._points.clear()  # a take was lost with its actor: begin again rather than show a negative speed
        self._points.append((now, frames_done))
        while now - self._points[0][0] > RATE_WINDOW_S and len(self._points) > 2:
            self._points.popleft()

    @property
    def frames_per_s(self) -> float | None:
        """None until two points in time are known."""
        if len(self._points) < 2:
            return None
        (t0, f0), (t1, f1) = self._points[0], self._points[-1]
        return (f1 - f0) / (t1 - t0) if t1 > t0 else None

    def eta_s(self, progress: JobProgress) -> float | None:
        """Seconds until all frames are done at this speed."""
        rate = self.frames_per_s
        if not rate or progress.num_frames is None:
            return None
        return max(0, progress.num_frames - progress.frames_done) / rate


def duration_text(seconds: float | None) -> str:
    """`2 h 05 min`, `3 min 20 s`, `12 s`; `unknown` for None."""
    if seconds is None:
        return "unknown"
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


def size_text(num_bytes: float) -> str:
    """`1.25 GB`, `3.4 MB`, `12 kB`."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


def progress_line(progress: JobProgress, rate: FrameRate) -> str:
    """All of it in one line, for logs."""
    total = "?" if progress.num_tasks is None else str(progress.num_tasks)
    speed = rate.frames_per_s
    parts = [
        f"{progress.num_succeeded}/{total} done",
        f"{progress.num_running} running",
        f"{progress.num_failed} failed",
        f"{progress.num_rejected} rejected",
        f"{speed:.1f} frames/s" if speed is not None else "speed unknown yet",
        f"ETA {duration_text(rate.eta_s(progress))}",
    ]
    if progress.usd is not None:
        parts.append(f"${progress.usd:.2f}")
    return ", ".join(parts) + (f" ({progress.note})" if progress.note else "")


class LineDisplay:
    """One line at once, then one per interval, and the last state at the end."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interval_s: float = LINE_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._interval_s = interval_s
        self._clock = clock
        self._rate = FrameRate(clock)
        self._last_s: float | None = None
        self._pending: JobProgress | None = None
        self._noted = False

    def update(self, progress: JobProgress) -> None:
        self._rate.add(progress.frames_done)
        is_news = bool(progress.note) and not self._noted
        self._pending, self._noted = progress, bool(progress.note)
        if is_news or self._last_s is None or self._clock() - self._last_s >= self._interval_s:
            self._write()

    def close(self) -> None:
        if self._pending is not None:
            self._write()

    def _write(self) -> None:
        assert self._pending is not None
        print(progress_line(self._pending, self._rate), file=self._stream, flush=True)
        self._pending = None
        self._last_s = self._clock()


class LogDisplay(LineDisplay):
    """The same as log records, so that a log of JSON objects holds nothing else."""

    def _write(self) -> None:
        progress = self._pending
        assert progress is not None
        facts = {
            "tasks": progress.num_tasks,
            "succeeded": progress.num_succeeded,
            "failed": progress.num_failed,
            "rejected": progress.num_rejected,
            "running": progress.num_running,
            "frames": progress.frames_done,
            "frames_per_s": self._rate.frames_per_s,
            "eta_s": self._rate.eta_s(progress),
            "usd": progress.usd,
        }
        logger.info("progress", extra=facts)
        self._pending = None
        self._last_s = self._clock()


class TerminalDisplay:
    """A bar, the counts, and a line per actor, redrawn in place."""

    def __init__(self, console: Console | None = None) -> None:
        self._rate = FrameRate()
        self._live = Live(console=console or Console(stderr=True), auto_refresh=False, transient=False)
        self._live.start()

    def update(self, progress: JobProgress) -> None:
        self._rate.add(progress.frames_done)
        self._live.update(draw(progress, self._rate), refresh=True)

    def close(self) -> None:
        self._live.stop()


def draw(progress: JobProgress, rate: FrameRate) -> Group:
    """The picture of a terminal display."""
    done, total = progress.frames_done, progress.num_frames
    bar = ProgressBar(total=total, completed=done) if total else ProgressBar(total=1, completed=0)
    table = Table.grid(padding=(0, 2))
    hidden = len(progress.actors) - MAX_ACTOR_LINES
    for actor in progress.actors[:MAX_ACTOR_LINES]:
        share = f"{actor.frames_done}/{actor.num_frames} frames" if actor.num_frames else ""
        memory = f"{actor.rss_bytes / 2**20:.0f} MB" if actor.rss_bytes else ""
        table.add_row(
            Text(actor.actor_id, style="cyan"),
            Text(actor.state, style="green" if actor.state == "running" else "yellow"),
            Text(actor.task_id or ""),
            Text(share),
            Text(memory, style="dim"),
        )
    if hidden > 0:
        table.add_row(Text(f"and {hidden} more", style="dim"))
    line = Table.grid(expand=True)  # a bare bar would not end its line
    line.add_row(bar)
    return Group(Text(progress_line(progress, rate)), line, table)


def make_display(*, json_logs: bool = False, interval_s: float = LINE_INTERVAL_S) -> ProgressDisplay:
    """The display that fits where stderr goes."""
    if json_logs:
        return LogDisplay(interval_s=interval_s)
    console = Console(stderr=True)
    return TerminalDisplay(console) if console.is_terminal else LineDisplay(interval_s=interval_s)
