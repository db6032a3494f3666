"""Two groups of processes take turns on one machine, so that its speed at a moment is the same for both.

A shared machine changes its speed by a tenth from one second to the next; what ran at one time cannot be held against
what ran at another. Here one side is stopped (SIGSTOP) while the other runs, for a moment each, and a side's clock
stands while it is stopped. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TURN_S = 0.25  # far longer than what a stop costs (a millisecond), shorter than a change of the machine's speed
LOOK_S = 2.0  # how often descendants are looked for: reading /proc takes as long as a tenth of a turn


@dataclass(frozen=True)
class ThreadTime:
    """Seconds on a CPU, and seconds in which it could have run and had none."""

    cpu_s: float
    no_cpu_s: float


@dataclass
class Side:
    """A process with all its descendants, and the times (seconds since the epoch) in which it ran."""

    process: subprocess.Popen[str]
    turns: list[tuple[float, float]] = field(default_factory=list)
    threads: dict[str, ThreadTime] = field(default_factory=dict)
    """What each thread that was seen has used, as of its last turn, by its folder in /proc."""
    _running_since: float | None = None
    _family: list[int] = field(default_factory=list)
    _looked_at: float = 0.0

    def run(self) -> None:
        """Let it run, from now on."""
        self._find_family()
        self._running_since = time.time()
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stop it, and with it its clock."""
        self._find_family()
        self._signal(signal.SIGSTOP)
        stopped_at = time.time()  # before the threads are read: of a service's hundreds that takes a tenth of a turn
        self.look()
        if self._running_since is not None:
            self.turns.append((self._running_since, stopped_at))
            self._running_since = None

    def look(self) -> None:
        """Note what its threads have used."""
        self._find_family()
        for pid in self._family:
            self.threads |= thread_times(pid)

    def busiest(self, num_threads: int) -> list[ThreadTime]:
        """The threads that have used most."""
        return sorted(self.threads.values(), key=lambda t: t.cpu_s)[-num_threads:]

    def seconds_between(self, first: float, last: float) -> float:
        """How long it ran between two moments."""
        return sum(max(0.0, min(last, end) - max(first, begin)) for begin, end in self.turns)

    def is_done(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """Kill whatever is left of it."""
        self._looked_at = 0.0
        if not self.is_done():
            self._find_family()
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _find_family(self) -> None:
        if time.time() - self._looked_at > LOOK_S:
            self._family, self._looked_at = family(self.process.pid), time.time()


def take_turns(sides: Sequence[Side]) -> None:
    """Run stopped sides in turns until all have ended."""
    while not all(side.is_done() for side in sides):
        for side in sides:
            if side.is_done():
                continue
            side.run()
            with contextlib.suppress(subprocess.TimeoutExpired):
                side.process.wait(TURN_S)
            side.stop()


def thread_times(pid: int) -> dict[str, ThreadTime]:
    """What each thread of a process has used so far."""
    found = {}
    for stat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            ran_ns, waited_ns, _ = map(int, stat.read_text().split())
            found[str(stat.parent)] = ThreadTime(ran_ns / 1e9, waited_ns / 1e9)
    return found


def family(pid: int) -> list[int]:
    """A process and all its descendants, parents first."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for known in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == known]
    return found
