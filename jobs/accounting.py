"""Where the GPU-seconds went, by cause. Pure: times come in as numbers.

An actor holds its GPU from spawn to end. Loading is what passes before it is ready; useful, upload_wait and failed
come from the actors' own clocks; what was in hand when an actor was lost is redone; the rest is idle. So the causes add
up to the time held, except for what an actor reports beyond it by the error of a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Cause = Literal["useful", "load", "redone", "failed", "idle", "upload_wait"]
CAUSES: tuple[Cause, ...] = ("useful", "load", "redone", "failed", "idle", "upload_wait")


@dataclass(slots=True)
class Meter:
    """One actor's time. `busy_since` is when its oldest open call became the oldest; None without calls."""

    spawned_at: float
    ready_at: float | None = None
    busy_since: float | None = None
    idle_since: float | None = None
    empty_s: float = 0.0
    spent: dict[Cause, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))

    def unexplained_s(self, now: float) -> float:
        """Seconds with calls in hand that no result accounts for."""
        if self.ready_at is None:
            return 0.0
        empty_s = self.empty_s + (now - self.idle_since if self.idle_since is not None else 0.0)
        return max(0.0, now - self.ready_at - empty_s - sum(self.spent.values()))


class GpuAccount:
    """All actors of a job; `seconds` may be asked at any time."""

    def __init__(self) -> None:
        self._open: dict[str, Meter] = {}
        self._closed: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)
        self._closed_held_s = 0.0

    def spawned(self, actor_id: str, now: float) -> None:
        self._open[actor_id] = Meter(now)

    def ready(self, actor_id: str, now: float) -> None:
        meter = self._open[actor_id]
        meter.ready_at = meter.idle_since = now

    def call_started(self, actor_id: str, now: float) -> None:
        meter = self._open[actor_id]
        if meter.idle_since is not None:
            meter.empty_s += now - meter.idle_since
            meter.idle_since = None
            meter.busy_since = now

    def call_ended(self, actor_id: str, now: float, *, has_more: bool) -> None:
        meter = self._open[actor_id]
        meter.busy_since = now if has_more else None
        meter.idle_since = None if has_more else now

    def spent(self, actor_id: str, cause: Cause, seconds: float) -> None:
        self._open[actor_id].spent[cause] += seconds

    def finished(self, actor_id: str, gpu_s: float, upload_wait_s: float) -> None:
        """A take is complete; it held the GPU for `gpu_s`, some of which it waited for encoder or store."""
        self.spent(actor_id, "useful", max(0.0, gpu_s - upload_wait_s))
        self.spent(actor_id, "upload_wait", min(gpu_s, upload_wait_s))

    def gone(self, actor_id: str, now: float, lost_as: Cause = "redone") -> float:
        """The actor is lost or stopped; returns the seconds of work lost with it, counted as `lost_as`."""
        meter = self._open.pop(actor_id)
        lost_s = 0.0
        if meter.busy_since is not None:
            lost_s = min(now - meter.busy_since, meter.unexplained_s(now))
            meter.spent[lost_as] += lost_s
        self._closed = _added(self._closed, _by_cause(meter, now))
        self._closed_held_s += now - meter.spawned_at
        return lost_s

    def held_s(self, now: float) -> float:
        """Seconds that all actors together held a GPU."""
        return self._closed_held_s + sum(now - meter.spawned_at for meter in self._open.values())

    def seconds(self, now: float) -> dict[Cause, float]:
        """Seconds by cause, up to now."""
        total = self._closed
        for meter in self._open.values():
            total = _added(total, _by_cause(meter, now))
        return dict(total)


def _added(a: dict[Cause, float], b: dict[Cause, float]) -> dict[Cause, float]:
    return {cause: a[cause] + b[cause] for cause in CAUSES}


def _by_cause(meter: Meter, now: float) -> dict[Cause, float]:
    parts = meter.spent.copy()
    parts["load"] = (now if meter.ready_at is None else meter.ready_at) - meter.spawned_at
    parts["idle"] = max(0.0, now - meter.spawned_at - sum(parts.values()))
    return parts
