"""A mixed job of a thousand takes, its lower bound, and first come first served as the baseline."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

from jobs.limits import Limits
from tests.fake_pool import Fate, World
from tests.render_rows import planned
from tests.simulate import simulate

SECONDS_PER_FRAME = 0.05
LOAD_S = 20.0
SLOW = 3.0


@dataclass(frozen=True)
class Makespans:
    """Seconds of one and the same job; the bound is no schedule but what none can beat."""

    bound_s: float
    ours_s: float
    fifo_s: float
    num_taken_back: int = 0
    """Calls that waited at a busy actor and went to one that was free."""


def measure(num_items: int, num_actors: int, seed: int, *, num_slow: int = 0) -> Makespans:
    """Takes of 3 to 200 seconds of video, in random order, each up to 10% slower or faster than its length says.

    `num_slow` of the actors need three times as long, and nobody has told the driver.
    """
    chance = random.Random(seed)
    lengths = [_length(chance) for _ in range(num_items)]
    seconds = [length * SECONDS_PER_FRAME * chance.uniform(0.9, 1.1) for length in lengths]
    tasks = [planned(f"i{n:05d}", num_frames=length) for n, length in enumerate(lengths)]
    slowness = [SLOW if index < num_slow else 1.0 for index in range(num_actors)]
    world = World(
        fate=lambda task, node: Fate(
            seconds[int(task.item_id[1:])] * slowness[int(node.removeprefix("node-")) % num_actors]
        ),
        load=lambda index: LOAD_S,
    )
    out, _, pool = simulate(tasks, world, Limits(num_actors=num_actors))
    assert len(out.succeeded) == num_items
    bound_s = LOAD_S + max(sum(seconds) / sum(1 / factor for factor in slowness), *seconds)
    return Makespans(bound_s, out.makespan_s, LOAD_S + fifo(seconds, slowness), pool.num_taken_back)


def fifo(seconds: list[float], slowness: list[float]) -> float:
    """Makespan if whoever is free takes the next task of the list."""
    free_at = [(0.0, index) for index in range(len(slowness))]
    for duration in seconds:
        at, index = heapq.heappop(free_at)
        heapq.heappush(free_at, (at + duration * slowness[index], index))
    return max(at for at, _ in free_at)


def _length(chance: random.Random) -> int:
    kind = chance.random()
    if kind < 0.6:
        return chance.randint(48, 160)
    return chance.randint(160, 800) if kind < 0.95 else chance.randint(800, 3200)
