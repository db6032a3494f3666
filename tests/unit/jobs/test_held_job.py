"""The write side of the protocol, case by case: what docs/commit-protocol.md promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from cluster.errors import OutcomeUnknown, StoreUnavailable
from jobs.commit import MANIFEST, QUARANTINE, PartSeries
from jobs.errors import JournalBroken, LeaseLost
from jobs.held_job import HeldJob, take_job
from jobs.journal import key_of, read_entries
from jobs.lease import Owner
from jobs.prompt_row import Rejected
from jobs.quarantine import open_failures, reopen
from jobs.replay import Replay
from jobs.rows import Row, rejected_row
from tests.fakes import FlakyStore, ManualClock, MemoryStore
from tests.render_rows import FACTS, NOW, given_up, succeeded

US: dict[str, Any] = {"owner": Owner.current(), "clock": ManualClock(), "ttl_s": 1}


def hold(store: MemoryStore) -> HeldJob:
    return take_job(store, Replay(store, "night"), Owner.current(), clock=ManualClock(), ttl_s=1, takeover=True)


def published(store: MemoryStore, prefix: str = MANIFEST) -> list[Row]:
    series = PartSeries(store, prefix, "night")
    return [row for table in series.read_new(("item_id", "commit_seq", "status")) for row in table.to_pylist()]


def ids(rows: list[Row]) -> list[str]:
    return [row["item_id"] for row in rows]


def test_a_committed_row_survives_a_driver_that_never_published() -> None:
    store = MemoryStore()
    hold(store).commit([succeeded("a"), succeeded("b")])
    job = hold(store)
    assert job.ledger.is_settled("a-0")
    job.publish()
    assert ids(published(store)) == ["a", "b"]


def test_a_second_success_is_dropped() -> None:
    store = MemoryStore()
    job = hold(store)
    assert job.commit([succeeded("a"), succeeded("a", number=2)]) == 1
    assert job.commit([succeeded("a", number=3)]) == 0
    job.close()
    assert ids(published(store)) == ["a"]


def test_a_zombie_cannot_commit_after_its_successor_has_begun() -> None:
    store = MemoryStore()
    zombie = hold(store)
    zombie.commit([succeeded("a")])
    successor = hold(store)
    for _ in range(2):
        with pytest.raises(LeaseLost):
            zombie.commit([succeeded("b")])
    successor.commit([succeeded("b", epoch=2)])
    assert [entry.epoch for entry in read_entries(store, 0)] == [1, 1, 2, 2]


def test_a_write_of_the_old_driver_that_lands_before_begin_counts() -> None:
    store = MemoryStore()
    old = hold(store)
    replay = Replay(store, "night")
    old.commit([succeeded("a")])  # after the successor has read, before it has begun
    new = take_job(store, replay, Owner.current(), clock=ManualClock(), ttl_s=1, takeover=True)
    assert new.ledger.is_settled("a-0")
    assert new.commit([succeeded("a", epoch=2)]) == 0


def test_two_drivers_publish_at_once_and_no_row_appears_twice() -> None:
    store = MemoryStore()
    zombie = hold(store)
    zombie.commit([succeeded("a"), given_up("x")])
    zombie.commit([succeeded("b")])
    successor = hold(store)
    successor.commit([succeeded("c"), given_up("y")])
    zombie.publish()
    successor.publish()
    assert sorted(ids(published(store))) == ["a", "b", "c"]
    assert sorted(ids(published(store, QUARANTINE))) == ["x", "y"]


def test_the_zombie_that_publishes_last_goes_on_behind_the_winner() -> None:
    store = MemoryStore()
    zombie = hold(store)
    zombie.commit([succeeded("a")])
    successor = hold(store)
    successor.commit([succeeded("c")])
    successor.publish()
    zombie.publish()
    assert ids(published(store)) == ["a", "c"]


def test_a_commit_whose_answer_was_lost_lands_once() -> None:
    for seed in range(40):
        backing = MemoryStore()
        hold(backing).lease.release()
        store = FlakyStore(backing, seed=seed, faults=0.0)
        job = hold(store)
        store.faults = 0.4
        for name in "abcdef":
            until_known(partial(job.commit, [succeeded(name)]))
        until_known(job.publish)
        assert ids(published(backing)) == list("abcdef")
        assert [len(entry.rows) for entry in read_entries(backing, 0)] == [0, 0, 1, 1, 1, 1, 1, 1]


def test_rows_with_an_entry_each_land_once_and_in_order_whatever_answers_are_lost() -> None:
    for seed in range(40):
        backing = MemoryStore()
        hold(backing).lease.release()
        store = FlakyStore(backing, seed=seed, faults=0.0)
        job = hold(store)
        store.faults = 0.2
        for names in ("abc", "c", "defg"):
            until_known(partial(job.commit_each, [succeeded(name) for name in names]))
        until_known(job.publish)
        entries = [entry for entry in read_entries(backing, 0) if entry.kind == "rows"]
        assert [[row["item_id"] for row in entry.rows] for entry in entries] == [[name] for name in "abcdefg"]
        assert ids(published(backing)) == list("abcdefg")


def test_rows_with_an_entry_each_stop_at_a_successor() -> None:
    store = MemoryStore()
    job = hold(store)
    job.commit_each([succeeded("a")])
    take_job(store, Replay(store, "night"), Owner.current(), clock=ManualClock(), ttl_s=1.0, takeover=True)
    with pytest.raises(LeaseLost):
        job.commit_each([succeeded("b"), succeeded("c")])
    assert sum(len(entry.rows) for entry in read_entries(store, 0)) == 1


def test_an_append_that_is_repeated_with_other_rows_is_our_own_mistake() -> None:
    store = MemoryStore()
    job = hold(store)
    entry = {"kind": "rows", "epoch": job.epoch, "nonce": job.lease.owner.nonce, "rows": []}
    store.objects[key_of(2)] = json.dumps(entry).encode()
    with pytest.raises(JournalBroken):
        job.commit([succeeded("a")])


def test_parts_alone_are_a_complete_ledger_when_the_state_is_deleted() -> None:
    store = MemoryStore()
    job = hold(store)
    job.commit([succeeded("a"), given_up("b"), rejected_row(FACTS, Rejected(3, "empty_prompt", "empty"), 1, NOW)])
    job.close()
    hold(store).lease.release()
    store.delete([key for key in store.objects if key.startswith("_state/")])
    job = hold(store)
    assert job.epoch > 1  # video keys of epoch 1 must not be used again
    assert [job.ledger.is_settled(name) for name in ("a-0", "b-0", "line:3:empty_prompt", "c-0")] == [True] * 3 + [
        False
    ]
    job.commit([succeeded("c")])
    job.close()
    assert ids(published(store)) == ["a", "c"]


def test_a_missing_entry_before_later_ones_is_refused() -> None:
    store = MemoryStore()
    job = hold(store)
    job.commit([succeeded("a")])
    job.commit([succeeded("b")])
    store.delete([key_of(2)])
    with pytest.raises(JournalBroken, match="lifecycle"):
        Replay(store, "night")


def test_a_journal_that_ends_before_what_parts_cover_is_refused_and_the_advice_helps() -> None:
    """A lifecycle rule has no order: it may take the newest entries first."""
    store = MemoryStore()
    job = hold(store)
    job.commit([succeeded("a")])
    job.publish()
    job.commit([succeeded("b")])
    job.commit([given_up("x")])
    job.commit([given_up("y")])
    replay = Replay(store, "night")  # a driver that is killed between the two kinds of parts
    replay.quarantine.publish(replay.unpublished_quarantine, replay.last_seq, job.epoch)
    store.delete([key_of(4), key_of(5)])
    with pytest.raises(JournalBroken, match=r"0000000004\.json is missing .* delete the rest"):
        Replay(store, "night")

    store.delete([key for key in store.objects if key.startswith("_state/journal/")])
    job = hold(store)
    assert [job.ledger.is_settled(f"{name}-0") for name in "abxy"] == [True, False, True, True]
    job.commit([succeeded("b", epoch=job.epoch), given_up("z")])
    job.close()
    assert ids(published(store)) == ["a", "b"]
    assert ids(published(store, QUARANTINE)) == ["x", "y", "z"]


def test_reopened_tasks_come_back_and_may_fail_or_succeed_once_more() -> None:
    store = MemoryStore()
    job = hold(store)
    job.commit([given_up("a", kind="oom"), given_up("b", kind="nan"), given_up("c", kind="oom")])
    job.close()
    assert reopen(store, "night", lambda row: row["error_type"] == "oom", **US) == 2
    store.delete([key for key in store.objects if key.startswith("_state/")])
    job = hold(store)
    assert [job.ledger.is_settled(f"{name}-0") for name in "abc"] == [False, True, False]
    assert job.ledger.generation("a-0") == 1
    assert job.ledger.summary()["failures"] == {"nan": 1}
    job.commit([succeeded("a"), given_up("c", kind="timeout", generation=1)])
    assert job.ledger.summary() == {"succeeded": 1, "failed": 2, "rejected": 0, "failures": {"nan": 1, "timeout": 1}}
    job.close()
    replay = Replay(store, "night")
    assert replay.ledger.summary()["failures"] == {"nan": 1, "timeout": 1}
    assert sorted(ids(open_failures(store, replay))) == ["b", "c"]
    assert ids(published(store)) == ["a"]


def test_nothing_to_reopen_takes_no_lease() -> None:
    store = MemoryStore()
    hold(store).close()
    before = dict(store.objects)
    assert reopen(store, "night", lambda row: True, **US) == 0
    assert store.objects == before


def until_known(action: Callable[[], object]) -> None:
    while True:
        try:
            action()
        except (OutcomeUnknown, StoreUnavailable):
            continue
        return
