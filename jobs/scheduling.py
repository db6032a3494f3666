"""Which tasks go to which actor next: predicted cost, longest first, shards of tiny tasks, an empty slot at the tail.

Pure. The next task goes to the actor that is free first (pull), so a fast actor takes more. A call is put behind a
running one only while the others surely have work until then: near the end a task never waits behind another one.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

from jobs.failures import Tries
from jobs.limits import Limits
from jobs.rows import AttemptFacts
from jobs.shards import PlannedTask
from workers.task import ActorInfo, FailureKind, RenderFailure, RenderTask

FORGETTING = 0.2  # weight of the newest take in the running mean of seconds per frame
PIECES_PER_ACTOR = 4  # a shard is at most a fourth of an actor's share of what is left, so shards shrink to the end


@dataclass(slots=True)
class OpenTask:
    """A task that is not settled, with what it has been through."""

    planned: PlannedTask
    offered_at: float
    tries: Tries = field(default_factory=Tries)
    generation: int = 0
    shard: int = 0
    started_at: float = 0.0

    @property
    def task_id(self) -> str:
        return self.planned.task_id

    def attempt(self, epoch: int) -> RenderTask:
        """What an actor is given for the try that `tries.number` counts."""
        tries = self.tries
        name = f"e{epoch}a{tries.number}"
        return self.planned.attempt(name, shard=self.shard, ladder_rung=tries.rung, full_precision=tries.full_precision)

    def no_outcome(self, why: str, *, kind: FailureKind = "unknown", fresh_process: bool = False) -> RenderFailure:
        """The failure of a task whose actor could not describe it."""
        return RenderFailure(
            task_id=self.task_id,
            attempt=f"e0a{self.tries.number}",
            kind=kind,
            message=why[:2048],
            retryable=True,
            fresh_process=fresh_process,
        )

    def facts(self, epoch: int, node_id: str, actor: ActorInfo | None) -> AttemptFacts:
        """What the row says of the attempt that decided it."""
        tries = self.tries
        return AttemptFacts(
            epoch=epoch,
            number=tries.number,
            shard=self.shard,
            preemptions=tries.preemptions,
            generation=self.generation,
            wasted_gpu_s=tries.wasted_s,
            queue_s=self.started_at - self.offered_at,
            node_id=node_id,
            actor=actor,
        )


class CostModel:
    """Predicted seconds of a task, from the frames asked for and the takes seen so far."""

    def __init__(self) -> None:
        self._seconds_per_frame: float | None = None

    @property
    def is_known(self) -> bool:
        return self._seconds_per_frame is not None

    def learn(self, num_frames: int, seconds: float) -> None:
        rate = seconds / num_frames
        known = self._seconds_per_frame
        self._seconds_per_frame = rate if known is None else known + FORGETTING * (rate - known)

    def predict(self, num_frames: int) -> float:
        """Seconds on a GPU; 0 before the first take has been seen."""
        return num_frames * (self._seconds_per_frame or 0.0)

    def weigh(self, num_frames: int) -> float:
        """What is good for comparisons at any time: seconds, or frames before the first take has been seen."""
        return num_frames * (self._seconds_per_frame or 1.0)


class Backlog:
    """Tasks ready to be given out, longest first, then in order of arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, OpenTask]] = []
        self._arrivals = itertools.count()
        self.num_frames = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, task: OpenTask) -> None:
        heapq.heappush(self._heap, (-task.planned.num_frames, next(self._arrivals), task))
        self.num_frames += task.planned.num_frames

    def peek(self) -> OpenTask | None:
        return self._heap[0][2] if self._heap else None

    def take_shard(self, max_tasks: int, max_frames: float) -> list[OpenTask]:
        """The longest task, and more while all together stay within the bounds; a suspect goes alone."""
        shard = [self._pop()] if self._heap else []
        num_frames = shard[0].planned.num_frames if shard else 0
        while self._heap and len(shard) < max_tasks and not shard[0].tries.is_suspect():
            head = self._heap[0][2]
            if head.tries.is_suspect() or num_frames + head.planned.num_frames > max_frames:
                break
            num_frames += head.planned.num_frames
            shard.append(self._pop())
        return shard

    def _pop(self) -> OpenTask:
        _, _, task = heapq.heappop(self._heap)
        self.num_frames -= task.planned.num_frames
        return task


class WaitingRoom:
    """Tasks between two tries, by the time at which they may run again."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, OpenTask]] = []
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, task: OpenTask, until: float) -> None:
        heapq.heappush(self._heap, (until, next(self._arrivals), task))

    def take_due(self, now: float) -> list[OpenTask]:
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        return due

    @property
    def next_at(self) -> float | None:
        return self._heap[0][0] if self._heap else None


def next_shard(backlog: Backlog, model: CostModel, limits: Limits, num_actors: int) -> list[OpenTask]:
    """The next call's tasks. Before any take has been seen a call is one task: its cost is unknown."""
    if not model.is_known:
        return backlog.take_shard(1, 0)
    left_s = model.predict(backlog.num_frames)
    target_s = min(limits.shard_target_s, left_s / (PIECES_PER_ACTOR * num_actors))
    frames_per_second = 1 / max(model.predict(1), 1e-9)
    return backlog.take_shard(limits.shard_tasks, target_s * frames_per_second)


def may_queue_behind(backlog: Backlog, model: CostModel, rest: float, num_actors: int) -> bool:
    """May the longest task wait behind what an actor has in hand?

    Yes if what else is left keeps every other actor busy until that task is done; a lone actor has nobody to lose to.

    Args:
        rest: What the actor has still to do before, as `model.weigh` counts.
        num_actors: All that will ask for tasks, those that still load included.
    """
    head = backlog.peek()
    if head is None:
        return False
    head_weight = model.weigh(head.planned.num_frames)
    left = model.weigh(backlog.num_frames) - head_weight
    return left >= (num_actors - 1) * (rest + head_weight)
