"""SIGINT and SIGTERM as a question the loop asks, and the lease's heartbeat beside it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from cluster.errors import StoreError
from jobs.errors import LeaseLost, StoppedBeforeStart
from jobs.lease import Lease

logger = logging.getLogger(__name__)

BEATS_PER_TTL = 3


class StopSwitch:
    """Counts requests to stop: signals, or calls of `request`."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.reason = ""

    def request(self, reason: str) -> None:
        self.num_requests += 1
        self.reason = reason

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Within, SIGINT and SIGTERM only count."""
        with _handled_by(self._on_signal):
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Within, SIGINT and SIGTERM end in StoppedBeforeStart: for the time in which there is nothing to bring home.

    What is raised meanwhile is KeyboardInterrupt, because libraries catch every Exception; should one of them catch
    that too, the stop comes at the end of the block.
    """
    asked: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        raise KeyboardInterrupt

    with _handled_by(stop):
        try:
            yield
        except KeyboardInterrupt:
            asked.append("a signal")  # one that a library has put its own handler before
    if asked:
        raise StoppedBeforeStart(f"stopped by {asked[0]} before the first take was given out")


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go there; only the main thread can ask for that, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Heartbeat:
    """Beats a lease from a thread of its own until stopped; `lost` is set when another driver has the job."""

    def __init__(self, lease: Lease, ttl_s: float) -> None:
        self._lease = lease
        self._interval_s = ttl_s / BEATS_PER_TTL
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-heartbeat", daemon=True)
        self.lost: LeaseLost | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                self._lease.beat()
            except LeaseLost as error:
                self.lost = error
                return
            except StoreError as error:  # the next beat comes in time, or another driver rightly takes over
                logger.warning("lease heartbeat failed", extra={"why": str(error)})
            if self._stop.wait(self._interval_s):
                return
