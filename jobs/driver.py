"""One run of one job, from the store's record to the closing records. The loop is in loop.py, decisions in state.py.

It needs neither command line nor spec: an iterator of tasks, a store, a pool and limits. Three threads: this one, the
commit thread (committer.py) and the lease's heartbeat (stopping.py).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterator

from cluster.object_store import ObjectStore
from cluster.pool import Pool
from jobs.commit import remove_success
from jobs.committer import Committer
from jobs.held_job import HeldJob, take_job
from jobs.lease import Clock, Owner, SystemClock
from jobs.limits import Limits
from jobs.loop import Loop
from jobs.messages import Finish
from jobs.outcome import JobInputs, Outcome, exit_code, id_of, is_closed, write_closing_records
from jobs.replay import Replay
from jobs.stopping import Heartbeat, StopSwitch
from jobs.view import JobView

__all__ = ["Driver", "JobInputs", "JobView", "Limits", "Outcome", "SystemClock"]

logger = logging.getLogger(__name__)

POOL_STOP_S = 5.0
SWITCH_S = 2e-4
"""How long the loop may keep the commit thread from going on after a call to the disk; Python's own 5 ms is longer
than a durable write."""


class Driver:
    """Renders what is missing of a job.

    Args:
        open_pool: Called at the first task that has to be rendered, never if there is none.
        takeover: Take the job from a living driver.
        stop: Asked whether to stop; signals count there while it runs.
        on_progress: Called from the loop about every `progress_interval_s`.
    """

    def __init__(
        self,
        inputs: JobInputs,
        store: ObjectStore,
        open_pool: Callable[[], Pool],
        limits: Limits,
        *,
        clock: Clock | None = None,
        takeover: bool = False,
        stop: StopSwitch | None = None,
        on_progress: Callable[[JobView], None] | None = None,
        progress_interval_s: float = 1.0,
    ) -> None:
        self.stop = stop or StopSwitch()
        self.epoch: int | None = None
        """Of the lease, once `run` has it; other threads may look."""
        self._inputs = inputs
        self._store = store
        self._open_pool = open_pool
        self._limits = limits
        self._clock = clock or SystemClock()
        self._takeover = takeover
        self._on_progress = on_progress
        self._progress_interval_s = progress_interval_s

    def run(self) -> Outcome:
        """Do what is left to do; returns at once, without a lease, if that is nothing.

        Raises:
            LeaseHeld, LeaseLost: Another driver has the job; nothing was written after it took over.
            StoreGone, StoreError, ClusterError: The ground is gone; a later run resumes.
        """
        replay = Replay(self._store, self._inputs.facts.job_id)
        source = iter(self._inputs.source)
        first = next((row for row in source if not replay.ledger.is_settled(id_of(row))), None)
        if first is None and is_closed(self._store, replay):
            code = exit_code(replay.ledger, self._inputs.allowed_failures)
            return Outcome(code, "nothing is left to do", replay.ledger.summary())
        with self.stop.on_signals(), _quick_thread_switches():
            job = take_job(
                self._store,
                replay,
                Owner.current(),
                clock=self._clock,
                ttl_s=self._limits.lease_ttl_s,
                takeover=self._takeover,
            )
            self.epoch = job.epoch
            committer = Committer(job, self._limits, self._clock)
            rows = itertools.chain([] if first is None else [first], source)
            loop = Loop(self._inputs, rows, job, committer, self._open_pool, self._clock)
            return self._run_held(job, committer, loop)

    def _run_held(self, job: HeldJob, committer: Committer, loop: Loop) -> Outcome:
        started_at, begun = self._now(), self._clock.monotonic()
        heartbeat = Heartbeat(job.lease, self._limits.lease_ttl_s)
        remove_success(self._store)
        heartbeat.start()
        committer.start()
        try:
            finish = self._turn_until_finish(loop, heartbeat)
            ended = self._clock.monotonic()
            committer.close()
            outcome = Outcome(
                exit_code=finish.exit_code or exit_code(job.ledger, self._inputs.allowed_failures),
                reason=finish.reason,
                counts=job.ledger.summary(),
                gpu_seconds=loop.state.account.seconds(ended),
                held_s=loop.state.account.held_s(ended),
                run_succeeded=loop.state.num_succeeded,
                elapsed_s=ended - begun,
                epoch=job.epoch,
                started_at=started_at,
                finished_at=self._now(),
            )
            job.lease.beat()  # who has been overtaken since must not write the closing records
            write_closing_records(self._store, self._inputs, outcome, job.num_parts)
            job.lease.release()
            return outcome
        except BaseException:
            committer.abandon()
            raise
        finally:
            heartbeat.stop()
            if loop.pool is not None:
                loop.pool.stop(POOL_STOP_S)

    def _turn_until_finish(self, loop: Loop, heartbeat: Heartbeat) -> Finish:
        shown_at = float("-inf")
        while True:
            if heartbeat.lost is not None:
                raise heartbeat.lost
            finish = loop.turn(self.stop)
            now = self._clock.monotonic()
            if self._on_progress is not None and (finish or now - shown_at >= self._progress_interval_s):
                self._on_progress(loop.view())
                shown_at = now
            if finish is not None:
                return finish

    def _now(self) -> str:
        return self._clock.utc_now().isoformat()


@contextlib.contextmanager
def _quick_thread_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
