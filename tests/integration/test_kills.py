"""kill -9 at random moments, and two drivers at once: every item exactly once, every video whole, nothing left over.

Real drivers, real actors, real videos. A seed decides what is struck and when; a reader watches every run
(tests/killed_jobs.py). Most runs share one Ray cluster of several nodes, because a new Ray costs 6 to 10 s.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from ray.cluster_utils import Cluster

from cluster.object_store import ObjectStore, open_store
from jobs.journal import read_entries
from jobs.lease import last_epoch
from tests.killed_jobs import (
    NUM_ITEMS,
    KilledJob,
    Watcher,
    actors_of,
    check_account,
    undisturbed,
)
from tests.processes import children_of, end, is_alive, title_of
from tests.ray_cluster import add_node, ray_cluster

pytestmark = [pytest.mark.alone, pytest.mark.timeout(2400)]
PATIENCE_S = 600.0
NUM_TRIES = 4
RAY_SLOTS = 2  # CPUs of a node
ONE_A_NODE = ("--actors-cpus-per-actor", "1.5")
Target = Literal["actor", "driver"]
RAY_FOLDER = re.compile(r"/tmp/lt-\w+")
MANY_A_NODE = ("--actors-cpus-per-actor", "0.5")  # so that a new driver need not wait for the actors of a dead one


@dataclass
class Ground:
    """The cluster on which drivers run, and its worker nodes."""

    cluster: Cluster
    nodes: list[Any]

    @property
    def raylets(self) -> list[int]:
        return [raylet_of(node) for node in self.nodes]

    def replace(self, node: Any) -> None:
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(add_node(self.cluster, cpus_per_node=RAY_SLOTS))

    def wait_for_quiet(self) -> None:
        """Actors of dead drivers are ended by Ray; until then they go on writing."""
        until(lambda: not actors_of(self.raylets))


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))  # scratch folders of killed actors
        patch.setenv("RAY_health_check_period_ms", "1000")  # a dead raylet is noticed after 5 s, not 13
        with ray_cluster(2, cpus_per_node=RAY_SLOTS) as cluster:
            yield Ground(cluster, [node for node in cluster.list_all_nodes() if node is not cluster.head_node])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return undisturbed(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def watcher(tmp_path: Path) -> Iterator[Watcher]:
    with Watcher(tmp_path / "night") as watcher:
        yield watcher


def until(is_true: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)


def until_videos(watcher: Watcher, driver: subprocess.Popen[bytes], count: int) -> None:
    until(lambda: watcher.num_committed >= count or driver.poll() is not None)


@dataclass(frozen=True)
class Strike:
    """What is killed, and how long after so many videos are committed."""

    after_videos: int
    delay_s: float
    target: Target


def plan_strikes(rng: random.Random) -> list[Strike]:
    """Two or three; one at least hits a driver, so that no driver sees more than two of its actors die."""
    targets: list[Target] = ["driver", *rng.choices(("actor", "driver"), k=rng.randint(1, 2))]
    rng.shuffle(targets)
    moments = sorted(rng.randint(0, NUM_ITEMS - 3) for _ in targets)
    delays = [rng.uniform(0, 0.4 if moment else 6) for moment in moments]
    return [Strike(*strike) for strike in zip(moments, delays, targets, strict=True)]


def kill_an_actor(raylets: list[int], driver: subprocess.Popen[bytes], rng: random.Random) -> bool:
    """One that is inside `run`, as soon as there is one."""
    until(lambda: bool(actors_of(raylets, doing=".run")) or driver.poll() is not None)
    actors = actors_of(raylets, doing=".run")
    if not actors:
        return False
    try:
        rng.choice(actors).kill()
    except psutil.NoSuchProcess:  # its driver has ended since, and it with it
        return False
    return True


def kill_driver(job: KilledJob, driver: subprocess.Popen[bytes]) -> bool:
    """Was it still there? Else it has ended well."""
    driver.kill()
    was_there = driver.wait() != 0
    job.finish(driver, -signal.SIGKILL if was_there else 0)
    return was_there


def carry_out(strikes: list[Strike], job: KilledJob, ground: Ground, watcher: Watcher, rng: random.Random) -> int:
    """Start the job, strike, start again what was killed, to the end; returns how many strikes met something."""
    num_met = 0
    driver = job.start()
    for strike in strikes:
        until_videos(watcher, driver, strike.after_videos)
        time.sleep(strike.delay_s)
        if strike.target == "actor":
            num_met += kill_an_actor(ground.raylets, driver, rng)
        elif kill_driver(job, driver):
            driver = job.start()
            num_met += 1
    job.finish(driver)
    return num_met


def strike_a_job(
    strikes: list[Strike], ground: Ground, folder: Path, expected: dict[str, str], rng: random.Random
) -> KilledJob:
    """A job that was struck, and whose account is right.

    Where nothing was met, because this process was starved until the job had ended, another job is begun.
    """
    for number in range(NUM_TRIES):
        root = folder / str(number)
        root.mkdir()
        with KilledJob(root, "--address", ground.cluster.address, *MANY_A_NODE) as job, Watcher(job.root) as watcher:
            num_met = carry_out(strikes, job, ground, watcher, rng)
            ground.wait_for_quiet()
            check_account(job, watcher, expected)
        if num_met > 0:
            return job
    raise AssertionError("each time the job had ended before it was struck")


@pytest.mark.slow
def test_a_killed_driver_is_followed_by_the_same_command(
    tmp_path: Path, ground: Ground, expected: dict[str, str]
) -> None:
    job = strike_a_job([Strike(1, 0.1, "driver")], ground, tmp_path, expected, random.Random(0))
    assert last_epoch(open_store(job.root)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(14))
def test_killed_actors_and_drivers_lose_and_double_nothing(
    seed: int, tmp_path: Path, ground: Ground, expected: dict[str, str]
) -> None:
    rng = random.Random(seed)
    strike_a_job(plan_strikes(rng), ground, tmp_path, expected, rng)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 104))
def test_a_killed_raylet_leaves_a_zombie_that_changes_nothing(
    seed: int, tmp_path: Path, ground: Ground, watcher: Watcher, expected: dict[str, str]
) -> None:
    """With odd seeds the driver dies too: then nobody ends the zombie, and it writes beside its successor.

    On a fast machine the driver may have ended before; then the second one finds nothing to do.
    """
    rng = random.Random(seed)
    with KilledJob(tmp_path, "--address", ground.cluster.address, *ONE_A_NODE) as job:
        driver = job.start()
        until_videos(watcher, driver, rng.randint(0, 3))
        until(lambda: bool(actors_of(ground.raylets, doing=".run")) or driver.poll() is not None)
        time.sleep(rng.uniform(0, 0.4))
        busy = [node for node in ground.nodes if actors_of([raylet_of(node)], doing=".run")]
        node = rng.choice(busy or ground.nodes)
        zombies = children_of([raylet_of(node)])
        try:
            psutil.Process(raylet_of(node)).kill()
            if seed % 2:
                time.sleep(rng.uniform(0, 0.3))
                kill_driver(job, driver)
                driver = job.start()
            job.finish(driver)
        finally:
            end(zombies)
            ground.replace(node)
        ground.wait_for_quiet()
        check_account(job, watcher, expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 204))
def test_a_driver_that_is_taken_over_ends_with_75_and_writes_no_more(
    seed: int, tmp_path: Path, ground: Ground, expected: dict[str, str]
) -> None:
    """It stands still while the second one comes up, as a frozen machine does. With even seeds it wakes up when the
    second one has the lease but may not have begun, with odd ones later.

    One that had committed everything before the second one began has ended well; then another job is begun.
    """
    rng = random.Random(seed)
    for number in range(NUM_TRIES):
        root = tmp_path / str(number)
        root.mkdir()
        with KilledJob(root, "--address", ground.cluster.address, *MANY_A_NODE) as job, Watcher(job.root) as watcher:
            store = open_store(job.root)
            first = job.start("--actors", "1")
            until(lambda store=store, first=first: last_epoch(store) == 1 or first.poll() is not None)
            until_videos(watcher, first, rng.randint(0, 2))
            first.send_signal(signal.SIGSTOP)
            second = job.start("--takeover")
            until(lambda store=store, second=second: last_epoch(store) == 2 or second.poll() is not None)
            if seed % 2:
                until(lambda store=store, second=second: begun_by(store, 2) or second.poll() is not None)
                time.sleep(rng.uniform(0, 1))
            first.send_signal(signal.SIGCONT)
            has_ended_well = first.wait(PATIENCE_S) == 0 and num_committed_by(store, 1) == NUM_ITEMS
            job.finish(first, 0 if has_ended_well else 75)
            written = job.keys_of_epoch(1)
            job.finish(second)
            assert job.keys_of_epoch(1) == written
            ground.wait_for_quiet()
            check_account(job, watcher, expected)
        if not has_ended_well:
            return
    raise AssertionError("each time the job had ended before it was taken over")


def begun_by(store: ObjectStore, epoch: int) -> bool:
    return any(entry.epoch == epoch for entry in read_entries(store, 0))


def num_committed_by(store: ObjectStore, epoch: int) -> int:
    return sum(len(entry.rows) for entry in read_entries(store, 0) if entry.epoch == epoch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300, 302))
def test_actors_do_not_outlive_a_driver_that_is_killed_with_a_ray_of_its_own(
    seed: int, tmp_path: Path, watcher: Watcher, expected: dict[str, str]
) -> None:
    rng = random.Random(seed)
    with KilledJob(tmp_path) as job:
        driver = job.start()
        until_videos(watcher, driver, 1)
        kill_an_actor([driver.pid], driver, rng)
        time.sleep(rng.uniform(0, 1))
        actors, processes = actors_of([driver.pid]), children_of([driver.pid])
        folders = {Path(found[0]) for process in processes if (found := RAY_FOLDER.findall(title_of(process)))}
        try:
            kill_driver(job, driver)
            until(lambda: not any(is_alive(actor) for actor in actors))
            job.finish(job.start())
        finally:
            end(processes)  # Ray's agents go on for about a minute
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        check_account(job, watcher, expected)
