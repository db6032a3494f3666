"""A mixed job of a thousand takes, its lower bound, and first come first served as the baseline."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

from jobs.limits import Limits
from jobs.shards import PlannedTask
from tests.fake_pool import Fate, World
from tests.render_rows import planned
from tests.simulate import simulate

SECONDS_PER_FRAME = 0.05
LOAD_S = 20.0


@dataclass(frozen=True)
class Makespans:
    """Seconds of one and the same job; the bound is no schedule but what none can beat."""

    bound_s: float
    ours_s: float
    fifo_s: float


def measure(num_items: int, num_actors: int, seed: int) -> Makespans:
    """Takes of 3 to 200 seconds of video, in random order, each up to 10% slower or faster than its length says."""
    chance = random.Random(seed)
    lengths = [_length(chance) for _ in range(num_items)]
    seconds = [length * SECONDS_PER_FRAME * chance.uniform(0.9, 1.1) for length in lengths]
    tasks = [planned(f"i{n:05d}", num_frames=length) for n, length in enumerate(lengths)]
    world = World(
        fate=lambda task, node: Fate(seconds[int(task.item_id[1:])]),
        load=lambda index: LOAD_S,
    )
    out, _, _ = simulate(tasks, world, Limits(num_actors=num_actors))
    assert len(out.succeeded) == num_items
    bound_s = LOAD_S + max(sum(seconds) / num_actors, *seconds)
    return Makespans(bound_s, out.makespan_s, LOAD_S + fifo(tasks, seconds, num_actors))


def fifo(tasks: list[PlannedTask], seconds: list[float], num_actors: int) -> float:
    """Makespan if whoever is free takes the next task of the list."""
    free_at = [0.0] * num_actors
    for _, duration in zip(tasks, seconds, strict=True):
        heapq.heappush(free_at, heapq.heappop(free_at) + duration)
    return max(free_at)


def _length(chance: random.Random) -> int:
    kind = chance.random()
    if kind < 0.6:
        return chance.randint(48, 160)
    return chance.randint(160, 800) if kind < 0.95 else chance.randint(800, 3200)
