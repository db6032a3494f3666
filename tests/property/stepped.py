"""Drivers that stand still before every call to the store until they are told to go on, so that any interleaving, lost
answer and crash can be played. Each runs the project's own code in a thread; only one of them moves at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from cluster.errors import OutcomeUnknown, StoreUnavailable
from cluster.object_store import ObjectInfo
from jobs.errors import LeaseHeld, LeaseLost
from jobs.held_job import HeldJob, take_job
from jobs.journal import RETRY_THESE
from jobs.lease import Owner
from jobs.replay import Replay
from tests.fakes import ManualClock, MemoryStore
from tests.render_rows import given_up, succeeded

T = TypeVar("T")
Fault = Literal["none", "refused", "lost"]


class Crash(BaseException):
    """kill -9: no handler of the project catches it."""


class SteppedStore(MemoryStore):
    """One driver's connection to the shared store; calls of its own thread wait for `step`."""

    def __init__(self, backing: MemoryStore) -> None:
        super().__init__(backing.url)
        self._backing = backing
        self._go = threading.Semaphore(0)
        self._stands = threading.Semaphore(0)
        self._fault: Fault = "none"
        self.must_crash = False
        self.thread: threading.Thread | None = None

    def stand(self) -> None:
        """The driver stops here until it is stepped."""
        self._stands.release()
        self._go.acquire()
        if self.must_crash:
            raise Crash

    def step(self, fault: Fault) -> None:
        """Let the driver go on to where it stands next."""
        self._fault = fault
        self._go.release()
        self._stands.acquire()

    def wait_until_it_stands(self) -> None:
        self._stands.acquire()

    def ended(self) -> None:
        self._stands.release()

    def _call(self, action: Callable[[], T], *, is_write: bool = False) -> T:
        if threading.current_thread() is not self.thread:  # a replay reads with helpers
            return action()
        self.stand()
        fault = self._fault
        if fault == "refused":
            raise StoreUnavailable("refused")
        result = action()
        if fault == "lost":
            raise OutcomeUnknown("lost") if is_write else StoreUnavailable("lost")
        return result

    def get(self, key: str) -> bytes:
        return self._call(lambda: self._backing.get(key))

    def size(self, key: str) -> int | None:
        return self._call(lambda: self._backing.size(key))

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        return iter(self._call(lambda: list(self._backing.list(prefix, start_after=start_after))))

    def put(self, key: str, data: bytes) -> None:
        self._call(lambda: self._backing.put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._call(lambda: self._backing.put_if_absent(key, data), is_write=True)

    def delete(self, keys: Iterable[str]) -> None:
        self._call(lambda: self._backing.delete(keys))


class SteppedDriver:
    """Takes the job over, then commits and publishes what it is told, retrying as committer.py does."""

    def __init__(self, backing: MemoryStore) -> None:
        self.store = SteppedStore(backing)
        self.error: BaseException | None = None
        self.is_over = False
        self.is_idle = False
        self.acknowledged: set[str] = set()
        self._order: Callable[[HeldJob], object] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.store.thread = self._thread
        self._thread.start()
        self.store.wait_until_it_stands()

    def step(self, fault: Fault = "none") -> None:
        if not self.is_over:
            self.store.step(fault)

    def crash(self) -> None:
        if not self.is_over:
            self.store.must_crash = True
            self.store.step("none")
        self._thread.join()

    def order_commit(self, names: list[str], failures: list[str]) -> None:
        """Commit these successes and failures in one entry."""

        def commit(job: HeldJob) -> None:
            rows = [succeeded(name, epoch=job.epoch) for name in names] + [given_up(name) for name in failures]
            self._until_known(lambda: job.commit(rows))
            self.acknowledged |= {name for name in names if job.ledger.has_succeeded(f"{name}-0")}

        self._order = commit

    def order_publish(self) -> None:
        self._order = lambda job: self._until_known(job.publish)

    def _run(self) -> None:
        try:
            self._live()
        except (LeaseHeld, LeaseLost, Crash):
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.is_over = True
            self.store.ended()

    def _live(self) -> None:
        clock = ManualClock()
        replay = self._until_known(lambda: Replay(self.store, "night"))
        owner = Owner.current()
        job = self._until_known(lambda: take_job(self.store, replay, owner, clock=clock, ttl_s=6, takeover=True))
        while True:
            self.is_idle = True
            self.store.stand()
            self.is_idle = False
            order, self._order = self._order, None
            if order is not None:
                order(job)

    def _until_known(self, action: Callable[[], T]) -> T:
        while True:
            try:
                return action()
            except RETRY_THESE:
                continue
