"""The ground a driver stands on: a Ray cluster, connected only when there is work, and the pool of actors on it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from cluster.pool import ActorResources, Pool
from cluster.ray_pool import ActorPool, PoolSettings
from cluster.start import LocalSize, connect
from jobs.limits import Limits
from jobs.spec import JobSpec
from workers.actor import RenderActor
from workers.task import RenderSetup

HEARTBEAT_S = 2.0
"""How old the frame counts of a display may be; a question costs an actor next to nothing."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """Sums over all nodes of a cluster that are up now; an autoscaler may add more."""

    num_gpus: float
    num_cpus: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Room:
        """From Ray's names."""
        return cls(resources.get("GPU", 0.0), resources.get("CPU", 0.0))

    def fits(self, actor: ActorResources) -> int:
        """How many such actors find room, if nodes could be cut as one wishes; 0 when not even one does."""
        counts = [math.floor(self.num_cpus / actor.num_cpus + 1e-9)]
        if actor.num_gpus:
            counts.append(math.floor(self.num_gpus / actor.num_gpus + 1e-9))
        return min(counts)


@dataclass(frozen=True)
class Sizing:
    """How many actors, and what each reserves."""

    num_actors: int
    resources: ActorResources


class Ground:
    """Opened by `open_ground`; `open_pool` may be called once."""

    def __init__(self, spec: JobSpec, store_url: str, sizing: Sizing, stack: ExitStack, *, is_up: bool) -> None:
        self.limits = limits_of(spec, sizing.num_actors)
        self._spec = spec
        self._store_url = store_url
        self._sizing = sizing
        self._stack = stack
        self._is_up = is_up

    def open_pool(self) -> Pool:
        """The actors' pool.

        Raises:
            ClusterUnreachable: There is no cluster at the address.
        """
        if not self._is_up:
            _connect(self._spec, self._stack)
        spec = self._spec
        setup = RenderSetup(
            job_id=spec.job_id, config=spec.render, store_url=self._store_url, num_threads=spec.actors.threads
        )
        settings = PoolSettings(
            max_in_flight=spec.actors.in_flight,
            heartbeat_s=HEARTBEAT_S,
            load_timeout_s=spec.limits.load_timeout_s,
            log_facts={"job": spec.job_id},
        )
        return ActorPool(RenderActor, setup, self._sizing.resources, settings)


@contextmanager
def open_ground(spec: JobSpec, store_url: str, *, num_tasks: int, start_now: bool) -> Iterator[Ground]:
    """Connect (if `start_now`) and size the fleet; disconnect at the end.

    Args:
        spec: The job.
        store_url: Root of the job for the actors, absolute.
        num_tasks: No more actors than that are of use.
        start_now: Is there work? Else the cluster is connected only if it turns out that there is.
    Raises:
        ClusterUnreachable: There is no cluster at the address.
    """
    with ExitStack() as stack:
        found = _connect(spec, stack) if start_now else Room(0, 1)
        sizing = size_fleet(spec, found, num_tasks)
        if start_now and found.fits(sizing.resources) < sizing.num_actors:
            room = found.fits(sizing.resources)
            logger.warning("%d actors asked for, the cluster has room for %d now", sizing.num_actors, room)
        yield Ground(spec, store_url, sizing, stack, is_up=start_now)


def size_fleet(spec: JobSpec, found: Room, num_tasks: int) -> Sizing:
    """How many actors a job gets: what the spec says, else what the cluster has room for. Pure."""
    part = spec.actors
    gpus = part.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if found.num_gpus >= 1 else 0.0
    resources = ActorResources(num_gpus=gpus, num_cpus=part.cpus_per_actor)
    wanted = part.count if isinstance(part.count, int) else found.fits(resources)
    return Sizing(max(1, min(wanted, num_tasks)), resources)


def limits_of(spec: JobSpec, num_actors: int) -> Limits:
    """The driver's limits: the spec's, with the defaults of limits.py for what no user needs to set."""
    shared = {name: value for name, value in spec.limits.model_dump().items() if name in Limits.model_fields}
    return Limits(num_actors=num_actors, in_flight=spec.actors.in_flight, **shared)


def _connect(spec: JobSpec, stack: ExitStack) -> Room:
    count, part = spec.actors.count, spec.actors
    local = None
    if isinstance(count, int) and not part.gpus_per_actor:
        # A local cluster of ours gives every actor asked for a place, even on fewer cores.
        local = LocalSize(num_cpus=max(count * part.cpus_per_actor, float(os.cpu_count() or 1)))
    cluster = stack.enter_context(connect(spec.cluster.address, local=local))
    if not cluster.is_ours and "://" not in spec.out:
        logger.warning("out is a local path: every node of the cluster must see the same files under %s", spec.out)
    return Room.of(cluster.resources())
