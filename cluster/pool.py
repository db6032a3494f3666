"""A pool of identical Ray actors: bounded submit, wait for any event, replace the dead, drain, stop.

Payloads are opaque. The actor class is a plain class with this shape (checked by duck typing):

    class Worker:
        def __init__(self, setup) -> None: ...     # cheap; runs in the actor's process
        def load(self) -> Any: ...                 # slow; its value comes back as ActorReady.info
        def run(self, payload) -> Any: ...         # up to `max_in_flight` calls at once, in their own threads
        def progress(self) -> Any: ...             # answered while run() works; comes back as Heartbeat.progress
        def withdraw(self, payload) -> None: ...   # give back what has not begun; its run() returns early
        def drain(self) -> None: ...               # finish the chunk in hand, take nothing new
        def close(self) -> None: ...               # release everything
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

LossCause = Literal["crashed", "out_of_memory", "preempted", "node_lost", "unavailable", "killed"]


@dataclass(frozen=True)
class ActorResources:
    """What one actor reserves on the cluster."""

    num_gpus: float = 0.0
    num_cpus: float = 1.0
    memory_bytes: int | None = None
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ActorReady:
    actor_id: str
    info: Any
    node_id: str
    load_s: float


@dataclass(frozen=True)
class ActorLoadFailure:
    """load() raised or the process died in it; the actor is gone."""

    actor_id: str
    error: BaseException


@dataclass(frozen=True)
class CallDone:
    actor_id: str
    call_id: str
    value: Any


@dataclass(frozen=True)
class CallFailed:
    """run() raised; the actor lives on."""

    actor_id: str
    call_id: str
    error: BaseException


@dataclass(frozen=True)
class ActorGone:
    """The actor's process is lost (or must be treated so); `call_ids` are its open calls, oldest first.

    Their outcome is unknown: a zombie process may still be writing under its own attempt's keys.
    """

    actor_id: str
    cause: LossCause
    call_ids: tuple[str, ...]
    node_id: str
    detail: str


@dataclass(frozen=True)
class Heartbeat:
    actor_id: str
    progress: Any


@dataclass(frozen=True)
class NodeDraining:
    """The cluster says that this node will vanish; `deadline_s` seconds from now if known."""

    node_id: str
    actor_ids: tuple[str, ...]
    deadline_s: float | None


PoolEvent = ActorReady | ActorLoadFailure | CallDone | CallFailed | ActorGone | Heartbeat | NodeDraining


class Pool(Protocol):
    """What the driver needs of a pool; `ActorPool` is the real one, tests have a fake one."""

    def spawn(self, *, avoid_nodes: frozenset[str] = frozenset()) -> str:
        """Ask for one more actor and its load(); returns its id at once; ActorReady or ActorLoadFailure follows."""
        ...

    def submit(self, actor_id: str, call_id: str, payload: Any) -> None:
        """Call run(payload) on it; CallDone, CallFailed or ActorGone follows exactly once."""
        ...

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Everything that has happened since the last poll; waits up to `timeout_s` for the first event."""
        ...

    def withdraw(self, actor_id: str, payload: Any) -> None:
        """Call withdraw(payload) on it without waiting."""
        ...

    def drain(self, actor_id: str) -> None:
        """Call drain() on it without waiting."""
        ...

    def kill(self, actor_id: str) -> None:
        """End the process now; ActorGone(cause="killed") follows with its open calls."""
        ...

    def stop(self, grace_s: float) -> None:
        """close() all actors, then end them; returns within `grace_s` plus a second."""
        ...
