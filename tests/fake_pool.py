"""A pool in virtual time: actors that render by waiting, and die, hang, fail or vanish as a test's world says.

It behaves as the real one: one task at a time per actor, calls in order, exactly one end for every call.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.pool import ActorGone, ActorLoadFailure, ActorReady, CallDone, Heartbeat, LossCause, PoolEvent
from tests.fakes import ManualClock
from tests.render_rows import ACTOR, failure_of, result_of
from workers.task import Progress, RenderTask

DETAIL = "as the test wanted"


@dataclass(frozen=True)
class Fate:
    """What becomes of one attempt: it takes `seconds`, then this happens."""

    seconds: float = 1.0
    end: Literal["ok", "fail", "die", "hang"] = "ok"
    cause: LossCause = "crashed"
    failure: dict[str, Any] = field(default_factory=dict)


@dataclass
class World:
    """The rules of a simulated cluster; a test replaces what it needs."""

    fate: Callable[[RenderTask, str], Fate] = lambda task, place: Fate()
    """`place` is the node, and `node/gpu` where GPUs have names."""
    load: Callable[[int], float | BaseException] = lambda index: 1.0
    node: Callable[[int], str] = lambda index: f"node-{index}"
    gpu: Callable[[int], str] = lambda index: ""


@dataclass
class _FakeActor:
    actor_id: str
    node_id: str
    place: str
    calls: list[tuple[str, list[RenderTask]]] = field(default_factory=list)
    ticks: int = 0


class FakePool:
    """See the module. `poll` moves the clock to the next event; time passes nowhere else."""

    def __init__(self, clock: ManualClock, world: World) -> None:
        self._clock = clock
        self._world = world
        self._actors: dict[str, _FakeActor] = {}
        self._later: list[tuple[float, int, str, Callable[[], None]]] = []
        self._events: list[PoolEvent] = []
        self._order = itertools.count()
        self._num_spawned = 0
        self.num_taken_back = 0
        self.is_stopped = False
        self.runs: list[tuple[str, str]] = []
        """(task_id, attempt) in the order in which they began to render."""
        self.company: list[tuple[str, int]] = []
        """(task_id, tasks in hand at its actor when it began, itself included)."""

    @property
    def num_alive(self) -> int:
        return len(self._actors)

    def spawn(self, *, avoid_nodes: frozenset[str] = frozenset()) -> str:
        index = self._num_spawned
        self._num_spawned += 1
        node_id = next(n for n in (self._world.node(index + skip) for skip in range(100)) if n not in avoid_nodes)
        gpu_id = self._world.gpu(index)
        actor = _FakeActor(f"actor-{index}", node_id, f"{node_id}/{gpu_id}" if gpu_id else node_id)
        self._actors[actor.actor_id] = actor
        load = self._world.load(index)
        if isinstance(load, BaseException):
            self._at(0.5, actor.actor_id, lambda: self._load_failed(actor, load))
        else:
            info = ACTOR.model_copy(update={"node_id": node_id, "gpu_id": gpu_id})
            ready = ActorReady(actor.actor_id, info, node_id, load)
            self._at(load, actor.actor_id, lambda: self._events.append(ready))
        return actor.actor_id

    def submit(self, actor_id: str, call_id: str, payload: Sequence[RenderTask]) -> None:
        actor = self._actors.get(actor_id)
        if actor is None:  # it died before the driver heard of it; its end has been told, this call's has not
            self._events.append(ActorGone(actor_id, "crashed", (call_id,), "", DETAIL))
            return
        actor.calls.append((call_id, list(payload)))
        if len(actor.calls) == 1:
            self._run_first(actor)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        until = self._clock.monotonic() + timeout_s
        while not self._events and self._later and self._later[0][0] <= until:
            at, _, actor_id, action = heapq.heappop(self._later)
            self._clock.advance(max(0.0, at - self._clock.monotonic()))
            if actor_id in self._actors:
                action()
        if not self._events:
            self._clock.advance(until - self._clock.monotonic())
        events, self._events = self._events, []
        return events

    def withdraw(self, actor_id: str, payload: Sequence[tuple[str, str]]) -> None:
        actor = self._actors.get(actor_id)
        for call_id, tasks in [] if actor is None else actor.calls[1:]:
            if {(task.task_id, task.attempt) for task in tasks} <= set(payload):
                assert actor is not None
                actor.calls = [call for call in actor.calls if call[0] != call_id]
                back = [failure_of(task, kind="preempted_exhausted", message="taken back") for task in tasks]
                self._events.append(CallDone(actor_id, call_id, back))
                self.num_taken_back += 1

    def drain(self, actor_id: str) -> None:
        pass

    def kill(self, actor_id: str) -> None:
        if actor_id in self._actors:
            self._lose(self._actors[actor_id], "killed")

    def stop(self, grace_s: float) -> None:
        self._actors.clear()
        self.is_stopped = True

    def _at(self, delay_s: float, actor_id: str, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (self._clock.monotonic() + delay_s, next(self._order), actor_id, action))

    def _run_first(self, actor: _FakeActor) -> None:
        call_id, tasks = actor.calls[0]
        self._run_task(actor, call_id, tasks, 0, [])

    def _run_task(self, actor: _FakeActor, call_id: str, tasks: list[RenderTask], index: int, done: list[Any]) -> None:
        if index == len(tasks):
            actor.calls.pop(0)
            self._events.append(CallDone(actor.actor_id, call_id, done))
            if actor.calls:
                self._run_first(actor)
            return
        task = tasks[index]
        self.runs.append((task.task_id, task.attempt))
        self.company.append((task.task_id, sum(len(call) for _, call in actor.calls)))
        actor.ticks += 1
        progress = Progress(running_task_id=task.task_id, attempt=task.attempt, ticks=actor.ticks)
        self._events.append(Heartbeat(actor.actor_id, progress))
        fate = self._world.fate(task, actor.place)
        if fate.end == "hang":
            return
        self._at(fate.seconds, actor.actor_id, lambda: self._end_task(actor, call_id, tasks, index, done, fate))

    def _end_task(
        self, actor: _FakeActor, call_id: str, tasks: list[RenderTask], index: int, done: list[Any], fate: Fate
    ) -> None:
        if fate.end == "die":
            self._lose(actor, fate.cause)
            return
        task = tasks[index]
        if fate.end == "ok":
            done.append(result_of(task, gpu_s=fate.seconds, wall_s=fate.seconds, upload_wait_s=0.1 * fate.seconds))
        else:
            done.append(failure_of(task, gpu_s=fate.seconds, **fate.failure))
        self._run_task(actor, call_id, tasks, index + 1, done)

    def _load_failed(self, actor: _FakeActor, error: BaseException) -> None:
        del self._actors[actor.actor_id]
        self._events.append(ActorLoadFailure(actor.actor_id, error))

    def _lose(self, actor: _FakeActor, cause: LossCause) -> None:
        del self._actors[actor.actor_id]
        calls = tuple(call_id for call_id, _ in actor.calls)
        self._events.append(ActorGone(actor.actor_id, cause, calls, actor.node_id, DETAIL))
