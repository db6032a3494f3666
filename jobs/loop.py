"""The turn of the wheel: rows from the list and events from the pool go in, commands come out and are carried out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from cluster.pool import Pool, PoolEvent
from jobs.committer import Committer
from jobs.held_job import HeldJob
from jobs.lease import Clock
from jobs.messages import (
    ActorSpawned,
    Command,
    CommitFailure,
    CommitSuccess,
    Drain,
    Finish,
    Kill,
    LinesRejected,
    OwnEvent,
    RowsCommitted,
    SourceEnded,
    Spawn,
    StopRequested,
    Submit,
    TaskOffered,
    Withdraw,
)
from jobs.outcome import EXIT_STOPPED, JobInputs, SourceRow, id_of
from jobs.prompt_row import Rejected
from jobs.rows import failure_row, rejected_row, success_row
from jobs.state import JobState
from jobs.stopping import StopSwitch
from jobs.view import JobView, actor_view

logger = logging.getLogger(__name__)

PULL_AT_ONCE = 512  # tasks taken from the list per turn, so that the first ones start before all is read
PULL_S = 0.05  # and how long a turn may read: most rows of a resumed job are settled and passed over
POLL_S = 0.1  # how late a stop request or a wait that is over may be noticed
BUSY_POLL_S = 0.005  # while the loop waits for the commit thread, which cannot wake the pool's poll


class Loop:
    """One run of a held job.

    Args:
        source: Rows not yet looked at; settled ones are passed over here.
        open_pool: Called when the first task is there to render, never if there is none.
    """

    def __init__(
        self,
        inputs: JobInputs,
        source: Iterator[SourceRow],
        job: HeldJob,
        committer: Committer,
        open_pool: Callable[[], Pool],
        clock: Clock,
    ) -> None:
        self.state = JobState(committer.limits, epoch=job.epoch, seed=inputs.seed)
        self.pool: Pool | None = None
        self.run_frames = 0
        self._inputs = inputs
        self._source = source
        self._job = job
        self._committer = committer
        self._open_pool = open_pool
        self._clock = clock
        self._started = clock.monotonic()
        self._has_read_all = False
        self._stops_seen = 0
        self._video_s = 0.0

    def turn(self, stop: StopSwitch) -> Finish | None:
        """Once around: what the pool, the commit thread and the list have for us, then what follows from it.

        Raises:
            LeaseLost, StoreGone: From the commit thread.
        """
        events: list[PoolEvent | OwnEvent] = [*self._stop_events(stop)]
        if self.pool is not None:
            events += self.pool.poll(self._poll_s())
        elif self._committer.num_waiting:
            self._clock.sleep(BUSY_POLL_S)
        if done := self._committer.take_done():
            events.append(RowsCommitted(done))
        events += self._pull()
        return self._carry_out(self.state.handle(events, self._clock.monotonic()))

    def _stop_events(self, stop: StopSwitch) -> list[OwnEvent]:
        """The first request leaves takes in hand some time, a second one none."""
        if stop.num_requests == self._stops_seen:
            return []
        grace_s = 0.0 if self._stops_seen or stop.num_requests > 1 else self._committer.limits.stop_grace_s
        self._stops_seen = stop.num_requests
        self._committer.flush_soon()
        return [StopRequested(f"stopped by {stop.reason}", EXIT_STOPPED, grace_s)]

    def _poll_s(self) -> float:
        state = self.state
        if state.wanted_tasks() and not self._has_read_all:
            return 0.0
        if state.is_throttled or (self._committer.num_waiting and not state.num_running):
            return BUSY_POLL_S
        next_try_at = state.queue.next_try_at
        return POLL_S if next_try_at is None else min(POLL_S, max(0.0, next_try_at - self._clock.monotonic()))

    def _pull(self) -> list[OwnEvent]:
        """Rows from the list, as many as are wanted, but for no longer than a moment."""
        wanted = 0 if self._has_read_all else self.state.wanted_tasks()
        offered: list[OwnEvent] = []
        num_rejected = 0
        until = self._clock.monotonic() + PULL_S
        while len(offered) + num_rejected < min(wanted, PULL_AT_ONCE) and self._clock.monotonic() < until:
            row = next(self._source, None)
            if row is None:
                self._has_read_all = True
                offered.append(SourceEnded())
                break
            if self._job.ledger.is_settled(id_of(row)):
                continue
            if isinstance(row, Rejected):
                self._committer.submit(rejected_row(self._inputs.facts, row, self._job.epoch, self._now()))
                num_rejected += 1
            else:
                offered.append(TaskOffered(row, self._job.ledger.generation(row.task_id)))
        if num_rejected:
            offered.append(LinesRejected(num_rejected))
        return offered

    def _carry_out(self, commands: list[Command]) -> Finish | None:
        while commands:
            spawned: list[OwnEvent] = []
            for command in commands:
                if isinstance(command, Finish):
                    return command
                if isinstance(command, CommitSuccess | CommitFailure):
                    self._commit(command)
                else:
                    spawned += self._command_pool(command)
            commands = self.state.handle(spawned, self._clock.monotonic()) if spawned else []
        return None

    def _command_pool(self, command: Spawn | Submit | Withdraw | Drain | Kill) -> list[OwnEvent]:
        if self.pool is None:
            self.pool = self._open_pool()
        if isinstance(command, Submit):
            self.pool.submit(command.actor_id, command.call_id, list(command.tasks))
        elif isinstance(command, Spawn):
            return [ActorSpawned(self.pool.spawn(avoid_nodes=command.avoid_nodes))]
        elif isinstance(command, Withdraw):
            logger.info("taking back what has not begun", extra={"actor": command.actor_id, "tasks": command.attempts})
            self.pool.withdraw(command.actor_id, command.attempts)
        elif isinstance(command, Kill):
            logger.warning("ending actor", extra={"actor": command.actor_id, "why": command.reason})
            self.pool.kill(command.actor_id)
        else:
            self.pool.drain(command.actor_id)
        return []

    def _commit(self, command: CommitSuccess | CommitFailure) -> None:
        facts, now = self._inputs.facts, self._now()
        if isinstance(command, CommitSuccess):
            result = command.result
            self.run_frames += result.num_frames
            self._video_s += result.num_frames / result.fps
            self._committer.metrics.add(result, command.attempt.node_id)
            if self._inputs.on_result is not None:
                self._inputs.on_result(result, command.attempt.shard)
            self._committer.submit(success_row(facts, command.task, result, command.attempt, now))
            return
        logger.warning("task given up", extra=_facts(command) | {"kind": command.kind, "why": command.message})
        self._committer.submit(failure_row(facts, command.task, command.kind, command.message, command.attempt, now))

    def _now(self) -> str:
        return self._clock.utc_now().isoformat()

    def _note(self, now: float) -> str:
        left_s = self.state.stops_in_s(now)
        if left_s is None:
            return ""
        return f"stopping, at most {left_s:.0f} s for what is in hand; once more ends it now"

    def view(self) -> JobView:
        """How it stands."""
        now = self._clock.monotonic()
        ledger, state = self._job.ledger, self.state
        return JobView(
            elapsed_s=now - self._started,
            num_succeeded=ledger.num_succeeded,
            num_failed=ledger.num_failed,
            num_rejected=ledger.num_rejected,
            num_running=state.num_running,
            num_queued=len(state.queue),
            has_read_all=self._has_read_all,
            num_uncommitted=self._committer.num_waiting,
            num_preemptions=state.num_preemptions,
            run_succeeded=state.num_succeeded,
            run_frames=self.run_frames,
            run_video_s=self._video_s,
            gpu_seconds=state.account.seconds(now),
            actors=tuple(actor_view(actor) for actor in state.actors.values()),
            note=self._note(now),
        )


def _facts(command: CommitSuccess | CommitFailure) -> dict[str, object]:
    """What every log line about a task says."""
    task, attempt = command.task, command.attempt
    name = f"e{attempt.epoch}a{attempt.number}"
    return {"item": task.item_id, "task": task.task_id, "shard": attempt.shard, "attempt": name}
