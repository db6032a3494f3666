"""Why an actor is gone, judged from what Ray raises; and which nodes Ray is about to take away."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray import exceptions as ray_errors
from ray._private.state import state as ray_state

from cluster.errors import ActorError, ActorLoadFailed, ActorLost, ActorOutOfMemory
from cluster.pool import LossCause

ACTOR_IS_LOST = (
    ray_errors.RayActorError,
    ray_errors.WorkerCrashedError,
    ray_errors.LocalRayletDiedError,
    ray_errors.NodeDiedError,
    ray_errors.OutOfMemoryError,
    ray_errors.ActorUnschedulableError,
    ray_errors.RuntimeEnvSetupError,
    ray_errors.ObjectLostError,
)
"""Errors of a call after which the actor is not used again; its other calls' outcomes are unknown."""

OUT_OF_MEMORY_MARKS = ("NODE_OUT_OF_MEMORY", "running low on memory", "due to memory pressure", "OutOfMemory")


def is_loss(error: BaseException) -> bool:
    """Is the actor not to be used again? (What a worker itself raises, whatever its type, comes as RayTaskError.)"""
    return isinstance(error, ACTOR_IS_LOST) and not isinstance(error, ray_errors.RayTaskError)


def judge_loss(error: BaseException, node_id: str, was_draining: bool) -> LossCause:
    """The cause, as far as Ray tells. A node that Ray no longer counts explains more than the error's own text."""
    text = str(error)
    if _is_out_of_memory(error):
        return "out_of_memory"
    if getattr(error, "preempted", False):
        return "preempted"
    if node_id and node_id not in alive_nodes():
        return "preempted" if was_draining else "node_lost"
    if "node" in text and ("node died" in text or "node failure" in text or "node was terminated" in text):
        return "preempted" if was_draining else "node_lost"
    if isinstance(error, ray_errors.ActorUnavailableError):
        return "preempted" if was_draining else "unavailable"
    return "preempted" if was_draining else "crashed"


def load_error(error: BaseException) -> BaseException:
    """What ActorLoadFailure carries: the worker's own exception where there is one."""
    if isinstance(error, ray_errors.RayTaskError):
        return original(error)
    if _is_out_of_memory(error):
        return ActorOutOfMemory(first_lines(error))
    if isinstance(error, ray_errors.ActorUnschedulableError | ray_errors.RuntimeEnvSetupError):
        return ActorLoadFailed(first_lines(error))
    return error if isinstance(error, ActorError) else ActorLost(first_lines(error))


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, ray_errors.OutOfMemoryError) or any(mark in text for mark in OUT_OF_MEMORY_MARKS)


def original(error: ray_errors.RayTaskError) -> BaseException:
    """The exception that was raised in the actor, with Ray's rendering of its trace as a note."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    if cause is not error:
        cause.add_note(str(error))
    return cause


def first_lines(error: BaseException, num_chars: int = 2000) -> str:
    return f"{type(error).__name__}: {error}"[:num_chars]


def alive_nodes() -> frozenset[str]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return frozenset(node["NodeID"] for node in nodes if node["Alive"])


def draining_nodes() -> dict[str, float | None]:
    """Nodes that Ray will take away, with the seconds left where a deadline is known.

    Private to Ray: `ray._private.state` has this since 2.9 or so, and no public twin; a test drains a real node.
    """
    now_ms = time.time() * 1000
    return {
        node_id: max(0.0, (deadline_ms - now_ms) / 1000) if deadline_ms else None
        for node_id, deadline_ms in ray_state.get_draining_nodes().items()
    }
