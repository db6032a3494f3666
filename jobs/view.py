"""What a driver shows of itself while it works: plain numbers for the display, the log line and the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.accounting import Cause
from jobs.fleet import Actor


@dataclass(frozen=True)
class ActorView:
    """One actor in one line."""

    actor_id: str
    node_id: str
    state: str
    task_id: str | None
    frames_done: int
    num_frames: int
    num_calls: int
    rss_bytes: int


@dataclass(frozen=True)
class JobView:
    """A job at one moment. Totals are those of the store; `frames` and `gpu_seconds` are of this run."""

    elapsed_s: float
    num_succeeded: int
    num_failed: int
    num_rejected: int
    num_running: int
    num_queued: int
    has_read_all: bool
    """Has the whole prompt list been read? Then queued + running is all that is left."""
    num_uncommitted: int
    num_preemptions: int
    """Actors lost in this run with their node, or taken away."""
    run_succeeded: int
    run_frames: int
    run_video_s: float
    gpu_seconds: dict[Cause, float]
    actors: tuple[ActorView, ...]
    note: str = ""
    """What else there is to say, such as that it is stopping."""


def actor_view(actor: Actor) -> ActorView:
    """How an actor is doing."""
    if actor.doom is not None:
        state = f"ending ({actor.doom})"
    elif actor.is_parked:
        state = "parked (bad GPU)"
    elif not actor.is_ready:
        state = "loading"
    elif actor.is_draining:
        state = "draining"
    else:
        state = "running" if actor.calls else "idle"
    progress = actor.progress if actor.calls else None
    return ActorView(
        actor_id=actor.actor_id,
        node_id=actor.node_id,
        state=state,
        task_id=actor.running_task(),
        frames_done=progress.frames_done if progress else 0,
        num_frames=progress.num_frames if progress else 0,
        num_calls=len(actor.calls),
        rss_bytes=actor.progress.rss_bytes if actor.progress else 0,
    )
