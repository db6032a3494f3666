"""A compact set of names: 64-bit fingerprints in open-addressed tables, about 17 bytes a name instead of 150.

A job of a million tasks keeps its settled tasks here. Two names share a fingerprint with a probability of about
n^2 / 2^65: 3e-8 for a million. There is no removal; who needs it keeps a small set of exceptions beside (ledger.py).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

NUM_TABLES = 256  # split by the top byte: a table that grows is a 256th of the whole, so growing needs no spare memory
FIRST_SLOTS = 8
MAX_FILL = 0.75  # linear probing stays at about two looks up to here


def fingerprint(name: str) -> int:
    """64 bits of BLAKE2b of a name; never 0, which marks an empty slot."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") or 1


class IdSet:
    """A growing set of names; `in`, `add` and `len` only."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._tables = [array("Q", bytes(8 * FIRST_SLOTS)) for _ in range(NUM_TABLES)]
        self._used = [0] * NUM_TABLES
        self._count = 0
        for name in names:
            self.add(name)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: str) -> bool:
        if not self._count:  # a job without failures asks its empty sets for every task
            return False
        key = fingerprint(name)
        table = self._tables[key >> 56]
        return table[_slot_of(table, key)] == key

    def add(self, name: str) -> bool:
        """Add a name; True if it was new."""
        key = fingerprint(name)
        index = key >> 56
        table = self._tables[index]
        slot = _slot_of(table, key)
        if table[slot] == key:
            return False
        table[slot] = key
        self._used[index] += 1
        self._count += 1
        if self._used[index] > MAX_FILL * len(table):
            self._tables[index] = _doubled(table)
        return True

    @property
    def num_bytes(self) -> int:
        """Bytes held by the tables."""
        return sum(table.itemsize * len(table) for table in self._tables)


def _slot_of(table: array[int], key: int) -> int:
    """The slot that holds `key`, or the empty one where it belongs; tables are a power of two and never full."""
    mask = len(table) - 1
    slot = key & mask
    while table[slot] not in (0, key):
        slot = (slot + 1) & mask
    return slot


def _doubled(table: array[int]) -> array[int]:
    larger = array("Q", bytes(2 * len(table) * table.itemsize))
    for key in table:
        if key:
            larger[_slot_of(larger, key)] = key
    return larger
