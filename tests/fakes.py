"""Small classes that behave: a store in memory, a store that loses answers, a clock that is turned by hand, a pool.

None of them records calls; tests look at what they did. FakePool runs a simulated cluster in virtual time.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cluster.errors import NotFound, OutcomeUnknown, StoreUnavailable
from cluster.object_store import ObjectInfo


class ManualClock:
    """Monotonic and wall time, moved by `advance` or by sleeping; the wall may jump on its own."""

    def __init__(self, start: datetime = datetime(2026, 11, 23, 22, tzinfo=UTC)) -> None:
        self._monotonic = 1000.0
        self._wall = start
        self.on_sleep: Callable[[float], None] | None = None

    def monotonic(self) -> float:
        return self._monotonic

    def utc_now(self) -> datetime:
        return self._wall

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)
        if self.on_sleep is not None:
            self.on_sleep(seconds)

    def advance(self, seconds: float) -> None:
        self._monotonic += seconds
        self._wall += timedelta(seconds=seconds)

    def jump_wall(self, seconds: float) -> None:
        """What NTP or an operator does; monotonic time does not notice."""
        self._wall += timedelta(seconds=seconds)


class MemoryStore:
    """An ObjectStore in a dictionary; safe for threads. Its calls can be counted."""

    def __init__(self, url: str = "memory://job") -> None:
        self.url = url
        self.objects: dict[str, bytes] = {}
        self.num_calls = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes:
        with self._lock:
            self.num_calls += 1
            if key not in self.objects:
                raise NotFound(key)
            return self.objects[key]

    def size(self, key: str) -> int | None:
        with self._lock:
            self.num_calls += 1
            return len(self.objects[key]) if key in self.objects else None

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        with self._lock:
            self.num_calls += 1
            found = sorted(key for key in self.objects if key.startswith(prefix) and key > start_after)
            infos = [ObjectInfo(key, len(self.objects[key])) for key in found]
        yield from infos

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self.num_calls += 1
            self.objects[key] = data

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._lock:
            self.num_calls += 1
            if key in self.objects:
                return False
            self.objects[key] = data
            return True

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def get_file(self, key: str, path: Path) -> None:
        path.write_bytes(self.get(key))

    def delete(self, keys: Iterable[str]) -> None:
        with self._lock:
            self.num_calls += 1
            for key in keys:
                self.objects.pop(key, None)


class FlakyStore(MemoryStore):
    """A network between a client and a shared MemoryStore: requests fail before, or answers are lost after the fact.

    Failures come from a seeded generator; `faults` is the probability of either kind for each call.
    """

    def __init__(self, backing: MemoryStore, *, seed: int, faults: float) -> None:
        super().__init__(backing.url)
        self.objects = backing.objects
        self._backing = backing
        self._random = random.Random(seed)
        self.faults = faults

    def get(self, key: str) -> bytes:
        self._fail_before()
        return self._backing.get(key)

    def size(self, key: str) -> int | None:
        self._fail_before()
        return self._backing.size(key)

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        self._fail_before()
        yield from self._backing.list(prefix, start_after=start_after)

    def put(self, key: str, data: bytes) -> None:
        self._fail_before()
        self._backing.put(key, data)
        if self._random.random() < self.faults:
            raise StoreUnavailable("answer lost")

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._fail_before()
        is_ours = self._backing.put_if_absent(key, data)
        if self._random.random() < self.faults:
            raise OutcomeUnknown("answer lost")
        return is_ours

    def delete(self, keys: Iterable[str]) -> None:
        self._fail_before()
        self._backing.delete(keys)

    def _fail_before(self) -> None:
        if self._random.random() < self.faults:
            raise StoreUnavailable("connection reset before the request arrived")
