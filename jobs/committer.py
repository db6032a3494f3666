"""The commit thread: rows in from the loop, journal entries and parts out, so that the loop never waits for the store.

Group commit: an entry takes what became ready while the last one was being written. The thread owns the `HeldJob`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from jobs.errors import JobError
from jobs.held_job import HeldJob
from jobs.journal import RETRY_THESE
from jobs.lease import Clock
from jobs.limits import Limits
from jobs.observer import ChunkMetricsWriter
from jobs.rows import Row

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.05, 5.0
ROWS_AT_ONCE = 64  # handed to the journal together, when every row gets an entry of its own
IDLE_POLL_S = 0.2  # how often it looks whether a flush is due while no row comes


class StoreGone(JobError):
    """The store did not answer for longer than the job's patience: what is not committed will be rendered again."""

    exit_code = 75


class Committer:
    """Runs from `start` to `close`; after an error it takes rows but commits none."""

    def __init__(self, job: HeldJob, limits: Limits, clock: Clock) -> None:
        self._job = job
        self.limits = limits
        self.metrics = ChunkMetricsWriter(job.lease.store, job.epoch)
        self._clock = clock
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._num_submitted = 0
        self._num_done = 0
        self._num_reported = 0
        self._flush_now = threading.Event()
        self._published_at = clock.monotonic()
        self.error: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def submit(self, row: Row) -> None:
        """Hand in a row; returns at once."""
        self._num_submitted += 1
        self._rows.put(row)

    @property
    def num_waiting(self) -> int:
        """Rows handed in and not yet true."""
        return self._num_submitted - self._num_done

    def take_done(self) -> int:
        """How many more rows are true (or dropped as no news) since the last call. Raises the thread's error."""
        if self.error is not None:
            raise self.error
        done = self._num_done - self._num_reported
        self._num_reported += done
        return done

    def flush_soon(self) -> None:
        """Publish parts with the next look instead of at the interval."""
        self._flush_now.set()

    def close(self) -> None:
        """Commit and publish everything, write the `end` entry, end the thread."""
        self._rows.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """End the thread without writing anything more than the call in hand."""
        self.error = self.error or JobError("abandoned")
        self._rows.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._commit_next():
                if self._is_flush_due():
                    self._persist(self._job.publish)
                    self.metrics.publish()
                    self._published_at = self._clock.monotonic()
            if self.error is None:
                self._persist(self._job.finish)
                self.metrics.publish()
        except Exception as error:  # the thread's outermost call: the loop raises it where it can act
            self.error = self.error or error

    def _commit_next(self) -> bool:
        """Commit what is there, waiting a little for the first row; False when it is time to close."""
        batch: list[Row] = []
        is_each = self.limits.max_rows_per_entry == 1
        most = ROWS_AT_ONCE if is_each else self.limits.max_rows_per_entry
        is_open = True
        try:
            row = self._rows.get(timeout=IDLE_POLL_S)
            while row is not None:
                batch.append(row)
                if len(batch) == most:
                    break
                row = self._rows.get_nowait()
            is_open = row is not None
        except queue.Empty:
            pass
        if self.error is not None:
            return False
        if batch:
            self._persist(lambda: self._job.commit_each(batch) if is_each else self._job.commit(batch))
            self._num_done += len(batch)
        return is_open

    def _is_flush_due(self) -> bool:
        num_rows = self._job.num_unpublished
        if num_rows == 0:
            return False
        late = self._clock.monotonic() - self._published_at >= self.limits.flush_interval_s
        if not (late or num_rows >= self.limits.part_rows or self._flush_now.is_set()):
            return False
        self._flush_now.clear()
        return True

    def _persist(self, action: Callable[[], object]) -> None:
        """Repeat an action until the store has answered or the patience ends; the action is the same each time."""
        begun, wait_s = self._clock.monotonic(), FIRST_RETRY_S
        while True:
            try:
                action()
            except RETRY_THESE as error:
                if self.error is not None or self._clock.monotonic() - begun > self.limits.store_patience_s:
                    raise StoreGone(
                        f"no answer from the store for {self.limits.store_patience_s:g} s: {error}"
                    ) from error
                logger.warning("store away, trying again", extra={"wait_s": wait_s, "why": str(error)})
                self._clock.sleep(wait_s)
                wait_s = min(2 * wait_s, LAST_RETRY_S)
            else:
                return
