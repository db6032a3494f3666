"""The driver over real S3 servers behind a network that fails at random: every item once, whoever was lost on the way.

The pool is simulated, so that the store is what the time goes into; tests/integration/test_render.py has real actors.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

import longtake
from cluster.s3_store import S3Settings, S3Store
from jobs.commit import MANIFEST, PartSeries
from jobs.driver import Driver, JobInputs, Limits
from jobs.journal import read_entries
from jobs.view import JobView
from tests.fake_pool import FakePool, World
from tests.fakes import ManualClock
from tests.fault_proxy import FaultKind, FaultProxy, SeenRequest
from tests.render_rows import FACTS, planned
from tests.servers import CEPH_MARKS, S3Server, shared_ceph, shared_moto, use_endpoint

NAMES = [f"take-{n:02d}" for n in range(24)]
LIMITS = Limits(num_actors=2, max_rows_per_entry=1, part_rows=6, lease_ttl_s=60.0, max_uncommitted=4)
PATIENT = S3Settings(deadline_s=120, read_timeout_s=60)
EVERYWHERE: tuple[FaultKind, ...] = ("reset_before", "slow_down", "lost_answer", "late_503", "slow")
FAULT_SHARE = 0.08
"""Of each kind: every third request or so meets one."""


class Crash(Exception):
    """Stands for a driver that ends in the middle of its work."""


@pytest.fixture(params=["moto", pytest.param("ceph", marks=CEPH_MARKS)])
def server(request: pytest.FixtureRequest) -> S3Server:
    return {"moto": shared_moto, "ceph": shared_ceph}[request.param]()


def by_chance(chance: random.Random, also: Callable[[SeenRequest], bool]) -> Callable[[SeenRequest], bool]:
    return lambda request: also(request) and chance.random() < FAULT_SHARE


def arm_everything(proxy: FaultProxy, chance: random.Random) -> None:
    for kind in EVERYWHERE:
        proxy.arm(kind, by_chance(chance, lambda _: True), times=100_000, delay_s=0.05)
    proxy.arm("conflict", by_chance(chance, lambda request: request.is_conditional), times=100_000)
    proxy.arm("cut_answer", by_chance(chance, lambda request: request.verb == "GET"), times=100_000)


def run_driver(store: S3Store, *, crash_after: int | None = None) -> None:
    clock = ManualClock()

    def look(view: JobView) -> None:
        if crash_after is not None and view.num_succeeded >= crash_after:
            raise Crash

    inputs = JobInputs(FACTS, [planned(name) for name in NAMES])
    pool = FakePool(clock, World())
    Driver(
        inputs, store, lambda: pool, LIMITS, clock=clock, takeover=True, on_progress=look, progress_interval_s=0.0
    ).run()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_job_over_a_bad_network_commits_every_item_once(
    seed: int, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    bucket = server.new_bucket()
    with FaultProxy(server.url) as proxy:
        use_endpoint(monkeypatch, proxy)
        arm_everything(proxy, chance)
        store = S3Store(bucket, "night", PATIENT)
        for crash_after in (chance.randint(1, 8), chance.randint(9, 20)):
            with pytest.raises(Crash):
                run_driver(store, crash_after=crash_after)
        run_driver(store)
        num_repeated = sum(store.retries.values())
        proxy.forget()
        rows = [row["item_id"] for entry in read_entries(store, 0) for row in entry.rows]
        shown = [
            name for table in PartSeries(store, MANIFEST, "night").read_new(["item_id"]) for name in names_of(table)
        ]
        followed = [name for new in longtake.follow(store.url, until_done=False) for name in names_of(new.table)]
    assert num_repeated > 5, "the network was not that bad"
    assert Counter(rows) == Counter(shown) == Counter(followed) == Counter(NAMES)


def names_of(table: object) -> list[str]:
    return table["item_id"].to_pylist()  # type: ignore[index,no-any-return]
