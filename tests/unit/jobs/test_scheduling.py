"""Longest first, shards, and the empty slot at the tail: a mixed job ends within 5% of what is possible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.dispatch import Dispatcher
from jobs.limits import Limits
from jobs.scheduling import Backlog, CostModel, OpenTask, may_queue_behind, next_shard
from tests.makespan import measure
from tests.render_rows import planned


@pytest.mark.parametrize(("num_actors", "num_slow"), [(2, 0), (8, 0), (16, 0), (8, 2), (16, 3)])
def test_a_mixed_job_of_a_thousand_items_ends_within_five_percent_of_the_bound(num_actors: int, num_slow: int) -> None:
    spans = measure(1000, num_actors, seed=num_actors, num_slow=num_slow)
    assert spans.ours_s <= 1.05 * spans.bound_s
    assert spans.ours_s < spans.fifo_s


def test_at_the_tail_an_idle_actor_takes_over_what_waits_at_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stealing = measure(300, 8, seed=1, num_slow=2)
    assert stealing.num_taken_back > 0
    monkeypatch.setattr(Dispatcher, "calls_to_take_back", lambda *_: iter(()))
    waiting = measure(300, 8, seed=1, num_slow=2)
    assert waiting.num_taken_back == 0
    assert stealing.ours_s < 0.95 * waiting.ours_s


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 8), st.floats(1e-4, 10))
def test_shards_partition_the_backlog(lengths: list[int], num_actors: int, seconds_per_frame: float) -> None:
    backlog, model = Backlog(), CostModel()
    for n, length in enumerate(lengths):
        backlog.push(OpenTask(planned(f"i{n}", num_frames=length), 0.0))
    model.learn(100, 100 * seconds_per_frame)
    limits = Limits()
    seen = []
    while len(backlog):
        shard = next_shard(backlog, model, limits, num_actors)
        frames = sum(task.planned.num_frames for task in shard)
        assert len(shard) == 1 or model.predict(frames) <= limits.shard_target_s * 1.001
        assert len(shard) <= limits.shard_tasks
        seen += [task.planned.num_frames for task in shard]
    assert seen == sorted(lengths, reverse=True)
    assert backlog.num_frames == 0


def test_at_the_tail_nothing_waits_behind_a_running_take() -> None:
    backlog, model = Backlog(), CostModel()
    model.learn(100, 10.0)
    backlog.push(OpenTask(planned("last", num_frames=100), 0.0))
    assert not may_queue_behind(backlog, model, rest=30.0, num_actors=2)
    assert may_queue_behind(backlog, model, rest=30.0, num_actors=1)
    for n in range(50):
        backlog.push(OpenTask(planned(f"i{n}", num_frames=100), 0.0))
    assert may_queue_behind(backlog, model, rest=30.0, num_actors=2)


def test_before_any_take_was_seen_frames_are_compared_instead_of_seconds() -> None:
    backlog, model = Backlog(), CostModel()
    for n in range(5):
        backlog.push(OpenTask(planned(f"i{n}", num_frames=100), 0.0))
    assert may_queue_behind(backlog, model, rest=100.0, num_actors=3)
    assert not may_queue_behind(backlog, model, rest=101.0, num_actors=3)


def test_a_suspect_shares_its_call_with_nobody() -> None:
    backlog, model = Backlog(), CostModel()
    model.learn(100, 0.01)
    for n in range(200):
        task = OpenTask(planned(f"i{n:03d}", num_frames=10), 0.0)
        task.tries.kills = int(n == 100)
        backlog.push(task)
    shards = []
    while len(backlog):
        shards.append(next_shard(backlog, model, Limits(), 1))
    assert [len(shard) for shard in shards if any(task.tries.kills for task in shard)] == [1]
