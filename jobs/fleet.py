"""The actors as the state machine sees them: what is in hand, what moves, who is suspect after a loss. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.limits import Limits
from jobs.places import Place
from jobs.scheduling import OpenTask
from workers.task import ActorInfo, Progress

Doom = Literal["timeout", "fresh_process", "bad_node", "drained", "load_timeout"]


@dataclass(slots=True)
class Call:
    """A shard in hand at an actor."""

    call_id: str
    tasks: list[OpenTask]
    submitted_at: float
    predicted_s: float
    is_withdrawn: bool = False
    """It was asked back; what had begun by then is finished nevertheless."""

    def attempts(self, epoch: int) -> tuple[tuple[str, str], ...]:
        """Its tasks as the actor knows them."""
        return tuple((task.task_id, task.attempt(epoch).attempt) for task in self.tasks)


@dataclass(slots=True)
class Actor:
    """One actor, from spawn to loss."""

    actor_id: str
    spawned_at: float
    info: ActorInfo | None = None
    node_id: str = ""
    is_ready: bool = False
    is_draining: bool = False
    is_reserved: bool = False
    """It takes nothing more until it is empty; then a task runs alone on it."""
    is_parked: bool = False
    """It keeps its GPU, at which too much has failed, from everybody else, and gets no work itself."""
    doom: Doom | None = None
    culprit: str | None = None
    calls: dict[str, Call] = field(default_factory=dict)
    progress: Progress | None = None
    moved_at: float = 0.0
    """When it last gave a sign of progress, or work came in."""
    task_since: float = 0.0
    """Since when the task that runs now has been running."""

    @property
    def oldest(self) -> Call | None:
        return next(iter(self.calls.values()), None)

    def can_take(self) -> bool:
        """Is it up, and will it stay?"""
        return self.is_ready and not self.is_draining and not self.is_parked and self.doom is None

    @property
    def place(self) -> Place:
        return Place(self.node_id, "" if self.info is None else self.info.gpu_id)

    def tasks(self) -> Iterator[OpenTask]:
        for call in self.calls.values():
            yield from call.tasks

    @property
    def num_frames(self) -> int:
        """Of all tasks in hand, finished or not."""
        return sum(task.planned.num_frames for task in self.tasks())

    def add(self, call: Call, now: float) -> None:
        if not self.calls:
            self.moved_at = self.task_since = now
        self.calls[call.call_id] = call

    def end(self, call_id: str, now: float) -> Call | None:
        """Take a finished call out; None if it is not ours (its actor was lost before)."""
        if (oldest := self.oldest) is not None and oldest.call_id == call_id:  # else the one in hand goes on
            self.moved_at = self.task_since = now
        return self.calls.pop(call_id, None)

    def heard(self, progress: Any, now: float) -> None:
        """A heartbeat. Only a change counts: a hung actor may still answer."""
        before = self.progress
        if before is None or progress.running_task_id != before.running_task_id or progress.attempt != before.attempt:
            self.task_since = self.moved_at = now
        elif (progress.ticks, progress.frames_done) != (before.ticks, before.frames_done):
            self.moved_at = now
        self.progress = progress

    def rest_s(self, now: float) -> float:
        """Predicted seconds until its hands are empty; what runs late counts as a tenth to go."""
        oldest = self.oldest
        if oldest is None:
            return 0.0
        first_s = max(oldest.predicted_s - (now - oldest.submitted_at), 0.1 * oldest.predicted_s)
        return first_s + sum(call.predicted_s for call in self.calls.values() if call is not oldest)

    def waiting_call(self) -> Call | None:
        """The newest call that is not known to have begun and was not asked back yet."""
        running = self.running_task()
        for call in reversed(self.calls.values()):
            if call is not self.oldest and not call.is_withdrawn and all(t.task_id != running for t in call.tasks):
                return call
        return None

    def suspects(self) -> list[OpenTask]:
        """Tasks that may have been running: those of the oldest call, and of the call that it last spoke of."""
        running = self.progress.running_task_id if self.progress is not None else None
        oldest = self.oldest
        return [
            task
            for call in self.calls.values()
            if call is oldest or any(task.task_id == running for task in call.tasks)
            for task in call.tasks
        ]

    def running_task(self) -> str | None:
        """The task that holds the GPU as far as we know, else the first one in hand."""
        ids = {task.task_id for task in self.tasks()}
        if self.progress is not None and self.progress.running_task_id in ids:
            return self.progress.running_task_id
        return next((task.task_id for task in self.tasks()), None)

    def overdue(self, limits: Limits, now: float) -> str | None:
        """Why it should be ended now, or None."""
        if not self.is_ready:
            late = now - self.spawned_at > limits.load_timeout_s
            return f"not ready {limits.load_timeout_s:g} s after its start" if late else None
        if not self.calls:
            return None
        if now - self.moved_at > limits.chunk_timeout_s:
            return f"no progress for {limits.chunk_timeout_s:g} s"
        if now - self.task_since > limits.task_timeout_s:
            return f"a task runs longer than {limits.task_timeout_s:g} s"
        return None


def num_missing(actors: Iterable[Actor], num_wanted: int, num_queued: int) -> int:
    """How many more actors there is work for, at most `num_wanted` in all; a parked one holds its place."""
    staying = [actor for actor in actors if not actor.is_draining and actor.doom is None]
    num_taken = sum(1 for actor in staying if actor.calls or actor.is_parked)
    return min(num_wanted, num_taken + num_queued) - len(staying)
