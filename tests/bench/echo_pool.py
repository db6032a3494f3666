"""A pool in the driver's own process that answers at once: for measuring the driver alone."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cluster.pool import ActorReady, CallDone, PoolEvent
from tests.bench.noop import NoOpActor
from workers.task import RenderTask


class EchoPool:
    """See Pool; no call ever fails."""

    def __init__(self) -> None:
        self._worker = NoOpActor(None)
        self._events: list[PoolEvent] = []
        self._num_spawned = 0

    def spawn(self, *, avoid_nodes: frozenset[str] = frozenset()) -> str:
        self._num_spawned += 1
        actor_id = f"actor-{self._num_spawned}"
        self._events.append(ActorReady(actor_id, self._worker.load(), "node", 0.0))
        return actor_id

    def submit(self, actor_id: str, call_id: str, payload: Sequence[RenderTask]) -> None:
        self._events.append(CallDone(actor_id, call_id, self._worker.run(payload)))

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        if not self._events:
            time.sleep(timeout_s)
        events, self._events = self._events, []
        return events

    def withdraw(self, actor_id: str, payload: object) -> None:
        pass

    def drain(self, actor_id: str) -> None:
        pass

    def kill(self, actor_id: str) -> None:
        pass

    def stop(self, grace_s: float) -> None:
        pass
