"""Runs the state machine against a FakePool in virtual time, with a perfect model beside it; no store, no threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from jobs.limits import Limits
from jobs.messages import (
    ActorSpawned,
    Command,
    CommitFailure,
    CommitSuccess,
    Drain,
    Finish,
    Kill,
    OwnEvent,
    RowsCommitted,
    SourceEnded,
    Spawn,
    StopRequested,
    Submit,
    TaskOffered,
    Withdraw,
)
from jobs.shards import PlannedTask
from jobs.state import JobState
from tests.fake_pool import FakePool, World
from tests.fakes import ManualClock

MAX_TURNS = 200_000


@dataclass
class Simulation:
    """What came out of a simulated job."""

    succeeded: Counter[str] = field(default_factory=Counter)
    failed: dict[str, CommitFailure] = field(default_factory=dict)
    results: dict[str, CommitSuccess] = field(default_factory=dict)
    finish: Finish | None = None
    makespan_s: float = 0.0
    num_killed: int = 0
    max_in_hand: int = 0

    @property
    def settled(self) -> set[str]:
        return set(self.succeeded) | set(self.failed)


def simulate(
    tasks: Iterable[PlannedTask],
    world: World,
    limits: Limits,
    *,
    seed: int = 1,
    stop_at_s: float | None = None,
    grace_s: float = 2.0,
) -> tuple[Simulation, JobState, FakePool]:
    """Run a job to its end and check on the way what must hold at every moment."""
    clock = ManualClock()
    pool = FakePool(clock, world)
    state = JobState(limits, epoch=1, seed=seed)
    source = iter(tasks)
    out, begun = Simulation(), clock.monotonic()
    own: list[OwnEvent] = []
    has_ended = False
    for _ in range(MAX_TURNS):
        while state.wanted_tasks() > sum(isinstance(event, TaskOffered) for event in own) and not has_ended:
            task = next(source, None)
            has_ended = task is None
            own.append(SourceEnded() if task is None else TaskOffered(task))
        if stop_at_s is not None and clock.monotonic() - begun >= stop_at_s:
            own.append(StopRequested("stopped by test", 4, grace_s))
            stop_at_s = None
        pending = state.handle([*pool.poll(0.0 if own else 1.0), *own], clock.monotonic())
        own = []
        while pending:
            more = [event for command in pending for event in _carry_out(command, pool, out)]
            _check(state, out, limits)
            if out.finish is not None:
                out.makespan_s = clock.monotonic() - begun
                return out, state, pool
            pending = state.handle(more, clock.monotonic()) if more else []
    raise AssertionError(f"no end after {MAX_TURNS} turns: {len(state.open)} tasks open")


def _carry_out(command: Command, pool: FakePool, out: Simulation) -> list[OwnEvent]:
    match command:
        case Spawn(avoid_nodes):
            return [ActorSpawned(pool.spawn(avoid_nodes=avoid_nodes))]
        case Submit(actor_id, call_id, tasks):
            pool.submit(actor_id, call_id, list(tasks))
        case Withdraw(actor_id, attempts):
            pool.withdraw(actor_id, attempts)
        case Kill(actor_id, _):
            out.num_killed += 1
            pool.kill(actor_id)
        case Drain(actor_id):
            pool.drain(actor_id)
        case CommitSuccess(task):
            out.succeeded[task.task_id] += 1
            out.results[task.task_id] = command
            return [RowsCommitted(1)]
        case CommitFailure(task):
            assert task.task_id not in out.failed
            out.failed[task.task_id] = command
            return [RowsCommitted(1)]
        case Finish():
            out.finish = command
    return []


def _check(state: JobState, out: Simulation, limits: Limits) -> None:
    """What must hold at every moment."""
    in_hand = [task.task_id for actor in state.actors.values() for task in actor.tasks()]
    assert len(in_hand) == len(set(in_hand)), "a task is in two hands"
    assert len(in_hand) + len(state.queue) == len(state.open) or state.is_finished
    assert not set(in_hand) & out.settled, "a settled task is in somebody's hand"
    assert all(len(actor.calls) <= limits.in_flight for actor in state.actors.values())
    assert all(count == 1 for count in out.succeeded.values())
    assert not set(out.succeeded) & set(out.failed)
    out.max_in_hand = max(out.max_in_hand, len(in_hand))
