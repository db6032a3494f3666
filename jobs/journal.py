"""The journal: one total order of all decisions of a job, as numbered objects made by put_if_absent.

A row is committed the moment its entry exists. A driver replays, writes `begin` at the next free number and only then
acts; from there on it is the only writer, because any older driver must pass that number and finds it taken
(docs/commit-protocol.md).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json, to_json

from cluster.errors import NotFound, OutcomeUnknown, StoreUnavailable
from cluster.object_store import ObjectStore, put_in_order
from jobs.errors import JournalBroken, LeaseLost

logger = logging.getLogger(__name__)

PREFIX = "_state/journal/"
READ_THREADS = 16  # a replay on S3 is bound by round trips
READ_WINDOW = 512  # entries asked for at once: bounds memory
EntryKind = Literal["begin", "rows", "end"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision: `seq` is its place in the order, `rows` the rows that it commits."""

    seq: int
    kind: EntryKind
    epoch: int
    nonce: str
    rows: tuple[dict[str, Any], ...] = ()


def key_of(seq: int) -> str:
    """Object key of an entry."""
    return f"{PREFIX}{seq:010d}.json"


def encode_row(row: dict[str, Any]) -> bytes:
    """One row as it will stand in an entry; NaN stays NaN, since only we read entries."""
    return to_json(row, inf_nan_mode="constants")


def read_entries(store: ObjectStore, after_seq: int) -> Iterator[Entry]:
    """All entries with a higher number, in order, to the end of the journal.

    Raises:
        JournalBroken: A number is missing although a later one exists.
    """
    newest = max(_listed(store, after_seq), default=after_seq)
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="journal") as threads:
        for first in range(after_seq + 1, newest + 1, READ_WINDOW):
            yield from threads.map(lambda seq: _read(store, seq), range(first, min(first + READ_WINDOW, newest + 1)))
    seq = newest + 1
    while (entry := read_entry(store, seq)) is not None:  # those that came while we were reading
        yield entry
        seq += 1


def first_seq(store: ObjectStore, after_seq: int) -> int | None:
    """The lowest number above `after_seq` that exists, or None."""
    return next(_listed(store, after_seq), None)


def read_entry(store: ObjectStore, seq: int) -> Entry | None:
    """The entry at `seq`, or None if the journal ends before it."""
    try:
        return _decode(seq, store.get(key_of(seq)))
    except NotFound:
        return None


def _listed(store: ObjectStore, after_seq: int) -> Iterator[int]:
    for info in store.list(PREFIX, start_after=key_of(after_seq)):
        yield int(info.key[len(PREFIX) :].split(".")[0])


def _decode(seq: int, data: bytes) -> Entry:
    body = from_json(data)
    return Entry(seq, body["kind"], body["epoch"], body["nonce"], tuple(body.get("rows", ())))


def _read(store: ObjectStore, seq: int) -> Entry:
    entry = read_entry(store, seq)
    if entry is None:
        raise hole_in_journal(store, seq, "later entries exist")
    return entry


def hole_in_journal(store: ObjectStore, seq: int, why: str) -> JournalBroken:
    """The refusal of half a journal, with the way out."""
    return JournalBroken(
        f"{store.url}/{key_of(seq)} is missing although {why}. If a lifecycle rule removed it, delete the rest of "
        f"{store.url}/{PREFIX} too and start again: manifest and quarantine parts are a complete record of what they "
        "name, and what no part names is rendered again"
    )


class JournalWriter:
    """The pen of one driver. After LeaseLost, or an append whose outcome stayed open, it never writes again.

    Not safe for several threads; the commit thread owns it.
    """

    def __init__(self, store: ObjectStore, *, epoch: int, nonce: str, last_seq: int) -> None:
        self._store = store
        self._epoch = epoch
        self._nonce = nonce
        self._next = last_seq + 1
        self._is_closed = False

    @property
    def last_seq(self) -> int:
        """Number of the last entry known to exist."""
        return self._next - 1

    def begin(self) -> Iterator[Entry]:
        """Take the journal over: yields the entries of older epochs that still landed, ends when ours stands.

        Raises:
            LeaseLost: A higher epoch has begun.
        """
        while (entry := self._put(self._next, "begin", ())) is not None:
            if entry.epoch >= self._epoch:
                raise self._lost_to(entry)
            yield entry
            self._next += 1
        self._next += 1

    def append(self, rows: Sequence[bytes], kind: EntryKind = "rows") -> int:
        """Commit rows (see `encode_row`) as one entry and return its number.

        Raises:
            LeaseLost: Another driver has begun; nothing was written.
            OutcomeUnknown, StoreUnavailable: Ask again with the same rows, or stop for ever.
        """
        if self._is_closed:
            raise LeaseLost("this driver has lost its job and writes no more")
        seq = self._next
        entry = self._put(seq, kind, rows)
        if entry is not None:
            raise self._lost_to(entry)
        self._next = seq + 1
        return seq

    def append_some(self, rows: Sequence[bytes]) -> int:
        """Commit rows as one entry each, in order; returns how many, at least one.

        Raises:
            As `append`. Some of the rows may stand in the journal then: ask again with the same ones.
        """
        assert rows
        if self._is_closed:
            raise LeaseLost("this driver has lost its job and writes no more")
        items = [(key_of(self._next + i), self._encode("rows", [row])) for i, row in enumerate(rows)]
        count = put_in_order(self._store, items)
        self._next += count
        if not count:  # taken: by our own try before, whose answer was lost, or by another driver
            self.append(rows[:1])
            count = 1
        return count

    def _encode(self, kind: EntryKind, rows: Sequence[bytes]) -> bytes:
        head = to_json({"kind": kind, "epoch": self._epoch, "nonce": self._nonce})
        return head if not rows else head[:-1] + b',"rows":[' + b",".join(rows) + b"]}"

    def _put(self, seq: int, kind: EntryKind, rows: Sequence[bytes]) -> Entry | None:
        """Write ours at `seq`: None when it stands there, else the entry of another driver that does."""
        data = self._encode(kind, rows)
        if self._store.put_if_absent(key_of(seq), data):
            return None
        found = self._store.get(key_of(seq))
        if found == data:  # an earlier try of ours, whose answer was lost
            return None
        entry = _decode(seq, found)
        if (entry.epoch, entry.nonce) == (self._epoch, self._nonce):
            raise JournalBroken(f"{key_of(seq)} holds other rows of this driver: an append was not repeated as it was")
        return entry

    def _lost_to(self, entry: Entry) -> LeaseLost:
        self._is_closed = True
        return LeaseLost(f"epoch {entry.epoch} has begun at entry {entry.seq}; ours was {self._epoch}")


RETRY_THESE = (OutcomeUnknown, StoreUnavailable)
"""What an append may be asked again after, with the same rows: its bytes are the same, so it can land only once."""
