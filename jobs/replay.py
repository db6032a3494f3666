"""What the store says of a job, read without writing: its parts, then the journal behind them.

Serves the driver at start, and every verb that only looks (status, wait, verify).
"""

from __future__ import annotations

from cluster.object_store import ObjectStore
from jobs.commit import MANIFEST, QUARANTINE, PartSeries
from jobs.journal import Entry, first_seq, hole_in_journal, read_entries
from jobs.ledger import Ledger
from jobs.manifest import CommittedRow

MANIFEST_IDS = ("item_id", "sample_index", "status")
QUARANTINE_IDS = (*MANIFEST_IDS, "input_row", "reject_kind", "error_type", "generation", "commit_seq")


class Replay:
    """The ledger of a job and the committed rows that no part shows yet.

    Invariant: all failed, rejected and reopened rows up to `manifest.last_seq` stand in quarantine parts, because every
    driver publishes those first. So the journal is needed only behind the last manifest part.
    """

    def __init__(self, store: ObjectStore, job_id: str) -> None:
        self._store = store
        self.ledger = Ledger()
        self.manifest = PartSeries(store, MANIFEST, job_id)
        self.quarantine = PartSeries(store, QUARANTINE, job_id)
        self.unpublished: list[CommittedRow] = []
        """Succeeded rows in commit order, of entries above `manifest.last_seq`."""
        self.unpublished_quarantine: list[CommittedRow] = []
        self.last_seq = 0
        self.max_epoch = 0
        self._read_parts()
        self.catch_up()

    def _read_parts(self) -> None:
        for table in self.manifest.read_new(MANIFEST_IDS):
            for batch in table.to_batches():
                for row in batch.to_pylist():
                    self.ledger.absorb_part(row)
        tables = [table.sort_by("commit_seq") for table in self.quarantine.read_new(QUARANTINE_IDS)]
        for table in tables:
            for row in table.to_pylist():
                self.ledger.absorb_part(row)
        self.last_seq = self.manifest.last_seq
        if self.quarantine.last_seq > self.last_seq:
            first = first_seq(self._store, self.last_seq)
            if first is None or first > self.quarantine.last_seq:  # `_state/` was deleted: numbers go on behind both
                self.last_seq = self.quarantine.last_seq
        self.quarantine.last_seq = max(self.quarantine.last_seq, self.manifest.last_seq)
        self.max_epoch = max(self.manifest.max_epoch, self.quarantine.max_epoch)

    def catch_up(self) -> None:
        """Read the journal from where we are to its end.

        Raises:
            JournalBroken: Entries that were there are gone, though not all of them.
        """
        for entry in read_entries(self._store, self.last_seq):
            self.absorb(entry)
        if self.last_seq < self.quarantine.last_seq:  # new entries would take numbers that its parts cover already
            raise hole_in_journal(self._store, self.last_seq + 1, f"parts cover entry {self.quarantine.last_seq}")

    def absorb(self, entry: Entry) -> None:
        """Take in the next entry of the journal.

        Raises:
            JournalBroken: It contradicts what came before.
        """
        assert entry.seq == self.last_seq + 1
        self.last_seq = entry.seq
        self.max_epoch = max(self.max_epoch, entry.epoch)
        for row in entry.rows:
            if row["status"] == "succeeded":
                self.ledger.absorb(row)
                self.unpublished.append(CommittedRow.of(entry.seq, row))
            elif entry.seq > self.quarantine.last_seq:
                self.ledger.absorb(row)
                self.unpublished_quarantine.append(CommittedRow.of(entry.seq, row))
