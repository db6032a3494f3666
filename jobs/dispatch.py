"""Tasks that are in nobody's hands, and who gets which of them next. Pure.

Three queues: the backlog (longest first), the waiting room (between two tries) and isolation (suspects that run alone).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from jobs.fleet import Actor, Call
from jobs.limits import Limits
from jobs.scheduling import Backlog, CostModel, OpenTask, WaitingRoom, may_queue_behind, next_shard

WORTH_TAKING_BACK_S = 1.0
"""Predicted work of a call below which the question would take longer than what it saves."""


class Dispatcher:
    """Hands out tasks to actors that can take them."""

    def __init__(self, limits: Limits) -> None:
        self.model = CostModel()
        self._limits = limits
        self._backlog = Backlog()
        self._waiting = WaitingRoom()
        self._isolated: deque[OpenTask] = deque()

    def __len__(self) -> int:
        return len(self._backlog) + len(self._waiting) + len(self._isolated)

    @property
    def has_ready(self) -> bool:
        """Is there a task that could be given out at this moment?"""
        return bool(self._backlog) or bool(self._isolated)

    @property
    def next_try_at(self) -> float | None:
        """When the next waiting task is due."""
        return self._waiting.next_at

    def add(self, task: OpenTask, *, now: float, delay_s: float = 0.0) -> None:
        """Take a task in, to be tried after `delay_s`."""
        if delay_s > 0:
            self._waiting.add(task, now + delay_s)
        elif task.tries.kills >= self._limits.kills:
            self._isolated.append(task)
        else:
            self._backlog.push(task)

    def wake(self, now: float) -> None:
        """Tasks whose wait is over come back."""
        for task in self._waiting.take_due(now):
            self.add(task, now=now)

    def assignments(
        self, ready: list[Actor], now: float, *, num_loading: int = 0
    ) -> Iterator[tuple[Actor, list[OpenTask]]]:
        """Pairs of actor and shard; the caller puts each shard into the actor's hands before asking for the next.

        First every empty hand, then second calls behind running ones where nobody can lose by it: neither another
        actor nor one of the `num_loading` that are still to come.
        """
        yield from self._isolated_ones(ready)
        for depth in range(self._limits.in_flight):
            for actor in ready:
                if len(actor.calls) != depth or actor.is_reserved or not self._backlog:
                    continue
                if depth and not self._may_wait_at(actor, now, len(ready) + num_loading):
                    continue
                yield actor, next_shard(self._backlog, self.model, self._limits, len(ready))

    def calls_to_take_back(self, actors: list[Actor], now: float) -> Iterator[tuple[Actor, Call]]:
        """At the tail: calls that wait behind a running one while somebody else has nothing to do."""
        if self.has_ready:
            return
        num_idle = sum(1 for actor in actors if actor.can_take() and not actor.calls and not actor.is_reserved)
        num_idle -= sum(call.is_withdrawn for actor in actors for call in actor.calls.values())
        if num_idle <= 0:
            return
        for actor in sorted(actors, key=lambda actor: -actor.rest_s(now)):
            call = actor.waiting_call()
            if call is not None and self._is_worth_taking_back(call):
                yield actor, call
                num_idle -= 1
                if not num_idle:
                    return

    def _is_worth_taking_back(self, call: Call) -> bool:
        left_s = sum(self.model.predict(task.planned.num_frames) for task in call.tasks)
        return not self.model.is_known or left_s >= WORTH_TAKING_BACK_S

    def _may_wait_at(self, actor: Actor, now: float, num_actors: int) -> bool:
        rest = actor.rest_s(now) if self.model.is_known else self.model.weigh(actor.num_frames)
        return may_queue_behind(self._backlog, self.model, rest, num_actors)

    def _isolated_ones(self, ready: list[Actor]) -> Iterator[tuple[Actor, list[OpenTask]]]:
        """At most half of the actors at once serve suspects, so that these cannot take the whole fleet down."""
        num_reserved = sum(1 for actor in ready if actor.is_reserved)
        for actor in sorted(ready, key=lambda actor: len(actor.calls)):
            if num_reserved >= max(1, len(ready) // 2) or len(self._isolated) <= num_reserved:
                break
            if not actor.is_reserved:
                actor.is_reserved = True
                num_reserved += 1
        for actor in ready:
            if actor.is_reserved and not actor.calls:
                if self._isolated:
                    yield actor, [self._isolated.popleft()]
                else:
                    actor.is_reserved = False
