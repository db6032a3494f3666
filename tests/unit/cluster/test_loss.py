"""Who a process is, so that only the right one is killed; and what an error says about an actor."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from cluster.errors import ActorLost, ActorOutOfMemory
from cluster.loss import is_loss, judge_loss, load_error
from cluster.worker_host import identify


@pytest.fixture
def child() -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_the_right_process_is_killed(child: subprocess.Popen[bytes]) -> None:
    identity = identify(child.pid)
    assert identity is not None
    assert identity.kill_if_here()
    assert child.wait(120) == -9
    assert not identity.kill_if_here()


def test_a_process_that_ends_while_we_look_at_it_is_no_error(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = identify(child.pid)
    assert identity is not None
    child.kill()
    child.wait()
    monkeypatch.setattr("cluster.worker_host.identify", lambda pid: identity)
    assert not identity.kill_if_here()


def test_a_reused_pid_or_another_machine_is_spared(child: subprocess.Popen[bytes]) -> None:
    identity = identify(child.pid)
    assert identity is not None
    assert not dataclasses.replace(identity, started="1").kill_if_here()
    assert not dataclasses.replace(identity, machine="elsewhere").kill_if_here()
    assert child.poll() is None


def test_a_worker_that_raises_rays_own_errors_is_not_lost() -> None:
    passed_on = RayTaskError("run", "trace", ActorDiedError()).as_instanceof_cause()
    assert isinstance(passed_on, ActorDiedError)
    assert not is_loss(passed_on)
    assert is_loss(ActorDiedError())
    assert not is_loss(ValueError())


def test_out_of_memory_is_told_apart() -> None:
    assert judge_loss(OutOfMemoryError("killed"), "", False) == "out_of_memory"
    assert judge_loss(ActorDiedError(), "", False) == "crashed"
    assert judge_loss(ActorDiedError(), "", True) == "preempted"


def test_load_errors_are_the_workers_own_or_ours() -> None:
    own = RayTaskError("load", "trace", KeyError("weights")).as_instanceof_cause()
    assert type(load_error(own)) is KeyError
    assert isinstance(load_error(ActorDiedError()), ActorLost)
    assert isinstance(load_error(OutOfMemoryError("killed")), ActorOutOfMemory)
