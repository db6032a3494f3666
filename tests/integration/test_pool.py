"""ActorPool on a real Ray cluster of two nodes: whatever happens to an actor, each call ends in exactly one event."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from cluster.errors import ActorLoadFailed, ActorLost, ActorOutOfMemory
from cluster.pool import (
    ActorGone,
    ActorLoadFailure,
    ActorReady,
    ActorResources,
    CallDone,
    CallFailed,
    Heartbeat,
    NodeDraining,
    PoolEvent,
)
from cluster.ray_pool import ActorPool, PoolSettings
from tests.pool_workers import DyingWorker, EndlessLoader, ObedientWorker, UnloadableWorker
from tests.ray_cluster import add_node, ray_cluster

ONE_GPU = ActorResources(num_gpus=1, num_cpus=0.5)
HALF_GPU = ActorResources(num_gpus=0.5, num_cpus=0.5)
PATIENCE_S = 120.0
"""How long a machine with other things to do may take; no claim is about speed."""


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    with ray_cluster(2) as cluster:
        yield cluster


class Listener:
    """Drives a pool, keeps all its events, and knows which pid an actor has."""

    def __init__(self, pool: ActorPool) -> None:
        self.pool = pool
        self.events: list[PoolEvent] = []

    def until(self, is_true: Callable[[list[PoolEvent]], bool], timeout_s: float = PATIENCE_S) -> list[PoolEvent]:
        deadline = time.monotonic() + timeout_s
        while not is_true(self.events):
            assert time.monotonic() < deadline, f"not within {timeout_s} s; events: {self.events}"
            self.events += self.pool.poll(0.2)
        return self.events

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def ready(self, *actor_ids: str) -> None:
        self.until(lambda _: set(actor_ids) <= {event.actor_id for event in self.of(ActorReady)})

    def pid(self, actor_id: str) -> int:
        return int(next(event.info["pid"] for event in self.of(ActorReady) if event.actor_id == actor_id))

    def gone(self, actor_id: str) -> ActorGone:
        self.until(lambda _: any(event.actor_id == actor_id for event in self.of(ActorGone)))
        found = [event for event in self.of(ActorGone) if event.actor_id == actor_id]
        assert len(found) == 1
        return found[0]

    def ends_of_calls(self) -> Counter[str]:
        ends = Counter(event.call_id for event in self.events if isinstance(event, CallDone | CallFailed))
        for gone in self.of(ActorGone):
            ends.update(gone.call_ids)
        return ends


@pytest.fixture
def listen(two_nodes: Cluster, tmp_path: Path) -> Iterator[Callable[..., Listener]]:
    pools: list[ActorPool] = []

    def start(worker: type = ObedientWorker, resources: ActorResources = HALF_GPU, **settings: Any) -> Listener:
        pools.append(ActorPool(worker, tmp_path, resources, PoolSettings(**{"heartbeat_s": 0.2, **settings})))
        return Listener(pools[-1])

    yield start
    for pool in pools:
        pool.stop(0)


Start = Callable[..., Listener]


def test_calls_run_side_by_side_and_heartbeats_come_meanwhile(listen: Start, tmp_path: Path) -> None:
    ear = listen()
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("wait_for", "bell"))
    ear.pool.submit(actor, "b", ("wait_for", "bell"))
    ear.until(lambda _: [beat.progress for beat in ear.of(Heartbeat)].count(2) >= 2)  # both have begun, neither is done
    assert not ear.of(CallDone)
    (tmp_path / "bell").touch()
    ear.until(lambda _: len(ear.of(CallDone)) == 2)
    assert ear.ends_of_calls() == {"a": 1, "b": 1}


def test_a_call_can_be_asked_back_while_it_waits(listen: Start) -> None:
    ear = listen()
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("wait_for", "asked-back"))
    ear.pool.withdraw(actor, "asked-back")
    ear.until(lambda _: bool(ear.of(CallDone)))
    assert ear.ends_of_calls() == {"a": 1}


def test_actors_log_json_lines_with_the_pools_facts(listen: Start) -> None:
    ear = listen(log_facts={"job": "night"})
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("echo", 1))
    ear.until(lambda _: bool(ear.of(CallDone)))
    pid = ear.of(ActorReady)[0].info["pid"]
    (file,) = Path(os.environ["RAY_TMPDIR"]).glob(f"**/session_2*/logs/worker-*-{pid}.err")
    lines = [json.loads(line) for line in file.read_text().splitlines() if "told to echo" in line]
    assert [(line["job"], line["actor"], line["logger"]) for line in lines] == [("night", actor, "workers.obedient")]


def test_an_exception_in_run_is_a_failed_call_and_the_actor_lives_on(listen: Start) -> None:
    ear = listen()
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "bad", ("fail", "no such prompt"))
    ear.pool.submit(actor, "mimic", ("mimic", None))
    ear.until(lambda _: len(ear.of(CallFailed)) == 2)
    ear.pool.submit(actor, "good", ("echo", 7))
    ear.until(lambda _: bool(ear.of(CallDone)))
    error = next(event.error for event in ear.of(CallFailed) if event.call_id == "bad")
    assert type(error) is ValueError
    assert str(error) == "no such prompt"
    assert any("pool_workers.py" in note for note in error.__notes__)
    assert ear.of(CallDone)[0].value == 7
    assert not ear.of(ActorGone)


def test_kill_9_ends_all_open_calls_and_finished_ones_stay_finished(listen: Start) -> None:
    ear = listen(heartbeat_s=60)
    actor, other = ear.pool.spawn(), ear.pool.spawn()
    ear.ready(actor, other)
    ear.pool.submit(actor, "done", ("echo", 1))
    arrived, _ = ray.wait([ear.pool._actors[actor].calls["done"]], timeout=PATIENCE_S)
    assert arrived  # its result is here, but nobody has polled
    ear.pool.submit(actor, "open-1", ("sleep", 600))
    ear.pool.submit(actor, "open-2", ("sleep", 600))
    ear.pool.submit(other, "other", ("sleep", 1))
    os.kill(ear.pid(actor), signal.SIGKILL)
    gone = ear.gone(actor)
    assert gone.cause == "crashed"
    assert gone.call_ids == ("open-1", "open-2")
    ear.until(lambda _: len(ear.of(CallDone)) == 2)
    assert ear.ends_of_calls() == {"done": 1, "open-1": 1, "open-2": 1, "other": 1}
    with pytest.raises(ActorLost):
        ear.pool.submit(actor, "late", ("echo", 1))


def test_a_process_that_exits_in_run_is_gone(listen: Start) -> None:
    ear = listen()
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("exit", 3))
    assert ear.gone(actor).call_ids == ("a",)


def test_an_idle_actor_that_dies_is_noticed(listen: Start) -> None:
    ear = listen()
    actor = ear.pool.spawn()
    ear.ready(actor)
    os.kill(ear.pid(actor), signal.SIGKILL)
    assert ear.gone(actor).call_ids == ()


def test_a_hanging_run_shows_as_heartbeats_with_the_same_tick(listen: Start) -> None:
    """That it never counts as silence: tests/unit/cluster/test_ray_pool.py."""
    ear = listen(unresponsive_s=PATIENCE_S, heartbeat_s=0.05)
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("sleep", 600))
    ear.until(lambda _: len([beat for beat in ear.of(Heartbeat) if beat.progress == 1]) >= 15)
    assert {beat.progress for beat in ear.of(Heartbeat)[-14:]} == {1}
    assert not ear.of(ActorGone)


def test_a_stopped_process_is_killed_when_it_does_not_answer(listen: Start) -> None:
    ear = listen(unresponsive_s=5.0)
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("stop_process", None))
    gone = ear.gone(actor)
    assert (gone.cause, gone.call_ids) == ("unavailable", ("a",))
    wait_until_dead(ear.pid(actor))


def test_killing_reports_the_open_calls_once_and_hears_nothing_later(listen: Start) -> None:
    ear = listen()
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("sleep", 0.5))
    ear.pool.kill(actor)
    ear.pool.kill(actor)
    assert ear.gone(actor).cause == "killed"
    wait_until_dead(ear.pid(actor))
    time.sleep(0.7)
    ear.events += ear.pool.poll(0.3)
    assert ear.ends_of_calls() == {"a": 1}


def test_load_failures_carry_the_reason(listen: Start) -> None:
    expected = (
        (UnloadableWorker, RuntimeError, "weights are missing"),
        (DyingWorker, ActorLost, "died"),
        (EndlessLoader, ActorLoadFailed, "took over"),
    )
    ears = [listen(w, load_timeout_s=1.0 if w is EndlessLoader else PATIENCE_S) for w, _, _ in expected]
    actors = [ear.pool.spawn() for ear in ears]
    for ear, actor, (_, kind, text) in zip(ears, actors, expected, strict=True):
        ear.until(lambda _, ear=ear: bool(ear.of(ActorLoadFailure)))
        failure = ear.of(ActorLoadFailure)[0]
        assert failure.actor_id == actor
        assert isinstance(failure.error, kind)
        assert text in str(failure.error)
        assert not ear.of(ActorReady)


def test_drain_reaches_a_working_actor_and_stop_closes_it(listen: Start, tmp_path: Path) -> None:
    ear = listen()
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("was_drained", PATIENCE_S))
    ear.pool.drain(actor)
    ear.until(lambda _: bool(ear.of(CallDone)))
    assert ear.of(CallDone)[0].value is True
    ear.pool.stop(PATIENCE_S)
    assert (tmp_path / f"closed-{ear.pid(actor)}").exists()
    wait_until_dead(ear.pid(actor))


def test_stop_does_not_wait_for_a_hanging_worker(listen: Start) -> None:
    ear = listen()
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("stop_process", None))
    wait_until(lambda: state_of(ear.pid(actor)) == "T", "nobody stopped it")
    ear.pool.stop(1)  # which would never return if it waited for an answer
    wait_until_dead(ear.pid(actor))


def test_whole_gpus_are_given_to_one_actor_each(listen: Start) -> None:
    ear = listen(resources=ONE_GPU)
    ear.ready(ear.pool.spawn(), ear.pool.spawn())
    assert len({event.node_id for event in ear.of(ActorReady)}) == 2
    assert [event.info["gpus"] for event in ear.of(ActorReady)] == ["0", "0"]
    assert all(0 < event.load_s < PATIENCE_S for event in ear.of(ActorReady))


def test_avoided_nodes_get_no_actor(listen: Start) -> None:
    ear = listen(resources=ActorResources(num_gpus=0.1, num_cpus=0.1))
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    avoided = frozenset(nodes[1:])
    ear.ready(*(ear.pool.spawn(avoid_nodes=avoided) for _ in range(3)))
    assert {event.node_id for event in ear.of(ActorReady)} == {nodes[0]}


def test_waiting_takes_no_threads(listen: Start) -> None:
    before = set(threading.enumerate())
    ear = listen()
    ear.ready(ear.pool.spawn())
    for number in range(50):
        ear.pool.submit("actor-0", str(number), ("echo", number))
    ear.until(lambda _: len(ear.of(CallDone)) == 50)
    assert set(threading.enumerate()) <= before
    assert {event.call_id: event.value for event in ear.of(CallDone)} == {str(n): n for n in range(50)}


def test_a_removed_node_takes_its_actors_and_their_calls(two_nodes: Cluster, listen: Start) -> None:
    ear = listen(resources=ActorResources(num_gpus=2, num_cpus=0.1))
    node = add_node(two_nodes, gpus_per_node=2)
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("sleep", 600))
    two_nodes.remove_node(node, allow_graceful=False)
    gone = ear.gone(actor)
    assert gone.cause in ("node_lost", "unavailable")
    assert gone.call_ids == ("a",)
    wait_until_dead(ear.pid(actor))


def test_a_draining_node_is_announced_once(two_nodes: Cluster, listen: Start, tmp_path: Path) -> None:
    """Ray's private list of draining nodes, on the installed version, through the call of its own command."""
    ear = listen(resources=ActorResources(num_gpus=2, num_cpus=0.1), draining_check_s=0.2)
    node = add_node(two_nodes, gpus_per_node=2)
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("wait_for", "bell"))
    node_id = ear.of(ActorReady)[0].node_id
    drain_node(two_nodes.address, node_id, deadline_s=600)
    ear.until(lambda _: bool(ear.of(NodeDraining)))
    (tmp_path / "bell").touch()
    ear.until(lambda _: bool(ear.of(CallDone) or ear.of(ActorGone)))
    notice = ear.of(NodeDraining)
    assert [(event.node_id, event.actor_ids) for event in notice] == [(node_id, (actor,))]
    assert notice[0].deadline_s == pytest.approx(600, abs=PATIENCE_S)
    ear.pool.stop(0)
    two_nodes.remove_node(node, allow_graceful=False)


@pytest.mark.slow
@pytest.mark.alone
def test_the_zombie_of_a_killed_raylet_is_ended(two_nodes: Cluster, listen: Start, tmp_path: Path) -> None:
    """Ray notices after 13 s and leaves the process running; the pool, on the same machine, ends it."""
    ear = listen(resources=ActorResources(num_gpus=2, num_cpus=0.1))
    node = add_node(two_nodes, gpus_per_node=2)
    actor = ear.pool.spawn()
    ear.ready(actor)
    ear.pool.submit(actor, "a", ("write_for_ever", "trace"))
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    gone = ear.gone(actor)
    assert gone.cause in ("node_lost", "unavailable", "crashed")
    assert gone.call_ids == ("a",)
    wait_until_dead(ear.pid(actor))
    two_nodes.remove_node(node, allow_graceful=False)


@pytest.mark.slow
@pytest.mark.alone
def test_an_actor_killed_for_memory_is_told_apart(two_nodes: Cluster, listen: Start) -> None:
    """Ray's own memory monitor, made to believe that the node is full."""
    variables = {"RAY_memory_usage_threshold": "0.0001", "RAY_memory_monitor_refresh_ms": "250"}
    node = add_node(two_nodes, gpus_per_node=3, cpus_per_node=1, env_vars=variables)
    ear = listen(resources=ActorResources(num_gpus=3, num_cpus=0.1))
    actor = ear.pool.spawn()
    ear.until(lambda _: bool(ear.of(ActorGone) + ear.of(ActorLoadFailure)))
    failures = [event.error for event in ear.of(ActorLoadFailure)]
    causes = [event.cause for event in ear.of(ActorGone)]
    assert causes == ["out_of_memory"] or isinstance(failures[0], ActorOutOfMemory), (actor, causes, failures)
    two_nodes.remove_node(node, allow_graceful=False)


def drain_node(address: str, node_id: str, deadline_s: int) -> None:
    """What `ray drain-node` asks, whose process takes longer to come up than all else here."""
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = time.time_ns() // 1_000_000 + deadline_s * 1000
    is_accepted, why_not = GcsClient(address=address).drain_node(node_id, reason, "test", deadline_ms)
    assert is_accepted, why_not


def wait_until_dead(pid: int) -> None:
    wait_until(lambda: state_of(pid) in ("", "Z"), f"{pid} is still running")


def wait_until(is_true: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)


def state_of(pid: int) -> str:
    """The kernel's letter for a process, "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
