"""The job as a state machine: events in, commands out. No Ray, no clock, no I/O; time comes in as a number.

It owns every task between being offered and being settled, and every actor between spawn and loss. What to do after a
failure is decided in failures.py, what goes where next in scheduling.py, where the seconds went in accounting.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

from cluster.pool import (
    ActorGone,
    ActorLoadFailure,
    ActorReady,
    CallDone,
    CallFailed,
    Heartbeat,
    NodeDraining,
    PoolEvent,
)
from jobs.accounting import GpuAccount
from jobs.dispatch import Dispatcher
from jobs.failures import EXIT_BROKEN, PREEMPTED, CircuitBreaker, RetryPolicy, TryAgain, Verdict
from jobs.fleet import Actor, Call, Doom, num_missing
from jobs.limits import Limits
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
from jobs.places import Place, PlaceBlocklist
from jobs.scheduling import OpenTask
from workers.errors import RenderError
from workers.task import ActorInfo, Progress, RenderFailure, RenderResult

logger = logging.getLogger(__name__)

EXIT_USAGE = 2


class JobState:
    """One driver's view of a job from its first task to `Finish`.

    Invariants: a task is in exactly one place (the dispatcher, a call, or settled); every settled task has produced
    exactly one commit command; after `Finish` nothing comes out any more.
    """

    def __init__(self, limits: Limits, *, epoch: int, seed: int) -> None:
        self.limits = limits
        self.account = GpuAccount()
        self.actors: dict[str, Actor] = {}
        self.queue = Dispatcher(limits)
        self.open: dict[str, OpenTask] = {}
        self.num_succeeded = 0
        self.num_preemptions = 0
        self.breaker = CircuitBreaker(limits)
        self.is_finished = False
        self._policy = RetryPolicy(limits, seed)
        self._places = PlaceBlocklist(limits.node_failures)
        self._epoch = epoch
        self._num_spawning = 0
        self._num_shards = 0
        self._num_uncommitted = 0
        self._load_failures = 0
        self._source_ended = False
        self._stop: StopRequested | None = None
        self._stop_at = 0.0
        self._out: list[Command] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            TaskOffered: self._on_offered,
            SourceEnded: self._on_source_ended,
            ActorSpawned: self._on_spawned,
            LinesRejected: self._on_rejected,
            RowsCommitted: self._on_committed,
            StopRequested: self._on_stop,
            ActorReady: self._on_ready,
            ActorLoadFailure: self._on_load_failure,
            CallDone: self._on_done,
            CallFailed: self._on_call_failed,
            ActorGone: self._on_gone,
            Heartbeat: self._on_heartbeat,
            NodeDraining: self._on_draining,
        }

    def handle(self, events: Iterable[PoolEvent | OwnEvent], now: float) -> list[Command]:
        """Take in what has happened and say what to do. Also the tick: an empty list of events lets time pass."""
        for event in events:
            self._handlers[type(event)](event, now)
        if not self.is_finished:
            self._end_overdue(now)
            self._assign(now)
            self._finish_if_over(now)
        out, self._out = self._out, []
        return out

    def wanted_tasks(self) -> int:
        """How many more tasks should be offered now."""
        if self._stop is not None or self.is_finished or self.is_throttled:
            return 0
        return max(0, self.limits.lookahead - len(self.queue))

    @property
    def is_throttled(self) -> bool:
        """Are so many rows waiting to commit that nothing new is begun?"""
        return self._num_uncommitted > self.limits.max_uncommitted

    @property
    def num_running(self) -> int:
        """Tasks in hand at actors."""
        return len(self.open) - len(self.queue)

    def stops_in_s(self, now: float) -> float | None:
        """Seconds that takes in hand have left; None while nobody wants to stop."""
        return None if self._stop is None else max(0.0, self._stop_at - now)

    # -- tasks -----------------------------------------------------------------------------------------------------

    def _on_offered(self, event: TaskOffered, now: float) -> None:
        if event.task.task_id in self.open:
            logger.warning("task offered twice", extra={"task": event.task.task_id})
            return
        task = OpenTask(event.task, now, generation=event.generation)
        self.open[task.task_id] = task
        self.queue.add(task, now=now)

    def _on_source_ended(self, event: SourceEnded, now: float) -> None:
        self._source_ended = True

    def _on_rejected(self, event: LinesRejected, now: float) -> None:
        self._num_uncommitted += event.count

    def _on_committed(self, event: RowsCommitted, now: float) -> None:
        self._num_uncommitted -= event.count

    def _on_stop(self, event: StopRequested, now: float) -> None:
        if self._stop is None or now + event.grace_s < self._stop_at:
            self._stop, self._stop_at = event, now + event.grace_s
        for actor in self.actors.values():  # only what has begun may finish
            self._take_back_all(actor)

    def _settle(self, task: OpenTask, command: CommitSuccess | CommitFailure) -> None:
        del self.open[task.task_id]
        self._num_uncommitted += 1
        self._out.append(command)

    def _succeed(self, task: OpenTask, result: RenderResult, actor: Actor) -> None:
        self.num_succeeded += 1
        self.breaker.succeeded()
        self._places.succeeded(actor.place)
        self._settle(task, CommitSuccess(task.planned, result, task.facts(self._epoch, actor.node_id, actor.info)))

    def _follow(self, task: OpenTask, verdict: Verdict, actor: Actor, now: float) -> None:
        """Carry out what failures.py has decided for a task that is out of its call."""
        if isinstance(verdict, TryAgain):
            self.queue.add(task, now=now, delay_s=verdict.delay_s)
            return
        facts = task.facts(self._epoch, actor.node_id, actor.info)
        self._settle(task, CommitFailure(task.planned, verdict.kind, verdict.message, facts))
        broken = self.breaker.gave_up(verdict.kind, verdict.message)
        if broken is not None:
            self._on_stop(StopRequested(broken[1], broken[0], grace_s=0.0), now)

    # -- actors ----------------------------------------------------------------------------------------------------

    def _on_spawned(self, event: ActorSpawned, now: float) -> None:
        self._num_spawning -= 1
        self.actors[event.actor_id] = Actor(event.actor_id, now)
        self.account.spawned(event.actor_id, now)

    def _on_ready(self, event: ActorReady, now: float) -> None:
        actor = self.actors.get(event.actor_id)
        if actor is None:
            return
        actor.is_ready, actor.node_id = True, event.node_id
        actor.info = event.info if isinstance(event.info, ActorInfo) else None
        self._places.knows(actor.place)
        self.account.ready(event.actor_id, now)
        actor.is_parked = actor.place in self._places.gpus
        if event.node_id in self._places.nodes:
            self._end(actor, "bad_node", "came up on a node that is avoided")
            self._count_load_failure(f"node {event.node_id} is avoided, and there is no other", now)
        else:
            self._load_failures = 0

    def _on_load_failure(self, event: ActorLoadFailure, now: float) -> None:
        if self.actors.pop(event.actor_id, None) is None:
            return
        self.account.gone(event.actor_id, now)
        error = event.error
        if isinstance(error, RenderError) and not error.retryable:
            self._on_stop(StopRequested(f"no actor can load: {error}", EXIT_USAGE, grace_s=0.0), now)
        else:
            self._count_load_failure(f"{type(error).__name__}: {error}", now)

    def _count_load_failure(self, why: str, now: float) -> None:
        self._load_failures += 1
        if self._load_failures >= self.limits.load_failures:
            reason = f"{self._load_failures} actors in a row did not come up; the last one: {why}"
            self._on_stop(StopRequested(reason, EXIT_BROKEN, grace_s=0.0), now)

    def _on_heartbeat(self, event: Heartbeat, now: float) -> None:
        actor = self.actors.get(event.actor_id)
        if actor is not None and isinstance(event.progress, Progress):
            actor.heard(event.progress, now)

    def _on_draining(self, event: NodeDraining, now: float) -> None:
        for actor in self.actors.values():
            if actor.node_id == event.node_id and not actor.is_draining:
                actor.is_draining = True
                self._out.append(Drain(actor.actor_id))
                if not actor.calls:
                    self._end(actor, "drained", "its node is going away")

    def _end(self, actor: Actor, doom: Doom, reason: str) -> None:
        if actor.doom is None:
            actor.doom = doom
            self._out.append(Kill(actor.actor_id, reason))

    def _end_overdue(self, now: float) -> None:
        for actor in self.actors.values():
            why = actor.overdue(self.limits, now) if actor.doom is None else None
            if why is not None:
                actor.culprit = actor.running_task()
                self._end(actor, "timeout" if actor.is_ready else "load_timeout", why)

    # -- results ---------------------------------------------------------------------------------------------------

    def _take_call(self, actor_id: str, call_id: str, now: float) -> tuple[Actor, Call] | None:
        actor = self.actors.get(actor_id)
        call = actor.end(call_id, now) if actor is not None else None
        if actor is None or call is None:
            return None
        if not (call.is_withdrawn and actor.calls):  # else the one in hand goes on
            self.account.call_ended(actor_id, now, has_more=bool(actor.calls))
        return actor, call

    def _on_done(self, event: CallDone, now: float) -> None:
        taken = self._take_call(event.actor_id, event.call_id, now)
        if taken is None:
            return
        actor, call = taken
        outcomes = {outcome.task_id: outcome for outcome in event.value}
        for task in call.tasks:
            outcome = outcomes.get(task.task_id)
            if isinstance(outcome, RenderResult):
                self.account.finished(actor.actor_id, outcome.gpu_s, outcome.upload_wait_s)
                self.queue.model.learn(task.planned.num_frames, outcome.gpu_s)
                self._succeed(task, outcome, actor)
            elif call.is_withdrawn and outcome is not None and outcome.kind == "preempted_exhausted":
                self.queue.add(task, now=now)  # it was asked back, and had not begun
            else:
                self._fail(task, outcome or task.no_outcome("the actor returned nothing for it"), actor, now)
        self._after_call(actor)

    def _on_call_failed(self, event: CallFailed, now: float) -> None:
        taken = self._take_call(event.actor_id, event.call_id, now)
        if taken is None:
            return
        actor, call = taken
        for task in call.tasks:
            why = f"{type(event.error).__name__}: {event.error}"
            self._fail(task, task.no_outcome(why, fresh_process=True), actor, now)
        self._after_call(actor)

    def _fail(self, task: OpenTask, failure: RenderFailure, actor: Actor, now: float) -> None:
        self.account.spent(actor.actor_id, "failed", failure.gpu_s)
        self._follow(task, self._policy.after_failure(task.task_id, task.tries, failure), actor, now)
        if failure.fresh_process:
            self._end(actor, "fresh_process", f"after {failure.kind}: {failure.message}")
        if (what := self._places.failed(actor.place, task.planned.item_id, failure.kind)) is not None:
            self._avoid(actor.place, what)

    def _avoid(self, place: Place, what: Literal["node", "gpu"]) -> None:
        logger.warning("%s avoided", what, extra=place._asdict())
        for other in self.actors.values():
            if what == "node" and other.node_id == place.node_id:
                self._end(other, "bad_node", "different items failed at its node")
            elif other.place == place:
                other.is_parked = True
                self._take_back_all(other)

    def _after_call(self, actor: Actor) -> None:
        if not actor.calls:
            actor.is_reserved = False
            if actor.is_draining:
                self._end(actor, "drained", "its node is going away")

    def _on_gone(self, event: ActorGone, now: float) -> None:
        actor = self.actors.pop(event.actor_id, None)
        if actor is None:
            return
        tasks = list(actor.tasks())
        self.num_preemptions += actor.doom is None and event.cause in PREEMPTED
        lost_s = self.account.gone(event.actor_id, now, "failed" if actor.doom == "timeout" else "redone")
        waited_for_room = actor.doom == "load_timeout" and any(other.can_take() for other in self.actors.values())
        came_to_nothing = actor.doom == "load_timeout" or event.cause not in PREEMPTED
        if (not actor.is_ready or not tasks) and came_to_nothing and not waited_for_room:
            self._count_load_failure(event.detail, now)
        suspects = {id(task) for task in actor.suspects()}
        for task in tasks:
            if id(task) in suspects:
                task.tries.wasted_s += lost_s / len(suspects)
            self._follow(task, self._judge(task, actor, event, id(task) in suspects), actor, now)

    def _judge(self, task: OpenTask, actor: Actor, event: ActorGone, is_suspect: bool) -> Verdict:
        """What follows for a task in hand at an actor that is gone."""
        if actor.doom == "timeout":
            if task.task_id != actor.culprit:
                return TryAgain(0.0)
            failure = task.no_outcome(f"ended: {event.detail}", kind="timeout")
            return self._policy.after_failure(task.task_id, task.tries, failure)
        if actor.doom is not None:  # we ended it for another reason
            return TryAgain(0.0)
        if event.cause in PREEMPTED:
            return self._policy.after_preemption(task.tries, event.detail)
        if not is_suspect:
            return TryAgain(0.0)
        memory = event.cause == "out_of_memory"
        return self._policy.after_kill(task.task_id, task.tries, out_of_memory=memory, detail=event.detail)

    # -- giving out work -------------------------------------------------------------------------------------------

    def _assign(self, now: float) -> None:
        self.queue.wake(now)
        if self._stop is not None:
            return
        self._spawn_missing()
        if self.is_throttled:
            return
        ready = [actor for actor in self.actors.values() if actor.can_take()]
        num_loading = self._num_spawning + sum(1 for a in self.actors.values() if not a.is_ready and a.doom is None)
        for actor, tasks in self.queue.assignments(ready, now, num_loading=num_loading):
            self._submit(actor, tasks, now)
        for actor, call in list(self.queue.calls_to_take_back(list(self.actors.values()), now)):
            self._take_back(actor, call)

    def _spawn_missing(self) -> None:
        for _ in range(num_missing(self.actors.values(), self.limits.num_actors, len(self.queue)) - self._num_spawning):
            self._num_spawning += 1
            self._out.append(Spawn(frozenset(self._places.nodes)))

    def _submit(self, actor: Actor, tasks: list[OpenTask], now: float) -> None:
        self._num_shards += 1
        for task in tasks:
            task.tries.number += 1
            task.shard, task.started_at = self._num_shards, now
        predicted_s = sum(self.queue.model.predict(task.planned.num_frames) for task in tasks)
        call_id = f"e{self._epoch}s{self._num_shards}"
        actor.add(Call(call_id, tasks, now, predicted_s), now)
        self.account.call_started(actor.actor_id, now)
        self._out.append(Submit(actor.actor_id, call_id, tuple(task.attempt(self._epoch) for task in tasks)))

    def _take_back_all(self, actor: Actor) -> None:
        while call := actor.waiting_call():
            self._take_back(actor, call)

    def _take_back(self, actor: Actor, call: Call) -> None:
        call.is_withdrawn = True
        self._out.append(Withdraw(actor.actor_id, call.attempts(self._epoch)))

    def _finish_if_over(self, now: float) -> None:
        if self._num_uncommitted:
            return
        if self._stop is not None:
            if self.num_running == 0 or now >= self._stop_at:
                self._finish(self._stop.exit_code, self._stop.reason, now)
        elif self._source_ended and not self.open:
            self._finish(0, "nothing is left to do", now)

    def _finish(self, exit_code: int, reason: str, now: float) -> None:
        self.is_finished = True
        for actor_id in self.actors:
            self.account.gone(actor_id, now)
        self.actors.clear()
        self._out.append(Finish(exit_code, reason))
