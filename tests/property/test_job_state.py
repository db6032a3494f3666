"""The state machine in random worlds: whatever dies, hangs, fails or vanishes, every task is settled exactly once,
nothing is in two hands (tests/simulate.py looks after every turn), and the GPU-seconds add up.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.limits import Limits
from jobs.messages import Finish
from tests.fake_pool import Fate, World
from tests.render_rows import planned
from tests.simulate import simulate
from workers.task import RenderTask

SEEDS = st.integers(0, 2**32)
CAUSES = ("crashed", "out_of_memory", "preempted", "node_lost", "unavailable")
KINDS = ("oom", "nan", "encoder", "upload", "quality", "unknown")


def troubled_world(chance: random.Random, trouble: float) -> World:
    """Each attempt of each task meets a fate of its own, the same whenever it is asked."""
    seed = chance.random()

    def decide(task: RenderTask, node_id: str) -> Fate:
        dice = random.Random(f"{seed}/{task.task_id}/{task.attempt}")
        seconds = dice.uniform(0.01, 30)
        if dice.random() > trouble:
            return Fate(seconds)
        end = dice.choice(["fail", "die", "hang"])
        failure = {"kind": dice.choice(KINDS), "retryable": dice.random() < 0.7, "fresh_process": dice.random() < 0.3}
        return Fate(seconds, end, dice.choice(CAUSES), failure)  # type: ignore[arg-type]

    return World(
        fate=decide,
        load=lambda index: RuntimeError("no") if chance.random() < trouble / 4 else chance.uniform(0.1, 20),
        node=lambda index: f"node-{index % 3}",
        gpu=lambda index: f"gpu-{index % 2}" if seed < 0.5 else "",
    )


def random_limits(chance: random.Random) -> Limits:
    return Limits(
        num_actors=chance.randint(1, 6),
        in_flight=chance.randint(1, 3),
        lookahead=chance.choice([4, 30, 4096]),
        chunk_timeout_s=40.0,
        backoff_s=chance.choice([0.0, 1.0]),
        preemptions=chance.randint(0, 5),
        load_failures=50,
        first_failures=100,
        same_failures=100,
    )


@settings(max_examples=60)
@given(SEEDS, st.floats(0, 0.6), st.integers(0, 60))
def test_every_task_is_settled_once_in_any_world(seed: int, trouble: float, count: int) -> None:
    chance = random.Random(seed)
    tasks = [planned(f"i{n:03d}", num_frames=chance.randint(1, 900)) for n in range(count)]
    out, state, pool = simulate(tasks, troubled_world(chance, trouble), random_limits(chance), seed=seed)
    assert out.settled == {task.task_id for task in tasks}
    assert out.finish == Finish(0, "nothing is left to do")
    assert len(set(pool.runs)) == len(pool.runs), "an attempt was rendered twice"
    held = state.account.held_s(0)
    assert sum(state.account.seconds(0).values()) == pytest.approx(held, rel=0.01)
    assert all(seconds >= 0 for seconds in state.account.seconds(0).values())


@settings(max_examples=25)
@given(SEEDS, st.floats(0, 200))
def test_a_stop_at_any_moment_ends_in_time_and_settles_nothing_twice(seed: int, stop_at_s: float) -> None:
    chance = random.Random(seed)
    tasks = [planned(f"i{n:03d}", num_frames=chance.randint(1, 900)) for n in range(60)]
    out, _, _ = simulate(tasks, troubled_world(chance, 0.2), random_limits(chance), stop_at_s=stop_at_s)
    assert out.finish is not None
    assert out.finish.exit_code in (0, 4)
    assert out.finish.exit_code == 0 or out.makespan_s <= stop_at_s + 4.0
