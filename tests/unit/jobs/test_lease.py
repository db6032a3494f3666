"""Who may drive a job: released, dead, silent and living holders, and two who want it at once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys

import pytest

from cluster.errors import StoreUnavailable
from jobs.errors import LeaseHeld, LeaseLost
from jobs.lease import Lease, Owner, acquire, last_epoch, read_holder
from tests.fakes import FlakyStore, ManualClock, MemoryStore

ELSEWHERE = Owner("n1", "far-away", "boot-x", "pid:[1]", 4711, "123")


def take(store: MemoryStore, owner: Owner = ELSEWHERE, clock: ManualClock | None = None, **more: bool) -> Lease:
    return acquire(store, owner, clock=clock or ManualClock(), ttl_s=30, **more)


def test_the_first_driver_gets_epoch_one_and_the_next_after_a_release_gets_two_at_once() -> None:
    store, clock = MemoryStore(), ManualClock()
    first = take(store, clock=clock)
    first.release()
    second = take(store, Owner.current(), clock)
    assert (first.epoch, second.epoch) == (1, 2)
    assert clock.monotonic() == ManualClock().monotonic()


def test_a_silent_holder_is_replaced_after_one_ttl_of_our_own_clock() -> None:
    store, clock = MemoryStore(), ManualClock()
    take(store, clock=clock).beat()
    clock.jump_wall(1e6)  # a wall clock that jumps decides nothing
    begun = clock.monotonic()
    assert take(store, Owner.current(), clock).epoch == 2
    assert 30 <= clock.monotonic() - begun <= 36


def test_a_beating_holder_is_left_alone() -> None:
    store, clock = MemoryStore(), ManualClock()
    holder = take(store, clock=clock)
    clock.on_sleep = lambda _: holder.beat()
    with pytest.raises(LeaseHeld, match="4711 on far-away"):
        take(store, Owner.current(), clock)
    assert last_epoch(store) == 1


def test_takeover_does_not_wait_and_the_old_holder_learns_it_with_its_next_beat() -> None:
    store, clock = MemoryStore(), ManualClock()
    old = take(store, clock=clock)
    assert take(store, Owner.current(), clock, takeover=True).epoch == 2
    with pytest.raises(LeaseLost):
        old.beat()


def test_a_dead_process_of_this_machine_is_replaced_at_once() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = Owner.current()
    dead = dataclasses.replace(here, nonce="n2", pid=child.pid, process_start=_start_of(child.pid))
    assert not dead.is_dead(here)
    child.communicate(b"\n")
    assert dead.is_dead(here)
    store, clock = MemoryStore(), ManualClock()
    take(store, dead, clock)
    assert take(store, here, clock).epoch == 2
    assert clock.monotonic() == ManualClock().monotonic()


def test_a_reused_pid_is_not_the_holder_and_a_living_one_is() -> None:
    here = Owner.current()
    assert dataclasses.replace(here, process_start="1").is_dead(here)
    assert not here.is_dead(here)
    assert not dataclasses.replace(here, pid_namespace="pid:[9]", process_start="1").is_dead(here)


def test_acquiring_survives_lost_answers() -> None:
    for seed in range(30):
        backing = MemoryStore()
        lease = acquire_despite_faults(FlakyStore(backing, seed=seed, faults=0.3))
        assert last_epoch(backing) == lease.epoch
        holder = read_holder(backing)
        assert holder is not None
        assert holder["nonce"] == lease.owner.nonce


def acquire_despite_faults(store: FlakyStore) -> Lease:
    owner = Owner.current()
    while True:
        with contextlib.suppress(StoreUnavailable):  # before the write: nothing was taken
            return acquire(store, owner, clock=ManualClock(), ttl_s=30)


def _start_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def test_a_zombie_process_counts_as_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    start = _start_of(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    here = Owner.current()
    assert dataclasses.replace(here, pid=child.pid, process_start=start).is_dead(here)
    child.wait()
