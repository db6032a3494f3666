"""What the connected cluster offers in all, busy or not, as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ray

from cluster.pool import ActorResources


@dataclass(frozen=True)
class Capacity:
    """Sums over all nodes that are up now; an autoscaler may add more."""

    num_gpus: float
    num_cpus: float

    def fits(self, actor: ActorResources) -> int:
        """How many such actors find room, if nodes could be cut as one wishes; 0 when not even one does."""
        by_cpu = math.floor(self.num_cpus / actor.num_cpus + 1e-9) if actor.num_cpus else None
        by_gpu = math.floor(self.num_gpus / actor.num_gpus + 1e-9) if actor.num_gpus else None
        return min(count for count in (by_cpu, by_gpu, 10**6) if count is not None)


def capacity() -> Capacity:
    """Of the cluster that this process is connected to."""
    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return Capacity(num_gpus=float(total.get("GPU", 0.0)), num_cpus=float(total.get("CPU", 0.0)))
