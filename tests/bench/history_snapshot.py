"""What a snapshot of the rollout costs while generation goes on: a part of `rollout_history`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.bench.history_engine import Engine, make_plan
from tests.bench.rollout_rows import Settings
from workers.cache.table_snapshot import TableSnapshot

_PAIRS = 5


def snapshot_rows(
    engine: Engine,
    settings: Settings,
    chunk_seconds: Callable[[Any, int, Callable[[int], None]], Sequence[float]],
    *,
    compiled: bool,
) -> list[dict[str, Any]]:
    """Chunks with a snapshot under way beside chunks without, in turn, once the table is full.

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
    snapshot.begin()
    snapshot.finish()
    prepared = time.perf_counter() - began
    first = engine.chunks_to_fill
    num_chunks = first + 2 * _PAIRS

    def after_chunk(index: int) -> None:
        if index >= first and (index - first) % 2 == 0:
            snapshot.begin()

    rollout = engine.rollout.run(make_plan(engine, settings, num_chunks + 1))
    seconds = chunk_seconds(rollout, num_chunks, after_chunk)
    rollout.close()
    with_copy = seconds[first + 1 :: 2]
    without = seconds[first + 2 :: 2]
    began = time.perf_counter()
    if settings.device.type == "cuda":
        torch.cuda.synchronize()
    snapshot.begin()
    snapshot.finish()
    alone = time.perf_counter() - began
    slow, plain = statistics.median(with_copy), statistics.median(without)
    engine.table.before_change = None
    return [
        {
            "keys_per_layer": engine.sizes.num_keys_cached,
            "snapshot_gb": snapshot.num_bytes / 1e9,
            "copy_alone_s": alone,
            "chunk_ms": plain * 1e3,
            "chunk_ms_during_copy": slow * 1e3,
            "slowdown": slow / plain - 1,
            "buffers_made_s": prepared,
        }
    ]
