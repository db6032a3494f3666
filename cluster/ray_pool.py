"""ActorPool: the Pool of Ray actors.

One thread drives it, it has none of its own: everything happens in `poll`, which waits on Ray, asks for heartbeats
and judges losses. Each call's reference stands in one table, `_watched`, and leaves it with exactly one event. An actor
that is lost, hangs or was killed is forgotten with all its references, so what a zombie still answers is never heard.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayTaskError

from cluster.errors import ActorLoadFailed, ActorLost
from cluster.loss import draining_nodes, first_lines, is_loss, judge_loss, load_error, original
from cluster.pool import (
    ActorGone,
    ActorLoadFailure,
    ActorReady,
    ActorResources,
    CallDone,
    CallFailed,
    Heartbeat,
    LossCause,
    NodeDraining,
    PoolEvent,
)
from cluster.worker_host import Loaded, ProcessIdentity, WorkerHost

log = logging.getLogger(__name__)

Errand = Literal["identify", "load", "run", "progress", "withdraw", "drain", "close"]


@dataclass(frozen=True)
class PoolSettings:
    """Patience of a pool.

    `unresponsive_s` counts from a question about progress that stays unanswered: the GIL held by a hanging kernel, a
    stopped process, a dead network. It does not judge whether progress is made; that is the driver's to see.
    """

    max_in_flight: int = 2
    heartbeat_s: float = 5.0
    unresponsive_s: float = 60.0
    load_timeout_s: float = 1800.0  # from the start of the process, not while it waits for a machine
    draining_check_s: float = 2.0
    log_facts: Mapping[str, str] = field(default_factory=dict)  # in every line that an actor logs


@dataclass
class _Actor:
    """What we know of one actor; mutable, of this module only."""

    actor_id: str
    handle: Any
    identity: ProcessIdentity | None = None
    process_up_at: float | None = None
    run: Any = None  # the remote method, once load() has returned
    calls: dict[str, Any] = field(default_factory=dict)  # call id -> reference, oldest first
    asked_at: float | None = None  # when the open question about progress was asked
    next_question_at: float = 0.0

    @property
    def is_ready(self) -> bool:
        return self.run is not None

    @property
    def node_id(self) -> str:
        return self.identity.node_id if self.identity else ""


@dataclass(frozen=True)
class _Watch:
    actor_id: str
    errand: Errand
    call_id: str = ""


class ActorPool:
    """Identical actors of `worker_class`, each made with `setup`; see Pool for the promises.

    Not for use from several threads. Needs a connected Ray (cluster/start.py).
    """

    def __init__(
        self,
        worker_class: type,
        setup: Any,
        resources: ActorResources | None = None,
        settings: PoolSettings | None = None,
    ) -> None:
        self.settings = settings or PoolSettings()
        self._resources = resources or ActorResources()
        self._worker_class = worker_class
        self._setup = setup
        groups = {"load": 1, "run": self.settings.max_in_flight, "control": 2}
        self._remote_class = ray.remote(concurrency_groups=groups)(WorkerHost)  # type: ignore[call-overload]
        self._actors: dict[str, _Actor] = {}
        self._watched: dict[Any, _Watch] = {}
        self._events: deque[PoolEvent] = deque()
        self._draining: dict[str, float | None] = {}
        self._next_draining_check_at = 0.0
        self._numbers = itertools.count()

    def spawn(self, *, avoid_nodes: frozenset[str] = frozenset()) -> str:
        actor_id = f"actor-{next(self._numbers)}"
        handle = self._remote_class.options(**self._options(avoid_nodes)).remote(
            self._worker_class, self._setup, {**self.settings.log_facts, "actor": actor_id}
        )
        self._actors[actor_id] = _Actor(actor_id, handle)
        self._send(actor_id, "identify", "control")
        self._send(actor_id, "load", "load")
        return actor_id

    def submit(self, actor_id: str, call_id: str, payload: Any) -> None:
        """See Pool.

        Raises:
            ActorLost: No such actor, or its loss has been reported already.
            ValueError: It is still loading, or `call_id` is open on it.
        """
        actor = self._actors.get(actor_id)
        if actor is None:
            raise ActorLost(f"{actor_id} is gone")
        if not actor.is_ready or call_id in actor.calls:
            raise ValueError(f"{actor_id}: cannot take {call_id}: it is loading, or the call is open already")
        reference = actor.run.remote(payload)
        actor.calls[call_id] = reference
        self._watched[reference] = _Watch(actor_id, "run", call_id)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        deadline = time.monotonic() + timeout_s
        while True:
            self._look_around()
            now = time.monotonic()
            if not self._events and now < deadline:
                self._settle(self._wait(min(deadline, self._next_duty_at(now)) - now))
            else:
                self._settle(self._wait(0.0))
            if self._events or time.monotonic() >= deadline:
                events = list(self._events)
                self._events.clear()
                return events

    def withdraw(self, actor_id: str, payload: Any) -> None:
        if actor_id in self._actors:
            self._send(actor_id, "withdraw", "control", payload)

    def drain(self, actor_id: str) -> None:
        if actor_id in self._actors:
            self._send(actor_id, "drain", "control")

    def kill(self, actor_id: str) -> None:
        actor = self._actors.get(actor_id)
        if actor is not None:
            self._collect_finished(actor)
            if actor_id in self._actors:
                self._report_gone(actor, "killed", "killed by the driver")

    def stop(self, grace_s: float) -> None:
        """See Pool; open calls are dropped without events."""
        deadline = time.monotonic() + grace_s
        closing = [actor.handle.close.options(concurrency_group="control").remote() for actor in self._ready()]
        if closing and grace_s > 0:
            ray.wait(closing, num_returns=len(closing), timeout=max(0.0, deadline - time.monotonic()))
        for actor in list(self._actors.values()):
            self._end_process(actor)
        self._actors.clear()
        self._watched.clear()
        self._events.clear()

    def _options(self, avoid_nodes: Iterable[str]) -> dict[str, Any]:
        wanted = self._resources
        labels = dict(wanted.labels)
        if avoided := sorted(avoid_nodes):
            labels["ray.io/node-id"] = f"!in({', '.join(avoided)})"
        options: dict[str, Any] = {
            "num_gpus": wanted.num_gpus,
            "num_cpus": wanted.num_cpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "enable_task_events": False,
        }
        if wanted.memory_bytes is not None:
            options["memory"] = wanted.memory_bytes
        if labels:
            options["label_selector"] = labels
        return options

    def _send(self, actor_id: str, errand: Errand, group: str, *arguments: Any) -> None:
        method = getattr(self._actors[actor_id].handle, errand)
        self._watched[method.options(concurrency_group=group).remote(*arguments)] = _Watch(actor_id, errand)

    def _ready(self) -> list[_Actor]:
        return [actor for actor in self._actors.values() if actor.is_ready]

    # ---- waiting

    def _wait(self, timeout_s: float) -> list[Any]:
        """References that have an outcome; waits up to `timeout_s` for the first."""
        references = list(self._watched)
        if not references:
            time.sleep(max(0.0, timeout_s))
            return []
        done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        if not done and timeout_s > 0:
            done, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
        return list(done)

    def _settle(self, references: list[Any]) -> None:
        """Turn outcomes into events; successes first, so that no result is lost with its actor."""
        failed: list[tuple[_Watch, BaseException]] = []
        for reference in references:
            watch = self._watched.pop(reference, None)
            if watch is None:
                continue
            try:
                value = ray.get(reference, timeout=60)
            except Exception as raised:
                failed.append((watch, raised))
            else:
                self._on_value(watch, value)
        for watch, error in failed:
            if watch.actor_id in self._actors:
                self._on_error(watch, error)

    def _on_value(self, watch: _Watch, value: Any) -> None:
        actor = self._actors[watch.actor_id]
        now = time.monotonic()
        if watch.errand == "run":
            del actor.calls[watch.call_id]
            self._events.append(CallDone(actor.actor_id, watch.call_id, value))
        elif watch.errand == "identify":
            actor.identity = value
            actor.process_up_at = now
        elif watch.errand == "load":
            loaded: Loaded = value
            actor.identity = loaded.identity
            actor.run = actor.handle.run.options(concurrency_group="run")
            actor.next_question_at = now + self.settings.heartbeat_s
            self._events.append(ActorReady(actor.actor_id, loaded.info, actor.node_id, loaded.load_s))
        elif watch.errand == "progress":
            actor.asked_at = None
            self._events.append(Heartbeat(actor.actor_id, value))

    def _on_error(self, watch: _Watch, error: BaseException) -> None:
        actor = self._actors[watch.actor_id]
        if is_loss(error):
            self._lose(actor, error)
        elif watch.errand == "load":
            self._fail_load(actor, load_error(error))
        elif watch.errand == "run":
            del actor.calls[watch.call_id]
            cause = original(error) if isinstance(error, RayTaskError) else error
            self._events.append(CallFailed(actor.actor_id, watch.call_id, cause))
        else:
            log.error("%s: %s() raised", actor.actor_id, watch.errand, exc_info=error)
            if watch.errand == "progress":
                actor.asked_at = None  # it answers; what it says is a defect of the worker, not of its process

    # ---- losing

    def _lose(self, actor: _Actor, error: BaseException) -> None:
        self._collect_finished(actor)
        if not actor.is_ready:
            self._fail_load(actor, load_error(error))
            return
        cause = judge_loss(error, actor.node_id, actor.node_id in self._draining)
        self._report_gone(actor, cause, first_lines(error))

    def _collect_finished(self, actor: _Actor) -> None:
        """Results that had arrived before the loss are results."""
        references = list(actor.calls.values())
        if not references:
            return
        done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in done:
            watch = self._watched.get(reference)
            if watch is None:
                continue
            try:
                value = ray.get(reference, timeout=60)
            except Exception:  # noqa: S112  an error is judged with the actor, or has been
                continue
            del self._watched[reference]
            self._on_value(watch, value)

    def _report_gone(self, actor: _Actor, cause: LossCause, detail: str) -> None:
        call_ids = tuple(actor.calls)
        self._forget(actor)
        self._events.append(ActorGone(actor.actor_id, cause, call_ids, actor.node_id, detail))

    def _fail_load(self, actor: _Actor, error: BaseException) -> None:
        self._forget(actor)
        self._events.append(ActorLoadFailure(actor.actor_id, error))

    def _forget(self, actor: _Actor) -> None:
        del self._actors[actor.actor_id]
        for reference in [ref for ref, watch in self._watched.items() if watch.actor_id == actor.actor_id]:
            del self._watched[reference]
        self._end_process(actor)

    def _end_process(self, actor: _Actor) -> None:
        """Twice, because Ray's own way needs a living raylet: a process that lost its raylet goes on working."""
        ray.kill(actor.handle, no_restart=True)
        if actor.identity is not None:
            actor.identity.kill_if_here()

    # ---- duties

    def _next_duty_at(self, now: float) -> float:
        times = [self._next_draining_check_at]
        for actor in self._actors.values():
            if actor.asked_at is not None:
                times.append(actor.asked_at + self.settings.unresponsive_s)
            elif actor.is_ready:
                times.append(actor.next_question_at)
            elif actor.process_up_at is not None:
                times.append(actor.process_up_at + self.settings.load_timeout_s)
        return max(now, min(times))

    def _look_around(self) -> None:
        """Ask for heartbeats that are due, end what does not answer, learn which nodes will go."""
        now = time.monotonic()
        if now >= self._next_draining_check_at:
            self._next_draining_check_at = now + self.settings.draining_check_s
            self._check_draining()
        for actor in list(self._actors.values()):
            if actor.asked_at is not None:
                if now - actor.asked_at >= self.settings.unresponsive_s:
                    self._on_silence(actor)
            elif actor.is_ready and now >= actor.next_question_at:
                actor.asked_at = now
                actor.next_question_at = now + self.settings.heartbeat_s
                self._send(actor.actor_id, "progress", "control")
            elif not actor.is_ready and now - (actor.process_up_at or now) >= self.settings.load_timeout_s:
                self._fail_load(actor, ActorLoadFailed(f"load() took over {self.settings.load_timeout_s:g} s"))

    def _on_silence(self, actor: _Actor) -> None:
        """The deadline for an answer has passed; but it counts only if the answer has not come meanwhile."""
        open_questions = [
            ref
            for ref, watch in self._watched.items()
            if watch.actor_id == actor.actor_id and watch.errand == "progress"
        ]
        self._settle(ray.wait(open_questions, timeout=0)[0])
        if actor.actor_id in self._actors and actor.asked_at is not None:
            self._collect_finished(actor)
            detail = f"progress() was not answered for {self.settings.unresponsive_s:g} s"
            self._report_gone(actor, "unavailable", detail)

    def _check_draining(self) -> None:
        draining = draining_nodes()
        for node_id, deadline_s in draining.items():
            if node_id not in self._draining:
                actor_ids = tuple(a.actor_id for a in self._actors.values() if a.node_id == node_id)
                self._events.append(NodeDraining(node_id, actor_ids, deadline_s))
        self._draining.update(draining)
