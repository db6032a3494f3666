"""What a snapshot of the rollout costs while generation goes on: a part of `rollout_history`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.bench.history_engine import Engine, make_plan
from tests.bench.rollout_rows import Settings
from workers.cache.table_snapshot import TableSnapshot

_CYCLES = 5
"""Of as many chunks with a snapshot under way as it takes, and as many without."""


class _Turns:
    """Begins and finishes snapshots between chunks; the last begins where one was taken at rest.

    Args:
        snapshot: Of the table that the chunks come to.
        first: Chunk after which the first one begins.
        num_chunks: Over which one is spread.
    """

    def __init__(self, snapshot: TableSnapshot, first: int, num_chunks: int) -> None:
        self._snapshot, self._first, self._num = snapshot, first, num_chunks
        self._at_rest: dict[str, Tensor] = {}
        self._compared_at = first + 2 * num_chunks * _CYCLES
        self.last = self._compared_at + num_chunks
        self.begin_s: list[float] = []
        self.num_bytes = 0
        self.is_equal = False

    def after_chunk(self, index: int) -> None:
        place = (index - self._first) % (2 * self._num)
        if index < self._first or place not in (0, self._num):
            return
        if place == self._num:
            state = self._snapshot.finish()
            self.num_bytes = size_of(state)
            self.is_equal = index == self.last and are_equal(state, self._at_rest)
            return
        if index == self._compared_at:
            self._snapshot.begin()
            self._at_rest = {name: x.clone() for name, x in self._snapshot.finish().items()}
        began = time.perf_counter()
        self._snapshot.begin()
        self.begin_s.append(time.perf_counter() - began)

    def split(self, seconds: Sequence[float]) -> tuple[list[list[float]], list[float]]:
        """Chunks with a snapshot under way, by snapshot, and those without."""
        cycles = [seconds[self._first + 1 + 2 * self._num * cycle :][: 2 * self._num] for cycle in range(_CYCLES)]
        return [list(c[: self._num]) for c in cycles], [s for c in cycles for s in c[self._num :]]


def snapshot_row(
    engine: Engine,
    settings: Settings,
    chunk_seconds: Callable[[Any, int, Callable[[int], None]], Sequence[float]],
    *,
    compiled: bool,
) -> dict[str, Any]:
    """Chunks with a snapshot under way beside chunks without, in turn, once the table is full.

    It takes as many chunks as layers take to merge one after another, so both kinds merge the same layers.

    Args:
        engine: Warmed up.
        settings: Of the bench.
        chunk_seconds: (rollout, chunks, after_chunk) -> seconds of each chunk.
        compiled: Fuse the encoding.
    """
    engine.table.clear()
    began = time.perf_counter()
    snapshot = TableSnapshot(engine.table)
    if compiled:
        snapshot.compile()
    time_alone(snapshot, settings)
    prepared = time.perf_counter() - began
    spare = engine.sizes.spare_chunks
    turns = _Turns(snapshot, engine.chunks_to_fill, spare)
    rollout = engine.rollout.run(make_plan(engine, settings, turns.last + 2))
    during, plain = turns.split(chunk_seconds(rollout, turns.last + 1, turns.after_chunk))
    rollout.close()
    alone = time_alone(snapshot, settings)
    engine.table.before_change = lambda layer_index, is_history: None
    every, chunk = [s for one in during for s in one], statistics.median(plain)
    return {
        "keys_per_layer": engine.sizes.num_keys_cached,
        "snapshot_gb": turns.num_bytes / 1e9,
        "equals_one_at_rest": turns.is_equal,
        "copy_alone_s": alone,
        "chunks_it_takes": spare,
        "chunk_ms": chunk * 1e3,
        "chunk_ms_during_copy": statistics.median(every) * 1e3,
        "slowdown": statistics.median(every) / chunk - 1,
        "slowdown_of_means": statistics.mean(every) / statistics.mean(plain) - 1,
        "slowdown_first_chunk": statistics.median(one[0] for one in during) / chunk - 1,
        "begin_on_host_ms": statistics.median(turns.begin_s) * 1e3,
        "buffers_made_s": prepared,
    }


def size_of(state: Mapping[str, Tensor]) -> int:
    return sum(x.nbytes for x in state.values())


def are_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in found.items())


def time_alone(snapshot: TableSnapshot, settings: Settings) -> float:
    """Seconds of a snapshot with nothing beside it."""
    if settings.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    snapshot.begin()
    snapshot.finish()
    return time.perf_counter() - began
