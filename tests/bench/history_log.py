"""What a chunk log costs while generation goes on, and what it takes to go on from one: a part of `rollout_history`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.history_engine import Engine, make_plan
from tests.bench.history_parts import ChunkClock
from tests.bench.history_snapshot import are_equal
from tests.bench.rollout_rows import Settings
from workers.rollouts.chunk_log import ChunkLog, path_of, replay_log
from workers.snapshot import RolloutId

_CYCLES = 5
"""Of as many chunks that are recorded as it takes for every layer to merge, and as many that are not."""
_COMPARED = 2
"""Chunks made once more after the table was built again."""
_ROLLOUT = RolloutId("bench", "random weights", "0", 7)


class _Turns:
    """Records the chunks before `first`, and from then on `num` chunks of every two times as many, each in a log.

    Args:
        engine: Whose rollout is recorded.
        folder: Of all logs; that of the first chunks is `folder / "0"`.
        first: Chunk with which turns begin.
        num: Of chunks in a turn.
    """

    def __init__(self, engine: Engine, folder: Path, first: int, num: int) -> None:
        tiles, device = engine.chooser.num_tiles, engine.rollout.device
        self._logs = [ChunkLog(folder / str(turn), _ROLLOUT, tiles, device) for turn in range(1 + _CYCLES)]
        self._first, self._num = first, num
        self.stop = first + 2 * num * _CYCLES
        self.record_s: list[float] = []

    def record(self, index: int, latents: Tensor, lists: Sequence[Tensor]) -> Callable[[], None]:
        cycle, place = divmod(index - self._first, 2 * self._num)
        if index >= self._first and (place >= self._num or cycle >= _CYCLES):
            return lambda: None
        log = self._logs[cycle + 1 if index >= self._first else 0]
        began = time.perf_counter()
        wait = log.record(index, latents, lists)
        self.record_s.append(time.perf_counter() - began)
        return wait

    def split(self, seconds: Sequence[float]) -> tuple[list[float], list[float]]:
        """Of chunks that were recorded, and of those that were not."""
        cycles = [seconds[self._first + 2 * self._num * cycle :][: 2 * self._num] for cycle in range(_CYCLES)]
        return [s for c in cycles for s in c[: self._num]], [s for c in cycles for s in c[self._num :]]

    def close(self) -> None:
        for log in self._logs:
            log.close()


def log_row(engine: Engine, settings: Settings) -> dict[str, Any]:
    """A rollout recorded from its first chunk until after the table is full, then in turns; and replayed.

    Args:
        engine: Warmed up.
        settings: Of the bench.
    """
    with tempfile.TemporaryDirectory() as folder:
        spare = engine.sizes.spare_chunks
        num_logged = engine.chunks_to_fill + 2 * spare
        turns = _Turns(engine, Path(folder), num_logged, spare)
        seconds, state, latents = _roll(engine, settings, turns, num_logged)
        sizes = [path_of(Path(folder) / "0", index).stat().st_size for index in range(num_logged)]
        replayed, replay_s, is_equal = _replay(engine, settings, Path(folder) / "0", state)
        state.clear()
        plan = make_plan(engine, settings, num_logged + _COMPARED + 1)
        again = engine.rollout.run(plan, num_logged)
        goes_on = [torch.equal(chunk.latents_BTCHW, then) for then, chunk in zip(latents, again, strict=False)]
        again.close()
    recorded, plain = turns.split(seconds)
    full_ms = statistics.median(replayed[-2 * spare :]) * 1e3
    rest = settings.num_chunks - 1 - num_logged  # the last chunk becomes no history
    chunk = statistics.median(plain)
    return {
        "keys_per_layer": engine.sizes.num_keys_cached,
        "log_mb_per_chunk": sizes[-1] / 1e6,
        "log_mb_per_chunk_before_merging": sizes[0] / 1e6,
        "log_gb_all_frames": (sum(sizes) + sizes[-1] * rest) / 1e9,
        "chunk_ms": chunk * 1e3,
        "chunk_ms_recorded": statistics.median(recorded) * 1e3,
        "slowdown": statistics.median(recorded) / chunk - 1,
        "slowdown_of_means": statistics.mean(recorded) / statistics.mean(plain) - 1,
        "record_on_host_ms": statistics.median(turns.record_s) * 1e3,
        "record_on_host_ms_at_most": max(turns.record_s) * 1e3,
        "chunks_replayed": num_logged,
        "replay_s": replay_s,
        "replayed_chunk_ms_full": full_ms,
        "replay_s_all_frames": replay_s + rest * full_ms / 1e3,
        "table_is_equal": is_equal,
        "goes_on_equal": len(goes_on) == _COMPARED and all(goes_on),
    }


def _roll(
    engine: Engine, settings: Settings, turns: _Turns, num_logged: int
) -> tuple[list[float], dict[str, Tensor], list[Tensor]]:
    """Seconds of each chunk, the table when the log of the first chunks ends, latents of the chunks behind that."""
    engine.table.clear()
    state: dict[str, Tensor] = {}
    latents: list[Tensor] = []
    clock = ChunkClock(settings.device)
    rollout = engine.rollout.run(make_plan(engine, settings, turns.stop + 2), record=turns.record)
    for chunk in rollout:
        clock.tick()
        if chunk.index + 1 == num_logged:
            state = copy_of(engine.table.state())
        elif num_logged <= chunk.index < num_logged + _COMPARED:
            latents.append(chunk.latents_BTCHW.clone())
        if chunk.index + 1 == turns.stop:
            break
    rollout.close()
    turns.close()
    return clock.seconds(), state, latents


def _replay(
    engine: Engine, settings: Settings, folder: Path, state: Mapping[str, Tensor]
) -> tuple[list[float], float, bool]:
    """Seconds from clean pass to clean pass, those of all of it, and whether the table is the same."""
    engine.table.clear()
    _synchronize(settings)
    clock, began = ChunkClock(settings.device), time.perf_counter()

    def mark(part: str) -> None:
        if part == "calls":  # there is one in a chunk
            clock.tick()

    engine.rollout.on_part = mark
    num_chunks = len(list(folder.iterdir()))
    replay_log(folder, _ROLLOUT, engine.rollout, make_plan(engine, settings, num_chunks + 1))
    engine.rollout.on_part = None
    _synchronize(settings)
    replay_s = time.perf_counter() - began
    return clock.seconds(), replay_s, are_equal(engine.table.state(), state)


def copy_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in state.items()}


def _synchronize(settings: Settings) -> None:
    if settings.device.type == "cuda":
        torch.cuda.synchronize()
