"""What ActorPool makes of answers and of silence, by a clock of ours and with a Ray that answers when it is told."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import ray_pool
from cluster.pool import ActorGone, ActorReady, CallDone, Heartbeat
from cluster.ray_pool import ActorPool, PoolSettings
from cluster.worker_host import Loaded, ProcessIdentity
from tests.fakes import ManualClock

HERE = ProcessIdentity("elsewhere", 1, "0", "node")
SETTINGS = PoolSettings(heartbeat_s=5.0, unresponsive_s=60.0)


class Answer:
    """A reference: of which method, and its value once there is one."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.values: list[Any] = []


class Remote:
    """An actor class, an actor, or a method of one: whatever is asked of it is noted in `answers`."""

    def __init__(self, answers: list[Answer], method: str = "") -> None:
        self._answers, self._method = answers, method

    def __getattr__(self, name: str) -> Remote:
        return Remote(self._answers, name)

    def options(self, **_: Any) -> Remote:
        return self

    def remote(self, *_: Any) -> Any:
        if not self._method:
            return Remote(self._answers)
        self._answers.append(Answer(self._method))
        return self._answers[-1]


class Ground:
    """A pool with one actor that is ready."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.answers = ManualClock(), list[Answer]()
        ray = SimpleNamespace(
            remote=lambda **_: lambda _: Remote(self.answers),
            wait=self._wait,
            get=lambda answer, timeout: answer.values[0],
            kill=lambda handle, no_restart: None,
        )
        time = SimpleNamespace(monotonic=self.clock.monotonic, sleep=self.clock.sleep)
        monkeypatch.setattr(ray_pool, "ray", ray)
        monkeypatch.setattr(ray_pool, "time", time)
        monkeypatch.setattr(ray_pool, "draining_nodes", dict)
        self.pool = ActorPool(object, None, settings=SETTINGS)
        self.actor = self.pool.spawn()
        self.answer("load", Loaded({}, HERE, 1.0))
        assert isinstance(self.pool.poll(1.0)[0], ActorReady)

    def _wait(
        self, answers: Sequence[Answer], num_returns: int = 1, timeout: float = 0.0
    ) -> tuple[list[Answer], list[Answer]]:
        done = [answer for answer in answers if answer.values]
        if not done:
            self.clock.sleep(timeout)
        return done, [answer for answer in answers if not answer.values]

    def answer(self, method: str, value: Any) -> None:
        """Every open call of this method gets this value."""
        for answer in self.answers:
            if answer.method == method and not answer.values:
                answer.values.append(value)


@pytest.fixture
def ground(monkeypatch: pytest.MonkeyPatch) -> Ground:
    return Ground(monkeypatch)


def test_a_hanging_run_is_no_silence_however_long_it_takes(ground: Ground) -> None:
    ground.pool.submit(ground.actor, "a", None)
    begun = ground.clock.monotonic()
    beats = []
    while ground.clock.monotonic() - begun < 20 * SETTINGS.unresponsive_s:
        beats += ground.pool.poll(1.0)
        ground.answer("progress", 1)
    assert {type(event) for event in beats} == {Heartbeat}
    assert len(beats) >= 150
    ground.answer("run", "late")
    assert CallDone(ground.actor, "a", "late") in ground.pool.poll(1.0)


def test_silence_counts_from_the_question_and_ends_the_actor_with_its_calls(ground: Ground) -> None:
    ground.pool.submit(ground.actor, "a", None)
    begun = ground.clock.monotonic()
    events = ground.pool.poll(1000.0)
    assert [(type(event), event.cause, event.call_ids) for event in events] == [(ActorGone, "unavailable", ("a",))]
    assert ground.clock.monotonic() - begun == pytest.approx(SETTINGS.heartbeat_s + SETTINGS.unresponsive_s)


def test_who_stood_still_itself_hears_the_answer_before_it_judges(ground: Ground) -> None:
    """A driver that was starved or frozen for longer than an actor may be silent."""
    ground.pool.submit(ground.actor, "a", None)
    ground.pool.poll(SETTINGS.heartbeat_s + 1)
    ground.answer("progress", 1)
    ground.clock.sleep(10 * SETTINGS.unresponsive_s)
    assert ground.pool.poll(0.0) == [Heartbeat(ground.actor, 1)]


def test_a_result_that_came_before_the_silence_is_a_result(ground: Ground) -> None:
    ground.pool.submit(ground.actor, "a", None)
    ground.pool.submit(ground.actor, "b", None)
    ground.pool.poll(SETTINGS.heartbeat_s + 1)
    ground.clock.sleep(10 * SETTINGS.unresponsive_s)
    next(answer for answer in ground.answers if answer.method == "run").values.append("rendered")
    done, gone = ground.pool.poll(0.0)
    assert done == CallDone(ground.actor, "a", "rendered")
    assert isinstance(gone, ActorGone)
    assert gone.call_ids == ("b",)
