"""The driver with a simulated pool and a store in memory: resume, fences, faults, signals, closing records."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from cluster.pool import Pool
from jobs.columns import CLOSING_RECORDS
from jobs.commit import MANIFEST, QUARANTINE, PartSeries
from jobs.committer import StoreGone
from jobs.driver import Driver, JobInputs, Limits, Outcome
from jobs.errors import LeaseHeld, LeaseLost
from jobs.held_job import take_job
from jobs.journal import read_entries
from jobs.lease import Owner
from jobs.outcome import SourceRow
from jobs.prompt_row import Rejected
from jobs.replay import Replay
from tests.fake_pool import FakePool, Fate, World
from tests.fakes import FlakyStore, ManualClock, MemoryStore
from tests.render_rows import FACTS, planned
from workers.task import RenderTask

LIMITS = Limits(num_actors=2, backoff_s=0.1, lease_ttl_s=1.0)


class Bench:
    """One store, and drivers over it."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.store = store or MemoryStore()
        self.pools: list[FakePool] = []

    def driver(self, source: Iterable[SourceRow], world: World | None = None, **more: Any) -> Driver:
        clock = ManualClock()

        def open_pool() -> Pool:
            self.pools.append(FakePool(clock, world or World()))
            return self.pools[-1]

        inputs = JobInputs(FACTS, source, allowed_failures=more.pop("allowed_failures", 0))
        limits = more.pop("limits", LIMITS)
        return Driver(inputs, self.store, open_pool, limits, clock=clock, **more)

    def run(self, source: Iterable[SourceRow], world: World | None = None, **more: Any) -> Outcome:
        return self.driver(source, world, **more).run()

    def rows(self, prefix: str = MANIFEST) -> list[str]:
        series = PartSeries(self.store, prefix, "night")
        return sorted(name for table in series.read_new(["item_id"]) for name in table.column(0).to_pylist())

    def json(self, key: str) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.store.get(key))
        return body


def items(*names: str) -> list[SourceRow]:
    return [planned(name) for name in names]


def test_a_job_is_rendered_published_and_closed() -> None:
    bench = Bench()
    outcome = bench.run(items("a", "b", "c"))
    assert (outcome.exit_code, outcome.run_succeeded) == (0, 3)
    assert bench.rows() == ["a", "b", "c"]
    assert bench.json("_SUCCESS")["succeeded"] == 3
    result = bench.json("_result.json")
    assert (result["status"], result["exit_code"], result["is_resumable"]) == ("succeeded", 0, False)
    assert all(f"`{name}`" in CLOSING_RECORDS for name in (*result, *bench.json("_SUCCESS"))), "docs/manifest.md"
    assert b"manifest/part-*.parquet" in bench.store.get("README.md")
    assert bench.pools[0].is_stopped


def test_a_second_run_has_nothing_to_do_and_touches_nothing() -> None:
    bench = Bench()
    bench.run(items("a", "b"))
    before = dict(bench.store.objects)
    outcome = bench.run(items("a", "b"))
    assert (outcome.exit_code, outcome.epoch, len(bench.pools)) == (0, None, 1)
    assert bench.store.objects == before


def test_appended_items_are_rendered_and_only_they() -> None:
    bench = Bench()
    bench.run(items("a", "b"))
    outcome = bench.run(items("a", "b", "c"))
    assert outcome.run_succeeded == 1
    assert [task_id for task_id, _ in bench.pools[1].runs] == ["c-0"]
    assert bench.json("_SUCCESS")["succeeded"] == 3


def test_rejected_lines_are_quarantined_once_and_the_rest_is_rendered() -> None:
    bench = Bench()
    source = [*items("a"), Rejected(2, "empty_prompt", "prompt is empty"), *items("b")]
    assert bench.run(source).exit_code == 3
    assert bench.run(source).exit_code == 3
    assert bench.rows() == ["a", "b"]
    assert len(bench.rows(QUARANTINE)) == 1
    assert bench.run([*source, *items("c")], allowed_failures=1).exit_code == 0


def test_a_list_of_nothing_but_rejected_lines_starts_no_pool() -> None:
    bench = Bench()
    outcome = bench.run([Rejected(n, "bad_json", "no") for n in range(5000)])
    assert outcome.exit_code == 3
    assert outcome.counts["rejected"] == 5000
    assert not bench.pools


def test_given_up_items_are_not_tried_again_by_the_next_run() -> None:
    bench = Bench()
    bad = World(fate=lambda task, node: Fate(1, "fail" if task.item_id == "b" else "ok", failure={"retryable": False}))
    assert bench.run(items("a", "b"), bad).exit_code == 3
    assert bench.run(items("a", "b")).exit_code == 3
    assert len(bench.pools) == 1
    assert bench.json("_SUCCESS")["failures"] == {"unknown": 1}


def test_a_store_that_loses_answers_changes_nothing() -> None:
    for seed in range(8):
        backing = MemoryStore()
        take_job(backing, Replay(backing, "night"), Owner.current(), clock=ManualClock(), ttl_s=1).close()
        store = FlakyStore(backing, seed=seed, faults=0.0)
        one_by_one = LIMITS.model_copy(update={"max_rows_per_entry": 1})
        faults = FaultsWhileCommitting(store)
        Bench(store).run(items(*"abcdefghij"), limits=one_by_one, on_progress=faults, progress_interval_s=0.0)
        rows = [row["item_id"] for entry in read_entries(backing, 0) for row in entry.rows]
        assert sorted(rows) == list("abcdefghij")


class FaultsWhileCommitting:
    """A progress callback that makes the store lose requests and answers for some turns, not at start and end."""

    def __init__(self, store: FlakyStore) -> None:
        self._store = store
        self._turns = 0

    def __call__(self, view: object) -> None:
        self._turns += 1
        self._store.faults = 0.3 if self._turns < 40 else 0.0


def test_a_store_that_stays_away_ends_the_run_with_75_and_the_next_one_resumes() -> None:
    backing = MemoryStore()
    store = FlakyStore(backing, seed=1, faults=0.0)
    bench = Bench(store)
    limits = LIMITS.model_copy(update={"store_patience_s": 3.0})

    def cut_off(view: object) -> None:
        store.faults = 1.0

    with pytest.raises(StoreGone) as caught:
        bench.run(items(*"abcdef"), limits=limits, progress_interval_s=0.0, on_progress=cut_off)
    assert caught.value.exit_code == 75
    bench.store = backing
    assert bench.run(items(*"abcdef"), takeover=True).exit_code == 0
    assert bench.rows() == list("abcdef")


def test_a_driver_that_is_overtaken_stops_writing() -> None:
    bench = Bench()
    state: dict[str, Any] = {}

    def overtake(view: Any) -> None:
        if view.run_succeeded >= 3 and not state:
            state["job"] = take_job(
                bench.store, Replay(bench.store, "night"), Owner.current(), clock=ManualClock(), ttl_s=1, takeover=True
            )

    many = items(*[f"i{n}" for n in range(300)])
    with pytest.raises(LeaseLost):
        bench.run(many, on_progress=overtake, progress_interval_s=0.0)
    entries = list(read_entries(bench.store, 0))
    assert entries[-1].epoch == 2
    assert "_SUCCESS" not in bench.store.objects
    assert "_result.json" not in bench.store.objects
    state["job"].close()
    assert bench.run(many).exit_code == 0
    assert bench.rows() == sorted(f"i{n}" for n in range(300))


def test_a_living_driver_is_not_disturbed() -> None:
    bench, clock = Bench(), ManualClock()
    job = take_job(bench.store, Replay(bench.store, "night"), Owner.current(), clock=ManualClock(), ttl_s=1)
    clock.on_sleep = lambda _: job.lease.beat()
    inputs = JobInputs(FACTS, items("a"))
    with pytest.raises(LeaseHeld):
        Driver(inputs, bench.store, lambda: pytest.fail("no pool"), LIMITS, clock=clock).run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_commits_what_is_finished_and_exits_with_four(number: signal.Signals) -> None:
    bench = Bench()
    source = items(*[f"i{n}" for n in range(2000)])

    def interrupt(view: Any) -> None:
        if 10 <= view.run_succeeded < 2000 and not view.num_uncommitted:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    world = World(fate=lambda task, node: Fate(30.0))
    outcome = bench.run(source, world, on_progress=interrupt, progress_interval_s=0.0)
    assert signal.getsignal(number) is before
    assert outcome.exit_code == 4
    assert number.name in outcome.reason
    assert 10 <= len(bench.rows()) < 2000
    assert (bench.json("_result.json")["status"], bench.json("_result.json")["is_resumable"]) == ("stopped", True)
    assert "_SUCCESS" not in bench.store.objects
    again = bench.run(source)  # the lease was released: nobody waits
    assert again.exit_code == 0
    assert len(bench.rows()) == 2000
    assert again.run_succeeded + outcome.run_succeeded == 2000


def test_parts_are_published_by_rows_and_at_the_end() -> None:
    bench = Bench()
    limits = LIMITS.model_copy(update={"part_rows": 100, "lookahead": 64, "max_uncommitted": 20})
    bench.run(items(*[f"i{n}" for n in range(350)]), limits=limits)
    assert len(bench.rows()) == 350
    assert 3 <= bench.json("_SUCCESS")["num_parts"] <= 4


def test_the_view_adds_up() -> None:
    bench = Bench()
    views: list[Any] = []
    bench.run(items(*[f"i{n}" for n in range(50)]), on_progress=views.append, progress_interval_s=0.0)
    for view in views:
        assert view.num_succeeded <= view.run_succeeded <= 50
        assert sum(view.gpu_seconds.values()) >= 0
    assert views[-1].num_succeeded == 50
    assert views[-1].run_frames == 50 * 96
    assert {actor.state for view in views for actor in view.actors} >= {"loading", "running"}


def test_a_broken_list_ends_the_run_without_losing_what_is_finished() -> None:
    bench = Bench()

    def broken() -> Iterable[SourceRow]:
        yield from items(*[f"i{n}" for n in range(600)])
        raise OSError("the list went away")

    with pytest.raises(OSError, match="went away"):
        bench.run(broken(), limits=LIMITS.model_copy(update={"lookahead": 10}))
    fate: Callable[[RenderTask, str], Fate] = lambda task, node: Fate()  # noqa: E731
    outcome = bench.run(items(*[f"i{n}" for n in range(600)]), World(fate=fate), takeover=True)
    assert outcome.exit_code == 0
    assert len(bench.rows()) == 600
