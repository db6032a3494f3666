"""A job in the hands of one driver: take it over, commit rows, publish parts, let it go.

The whole write side of the protocol in one object, used by one thread (only the lease's heartbeat runs beside it).
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.object_store import ObjectStore
from jobs.errors import LeaseLost
from jobs.journal import EntryKind, JournalWriter, encode_row
from jobs.lease import Clock, Lease, Owner, acquire
from jobs.manifest import CommittedRow
from jobs.replay import Replay
from jobs.rows import Row, task_id_of


class HeldJob:
    """What `take_job` returns. After LeaseLost it must not be used again."""

    def __init__(self, store: ObjectStore, replay: Replay, lease: Lease) -> None:
        self.lease = lease
        self.ledger = replay.ledger
        self._replay = replay
        self._has_ended = False
        self._writer = JournalWriter(
            store, epoch=lease.epoch, nonce=lease.owner.nonce, last_seq=replay.last_seq
        )  # its first act is begin, in take_job
        for entry in self._writer.begin():
            replay.absorb(entry)

    @property
    def epoch(self) -> int:
        return self.lease.epoch

    @property
    def last_seq(self) -> int:
        return self._writer.last_seq

    @property
    def num_unpublished(self) -> int:
        """Committed rows that no part shows yet."""
        return len(self._replay.unpublished) + len(self._replay.unpublished_quarantine)

    @property
    def num_parts(self) -> int:
        return self._replay.manifest.num_parts

    def commit(self, rows: Sequence[Row], kind: EntryKind = "rows") -> int:
        """Make rows true in one journal entry; those that are no news (a second success) are dropped.

        Returns:
            How many rows were committed.
        Raises:
            LeaseLost: Nothing was written; stop.
            OutcomeUnknown, StoreUnavailable: Call again with the same rows before anything else, or stop for ever.
        """
        fresh = self._news(rows)
        if not fresh and kind == "rows":
            return 0
        encoded = [encode_row(row) for row in fresh]
        seq = self._writer.append(encoded, kind)
        for row, data in zip(fresh, encoded, strict=True):
            self._settle(seq, row, data)
        return len(fresh)

    def commit_each(self, rows: Sequence[Row]) -> int:
        """`commit` with a journal entry of its own for every row, in order."""
        fresh = self._news(rows)
        encoded = [encode_row(row) for row in fresh]
        start = 0
        while start < len(fresh):
            seq = self._writer.last_seq + 1
            count = self._writer.append_some(encoded[start:])
            for offset in range(count):
                self._settle(seq + offset, fresh[start + offset], encoded[start + offset])
            start += count
        return len(fresh)

    def _settle(self, seq: int, row: Row, data: bytes) -> None:
        self.ledger.take(row)
        succeeded = row["status"] == "succeeded"
        series = self._replay.unpublished if succeeded else self._replay.unpublished_quarantine
        series.append(CommittedRow(seq, data))

    def publish(self) -> None:
        """Write parts with every committed row. Quarantine first: see the invariant of `Replay`.

        Raises:
            OutcomeUnknown, StoreUnavailable: Call again.
        """
        replay = self._replay
        replay.quarantine.publish(replay.unpublished_quarantine, self.last_seq, self.epoch)
        replay.unpublished_quarantine.clear()
        replay.manifest.publish(replay.unpublished, self.last_seq, self.epoch)
        replay.unpublished.clear()

    def finish(self) -> None:
        """Nothing more will be committed: `end` entry and last parts. May be called again after a lost answer."""
        if not self._has_ended:
            self.commit([], "end")
            self._has_ended = True
        self.publish()

    def close(self) -> None:
        """`finish`, and the lease is released."""
        self.finish()
        self.lease.release()

    def _news(self, rows: Sequence[Row]) -> list[Row]:
        fresh, seen = [], set()
        for row in rows:
            task_id = task_id_of(row)
            if task_id not in seen and self.ledger.would_change(row):
                fresh.append(row)
                seen.add(task_id)
        return fresh


def take_job(
    store: ObjectStore, replay: Replay, owner: Owner, *, clock: Clock, ttl_s: float, takeover: bool = False
) -> HeldJob:
    """Become the one writer of a job.

    Args:
        replay: Its record as read before; it is brought up to date.
    Raises:
        LeaseHeld: Another driver lives.
        LeaseLost: Another driver was faster.
    """
    lease = acquire(store, owner, clock=clock, ttl_s=ttl_s, takeover=takeover, min_epoch=replay.max_epoch + 1)
    replay.catch_up()
    if replay.max_epoch >= lease.epoch:  # a successor has begun while we stood still between lease and journal
        raise LeaseLost(f"epoch {replay.max_epoch} has begun before ours, {lease.epoch}")
    return HeldJob(store, replay, lease)
