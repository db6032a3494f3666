"""The job as a state machine, in a simulated cluster: every kind of trouble, and what it must not do to the others."""

from __future__ import annotations

from collections import Counter

import pytest

from jobs.limits import Limits
from jobs.shards import PlannedTask
from tests.fake_pool import Fate, World
from tests.render_rows import planned
from tests.simulate import Simulation, simulate
from workers.errors import CheckpointMismatch
from workers.task import RenderTask

LIMITS = Limits(num_actors=2, chunk_timeout_s=60, backoff_s=1)


def items(count: int, **more: int) -> list[PlannedTask]:
    return [planned(f"i{n:03d}", **more) for n in range(count)]


def run(world: World, count: int = 20, limits: Limits = LIMITS, **more: float) -> Simulation:
    return simulate(items(count), world, limits, **more)[0]


def on(name: str, fate: Fate, *, times: int = 1_000_000) -> World:
    """A world in which one item meets a fate, so many times."""
    met = Counter[str]()

    def decide(task: RenderTask, node_id: str) -> Fate:
        met[task.item_id] += task.item_id == name
        return fate if task.item_id == name and met[name] <= times else Fate()

    return World(fate=decide)


def test_every_task_succeeds_once_and_the_job_ends() -> None:
    out = run(World())
    assert len(out.succeeded) == 20
    assert out.finish is not None
    assert out.finish.exit_code == 0


def test_nothing_to_do_spawns_nobody() -> None:
    out, _, pool = simulate([], World(), LIMITS)
    assert out.finish is not None
    assert pool.num_alive == 0


def test_the_longest_task_goes_first() -> None:
    tasks = [planned("short", num_frames=10), planned("long", num_frames=1000), planned("middle", num_frames=100)]
    _, _, pool = simulate(tasks, World(), Limits(num_actors=1))
    assert [task_id for task_id, _ in pool.runs] == ["long-0", "middle-0", "short-0"]


def test_a_take_does_not_wait_behind_another_one_while_an_actor_still_loads() -> None:
    world = World(fate=lambda task, node: Fate(40.0), load=lambda index: 20.0 + 5.0 * index)
    assert run(world, count=2).makespan_s == pytest.approx(65.0, abs=1.0)


def test_an_actor_has_its_second_take_in_hand_before_the_first_one_ends() -> None:
    out = run(World(fate=lambda task, node: Fate(40.0)), stop_at_s=10.0)
    assert out.max_in_hand == 4


def test_tiny_tasks_travel_together_and_real_takes_alone() -> None:
    def shards(seconds: float) -> Counter[int]:
        out = run(World(fate=lambda task, node: Fate(seconds)), count=300)
        return Counter(Counter(command.attempt.shard for command in out.results.values()).values())

    assert max(shards(0.001)) > 16
    assert max(shards(0.001)) <= LIMITS.shard_tasks
    assert set(shards(30.0)) == {1}


def test_a_retryable_failure_is_tried_again_and_the_waste_is_in_the_row() -> None:
    out = run(on("i003", Fate(5.0, "fail"), times=2))
    row = out.results["i003-0"].attempt
    assert (row.number, row.wasted_gpu_s) == (3, 10.0)


def test_a_task_that_always_fails_is_given_up_after_its_attempts() -> None:
    out = run(on("i003", Fate(1.0, "fail", failure={"kind": "encoder"})))
    assert out.failed["i003-0"].kind == "encoder"
    assert out.failed["i003-0"].attempt.number == 3
    assert len(out.succeeded) == 19


def test_a_failure_that_another_try_cannot_help_is_final_at_once() -> None:
    out = run(on("i003", Fate(1.0, "fail", failure={"kind": "quality", "retryable": False})))
    assert out.failed["i003-0"].attempt.number == 1


def test_out_of_memory_goes_down_the_ladder_in_a_fresh_process() -> None:
    rungs = []

    def decide(task: RenderTask, node: str) -> Fate:
        if task.item_id != "i003":
            return Fate()
        rungs.append(task.ladder_rung)
        failure = {"kind": "oom", "fresh_process": True}
        return Fate(1.0, "fail", failure=failure) if task.ladder_rung < 2 else Fate()

    out = run(World(fate=decide))
    assert rungs == [0, 1, 2]
    assert out.num_killed == 2
    assert len(out.succeeded) == 20


def test_a_poisoned_prompt_dies_alone_and_takes_nobody_with_it() -> None:
    out, _, pool = simulate(items(40), on("i017", Fate(1.0, "die")), LIMITS)
    assert out.failed["i017-0"].kind == "actor_died"
    assert len(out.succeeded) == 39
    assert [count for task_id, count in pool.company if task_id == "i017-0"][-1] == 1
    assert len([task_id for task_id, _ in pool.runs if task_id == "i017-0"]) == LIMITS.kills + 1


def test_a_shard_of_tiny_tasks_with_poison_in_it_loses_only_the_poison() -> None:
    def decide(task: RenderTask, node: str) -> Fate:
        return Fate(0.01, "die") if task.item_id == "i150" else Fate(0.01)

    out = run(World(fate=decide), count=300)
    assert set(out.failed) == {"i150-0"}
    assert len(out.succeeded) == 299


def test_preemption_does_not_eat_the_retry_budget_but_has_its_own() -> None:
    out = run(on("i003", Fate(1.0, "die", cause="preempted"), times=10))
    assert out.results["i003-0"].attempt.preemptions == 10
    out = run(on("i003", Fate(1.0, "die", cause="node_lost")), limits=LIMITS.model_copy(update={"preemptions": 4}))
    assert out.failed["i003-0"].kind == "preempted_exhausted"
    assert len(out.succeeded) == 19


def test_a_hang_is_ended_and_the_task_tried_elsewhere() -> None:
    out = run(on("i003", Fate(end="hang"), times=1))
    assert len(out.succeeded) == 20
    assert out.num_killed == 1
    out = run(on("i003", Fate(end="hang")))
    assert out.failed["i003-0"].kind == "timeout"
    assert len(out.succeeded) == 19


def test_an_attempt_that_runs_too_long_is_ended_even_if_it_moves() -> None:
    limits = LIMITS.model_copy(update={"task_timeout_s": 50.0})
    out = run(on("i003", Fate(55.0)), limits=limits)
    assert out.failed["i003-0"].kind == "timeout"


def test_an_actor_that_does_not_come_up_is_ended_and_replaced() -> None:
    limits = LIMITS.model_copy(update={"load_timeout_s": 100.0})
    out = run(World(load=lambda index: 1e6 if index == 0 else 1.0), limits=limits)
    assert len(out.succeeded) == 20


def test_actors_that_wait_for_room_in_vain_do_not_stop_one_that_works() -> None:
    limits = LIMITS.model_copy(update={"load_timeout_s": 10.0})
    world = World(load=lambda index: 1.0 if index == 0 else 1e6, fate=lambda task, node_id: Fate(5.0))
    out = run(world, limits=limits)
    assert len(out.succeeded) == 20


def test_actors_that_never_load_stop_the_job_and_say_why() -> None:
    out = run(World(load=lambda index: RuntimeError("no weights")))
    assert out.finish is not None
    assert out.finish.exit_code == 1
    assert "no weights" in out.finish.reason


def test_a_load_error_that_a_user_must_mend_stops_at_once_with_two() -> None:
    out = run(World(load=lambda index: CheckpointMismatch("sha differs")))
    assert out.finish is not None
    assert (out.finish.exit_code, out.num_killed) == (2, 0)


@pytest.mark.parametrize(("kind", "code"), [("encoder", 1), ("upload", 75)])
def test_the_breaker_opens_when_the_first_items_fail_in_the_same_way(kind: str, code: int) -> None:
    limits = Limits(num_actors=2, backoff_s=0)
    out = run(World(fate=lambda task, node: Fate(1.0, "fail", failure={"kind": kind})), 500, limits)
    assert out.finish is not None
    assert out.finish.exit_code == code
    assert 8 <= len(out.failed) < 20


def test_the_breaker_opens_late_when_a_long_row_of_items_fails() -> None:
    failure = {"kind": "quality", "retryable": False}
    out = run(
        World(fate=lambda task, node: Fate(1.0, "fail" if task.item_id >= "i050" else "ok", failure=failure)), 500
    )
    assert out.finish is not None
    assert out.finish.exit_code == 1
    assert len(out.succeeded) == 50
    assert 20 <= len(out.failed) < 30


def test_mixed_failures_do_not_open_the_breaker() -> None:
    def decide(task: RenderTask, node: str) -> Fate:
        kinds = ["encoder", "quality", "nan"]
        return Fate(1.0, "fail", failure={"kind": kinds[int(task.item_id[1:]) % 3], "retryable": False})

    assert len(run(World(fate=decide), 60).failed) == 60


def test_a_bad_node_is_avoided_and_its_items_succeed_elsewhere() -> None:
    def decide(task: RenderTask, node: str) -> Fate:
        return Fate(0.1, "fail") if node == "bad" else Fate(10.0)

    world = World(fate=decide, node=lambda index: "bad" if index % 2 else f"good-{index}")
    out = run(world, 30)
    assert len(out.succeeded) == 30


@pytest.mark.parametrize("fresh_process", [False, True])
def test_a_bad_gpu_is_parked_and_its_machine_goes_on(fresh_process: bool) -> None:
    """With a fresh process after each failure, Ray gives the same GPU to the next actor."""
    num_bad = 0

    def decide(task: RenderTask, place: str) -> Fate:
        nonlocal num_bad
        num_bad += place == "big/gpu-1"
        failure = {"fresh_process": fresh_process}
        return Fate(0.1, "fail", failure=failure) if place == "big/gpu-1" else Fate(10.0)

    world = World(fate=decide, node=lambda index: "big", gpu=lambda index: f"gpu-{index if index < 4 else 1}")
    limits = Limits(num_actors=4, backoff_s=1)
    out = run(world, 60, limits)
    assert len(out.succeeded) == 60
    assert limits.node_failures <= num_bad <= limits.node_failures * limits.in_flight  # else dozens


def test_one_bad_gpu_of_all_there_are_is_not_avoided() -> None:
    world = on("i003", Fate(1.0, "fail"), times=2)
    world.node, world.gpu = (lambda index: "only"), (lambda index: "gpu-0")
    assert len(run(world).succeeded) == 20


def test_a_lone_node_is_never_avoided() -> None:
    world = on("i003", Fate(1.0, "fail"), times=2)
    world.node = lambda index: "only"
    assert len(run(world).succeeded) == 20


def test_gpu_seconds_by_cause_add_up_to_the_time_held() -> None:
    met = set[str]()

    def decide(task: RenderTask, node: str) -> Fate:
        number = int(task.item_id[1:])
        first = task.item_id not in met
        met.add(task.item_id)
        if number % 7 == 3 and first:
            return Fate(4.0, "die", cause="preempted")
        if number % 7 == 5 and first:
            return Fate(4.0, "fail")
        return Fate(10.0)

    out, state, _ = simulate(items(60), World(fate=decide), LIMITS)
    parts, held = state.account.seconds(0), state.account.held_s(0)
    assert sum(parts.values()) == pytest.approx(held, rel=0.01)
    assert parts["useful"] + parts["upload_wait"] == pytest.approx(600)
    assert parts["upload_wait"] == pytest.approx(60)
    assert parts["failed"] == pytest.approx(4.0 * 8)
    assert parts["redone"] == pytest.approx(4.0 * 9)
    assert parts["load"] >= 2
    assert len(out.succeeded) == 60


def test_a_stop_gives_nothing_more_out_and_ends_in_time() -> None:
    out = run(World(fate=lambda task, node: Fate(30.0)), stop_at_s=40.0)
    assert out.finish is not None
    assert out.finish.exit_code == 4
    assert out.makespan_s < 45
    assert len(out.settled) < 20


def test_a_stop_takes_back_what_waits_behind_a_running_take() -> None:
    """A lone actor may have a second take in hand; only the one that has begun is brought home."""
    limits = Limits(num_actors=1)
    world = World(fate=lambda task, node: Fate(30.0))
    out, _, pool = simulate(items(20), world, limits, stop_at_s=45.0, grace_s=100.0)
    assert pool.num_taken_back == 1
    assert [task_id for task_id, _ in pool.runs] == ["i000-0", "i001-0"]
    assert len(out.succeeded) == 2
    assert out.finish is not None
    assert out.finish.exit_code == 4


def test_a_stop_lets_a_take_that_is_nearly_done_finish() -> None:
    out = run(World(fate=lambda task, node: Fate(30.0)), stop_at_s=30.0)
    assert len(out.succeeded) >= 2


def test_memory_is_bounded_by_the_lookahead() -> None:
    limits = Limits(num_actors=2, lookahead=50)
    seen = 0

    def source():  # type: ignore[no-untyped-def]
        nonlocal seen
        for task in items(500):
            seen += 1
            yield task

    out, state, _ = simulate(source(), World(fate=lambda task, node: Fate(30.0)), limits, stop_at_s=100.0)
    assert seen <= 50 + len(out.succeeded) + 4
    assert len(state.open) <= 54
