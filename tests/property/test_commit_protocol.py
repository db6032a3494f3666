"""Journal, lease and parts against a perfect model: three drivers at once, crashes and lost answers at any store call.

At every instant: each task succeeds at most once in the journal and stands at most once in the parts, parts never
overlap, no one writes after a successor has begun, and what was acknowledged stays. At the end: exactly once.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jobs.commit import MANIFEST, QUARANTINE
from jobs.held_job import take_job
from jobs.journal import PREFIX, Entry, read_entry
from jobs.lease import Owner
from jobs.manifest import part_key, read_head, read_part
from jobs.replay import Replay
from tests.fakes import ManualClock, MemoryStore
from tests.property.stepped import SteppedDriver
from tests.render_rows import succeeded

TASKS = [f"t{n}" for n in range(6)]
NUM_DRIVERS = 3
WHO = st.integers(0, NUM_DRIVERS - 1)
FAULTS = st.sampled_from(["none", "none", "none", "refused", "lost"])


class CommitProtocol(RuleBasedStateMachine):
    """Slots for drivers; a crashed or fenced one may be followed by another, or come back to life as a zombie."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.drivers: list[SteppedDriver | None] = [None] * NUM_DRIVERS
        self.acknowledged: set[str] = set()
        self._read: dict[str, tuple[bytes, Any]] = {}
        """What has been decoded, by key: checking after every step must be cheap."""

    @rule(who=WHO)
    def start(self, who: int) -> None:
        driver = self.drivers[who]
        if driver is None or driver.is_over:
            self._retire(who)
            self.drivers[who] = SteppedDriver(self.store)

    @rule(who=WHO, fault=FAULTS, steps=st.integers(0, 12))
    def step(self, who: int, fault: str, steps: int) -> None:
        driver = self.drivers[who]
        if driver is not None:
            for _ in range(steps):
                driver.step("none")
            driver.step(fault)  # type: ignore[arg-type]

    @rule(who=WHO, names=st.lists(st.sampled_from(TASKS), max_size=3), bad=st.lists(st.sampled_from(TASKS), max_size=1))
    def commit(self, who: int, names: list[str], bad: list[str]) -> None:
        driver = self.drivers[who]
        if driver is not None and driver.is_idle:
            driver.order_commit(names, bad)
            driver.step()

    @rule(who=st.lists(WHO, min_size=1, max_size=3, unique=True))
    def publish(self, who: list[int]) -> None:
        """One driver, or several in step with each other: a zombie and its successor may both have rows to show."""
        for each in who:
            driver = self.drivers[each]
            if driver is not None and driver.is_idle:
                driver.order_publish()
                driver.step()

    @rule(who=WHO)
    def go_on_until_idle(self, who: int) -> None:
        driver = self.drivers[who]
        while driver is not None and not driver.is_over and not driver.is_idle:
            driver.step()

    @rule(who=WHO)
    def crash(self, who: int) -> None:
        if self.drivers[who] is not None:
            self._retire(who)

    @rule(seed=st.integers(0, 2**32))
    def live_a_while(self, seed: int) -> None:
        """Many small steps of everybody, with a successor taking over while its predecessor still works."""
        chance = random.Random(seed)
        for _ in range(60):
            who = chance.randrange(NUM_DRIVERS)
            driver = self.drivers[who]
            if driver is None or driver.is_over:
                self.start(who)
            elif chance.random() < 0.02:
                self.crash(who)
            elif driver.is_idle and chance.random() < 0.7:
                failures = chance.choices(TASKS, k=int(chance.random() < 0.2))
                self.commit(who, chance.choices(TASKS, k=chance.randrange(3)), failures)
            elif driver.is_idle:
                self.publish([who])
            else:
                self.step(who, chance.choice(["none", "none", "none", "refused", "lost"]), 0)
            self.the_record_is_sound()

    @precondition(lambda self: self.store.objects and all(driver is None or driver.is_over for driver in self.drivers))
    @rule()
    def lifecycle_deletes_the_state(self) -> None:
        """Only where nobody lives and all is published, as the age of the rule sees to."""
        replay = Replay(self.store, "night")
        if not replay.unpublished and not replay.unpublished_quarantine:
            self.store.delete([key for key in self.store.objects if key.startswith("_state/")])

    @invariant()
    def the_record_is_sound(self) -> None:
        for driver in self.drivers:
            assert driver is None or driver.error is None, driver.error
            if driver is not None:
                self.acknowledged |= driver.acknowledged
        entries = self._entries()
        assert all(b.seq == a.seq + 1 for a, b in pairwise(entries))
        self._check_epochs(entries)
        in_journal = Counter(row["item_id"] for entry in entries for row in entry.rows if row["status"] == "succeeded")
        assert not [name for name, count in in_journal.items() if count > 1]
        in_parts = self._published(MANIFEST)
        assert not [name for name, count in in_parts.items() if count > 1]
        assert self.acknowledged <= set(in_parts) | set(in_journal)
        self._published(QUARANTINE)

    def _entries(self) -> list[Entry]:
        keys = sorted(key for key in self.store.objects if key.startswith(PREFIX))
        for key in keys:
            data = self.store.objects[key]
            if self._read.get(key, (b"", None))[0] is not data:
                self._read[key] = (data, read_entry(self.store, int(key.removeprefix(PREFIX).split(".")[0])))
        return [self._read[key][1] for key in keys]

    def _check_epochs(self, entries: list[Entry]) -> None:
        begun = 0
        for entry in entries:
            if entry.kind == "begin":
                assert entry.epoch > begun
                begun = entry.epoch
            assert entry.epoch == begun, "a zombie wrote after its successor had begun"

    def _published(self, prefix: str) -> Counter[str]:
        names: Counter[str] = Counter()
        last_seq = 0
        for index in range(len(self.store.objects)):
            data = self.store.objects.get(part_key(prefix, index))
            if data is None:
                break
            key = part_key(prefix, index)
            if self._read.get(key, (b"", None))[0] is not data:
                self._read[key] = (data, (read_head(data), read_part(data, ["item_id", "commit_seq"]).to_pydict()))
            head, columns = self._read[key][1]
            seqs = columns["commit_seq"]
            assert all(max(last_seq, head.first_seq - 1) < seq <= head.last_seq for seq in seqs), "parts overlap"
            last_seq = head.last_seq
            names.update(columns["item_id"])
        return names

    def _retire(self, who: int) -> None:
        driver = self.drivers[who]
        if driver is not None:
            driver.crash()
            assert driver.error is None, driver.error
            self.acknowledged |= driver.acknowledged
        self.drivers[who] = None

    def teardown(self) -> None:
        for who in range(NUM_DRIVERS):
            self._retire(who)
        replay = Replay(self.store, "night")
        ledger = replay.ledger
        failed = {n for n in TASKS if ledger.is_settled(f"{n}-0") and not ledger.has_succeeded(f"{n}-0")}
        job = take_job(self.store, replay, Owner.current(), clock=ManualClock(), ttl_s=1, takeover=True)
        job.commit([succeeded(name) for name in TASKS])
        job.close()
        self.the_record_is_sound()
        assert self._published(MANIFEST) == Counter(set(TASKS) - failed)
        assert set(self._published(QUARANTINE)) >= failed
        assert not Replay(self.store, "night").unpublished


TestCommitProtocol = CommitProtocol.TestCase
TestCommitProtocol.settings = settings(max_examples=10, stateful_step_count=8)


@pytest.mark.slow
def test_hundreds_of_long_walks_keep_the_record_sound() -> None:
    for seed in range(300):
        machine = CommitProtocol()
        for part in range(3):
            machine.live_a_while(1000 * seed + part)
        machine.teardown()
