"""Where the time of a chunk goes, measured in the chunk itself, so that the parts add up to the whole.

Events between the calls of the model and the parts of taking over a chunk lie on the stream of a rollout as it runs;
what a call consists of is read off a profile of its replay, and what no kernel accounts for is a row of its own. Beside
parts stand the bytes and operations that they cannot do without (`least_work.py`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tests.bench.history_engine import Engine, make_plan
from tests.bench.least_work import PASSES, UNPACKING, least_work, milliseconds_of
from tests.bench.rollout_rows import Settings
from workers.model.static_layers import linear_gelu

_UPKEEP = ("selection", "moving chunks", "matching", "merging", "packing")
COMPRESSION = (*_UPKEEP, "unpacking", UNPACKING)
_KINDS = (
    (UNPACKING, re.compile("unpack_(tiles|slots|coded)")),
    ("attention", re.compile("flash|attend_rows|attend_listed|^attend$|^join$", re.I)),
    ("queries and own keys to 8 bits", re.compile("^code$")),
    ("composition", re.compile("compose_rows")),
    ("linear layers", re.compile("nvjet|gemm|cutlass|cublas", re.I)),
)


class ChunkClock:
    """Seconds between ticks: by CUDA events where there are any, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.tick()

    def tick(self) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if self._is_cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


def parts_of_chunk(engine: Engine, settings: Settings) -> tuple[list[dict[str, Any]], float]:
    """Rows, the sum last; and the share of selection, matching, merging and moving. The table must be full."""
    spans = spans_of_chunk(engine, settings, 2 * engine.sizes.spare_chunks)
    whole = sum(spans.values())
    calls = spans.pop("calls") if settings.device.type == "cuda" else 0.0
    parts = dict(spans)
    if calls:
        parts |= kinds_of_calls(engine, calls)
    work = least_work(engine)
    rows = []
    for part, ms in parts.items():
        row: dict[str, Any] = {"part": part, "ms_per_chunk": round(ms, 3), "share": ms / whole}
        if part in work and ms > 0:
            gigabytes, tera = work[part]
            row |= {"least_gb": gigabytes, "least_ms": milliseconds_of(gigabytes), "gb_per_s": gigabytes / ms * 1e3}
            row |= {"least_tflop": tera, "tflop_per_s": tera / ms * 1e3}
        rows.append(row)
    rows.append({"part": "sum of the parts", "ms_per_chunk": round(sum(parts.values()), 3), "share": 1.0})
    return rows, sum(parts.get(part, 0.0) for part in COMPRESSION) / whole


def upkeep_share(rows: list[dict[str, Any]]) -> float:
    """Of `parts_of_chunk`, what compression takes without reading codes, which stands for reading 16 bits."""
    return sum(float(row["share"]) for row in rows if row["part"] in _UPKEEP)


def spans_of_chunk(engine: Engine, settings: Settings, num_chunks: int) -> dict[str, float]:
    """Milliseconds a chunk between events of a rollout as it runs; calls of the model are one part."""
    first = engine.table.layers[0].num_chunks
    names: list[str] = []
    clock = ChunkClock(settings.device)

    def mark(name: str) -> None:
        clock.tick()
        names.append(name)

    rollout = engine.rollout.run(make_plan(engine, settings, first + num_chunks + 4), first)
    for chunk in rollout:
        if chunk.index == first + 1:
            clock = ChunkClock(settings.device)
            engine.table.on_part = engine.rollout.on_part = mark
        if chunk.index == first + 1 + num_chunks:
            break
    engine.table.on_part = engine.rollout.on_part = None
    rollout.close()
    total: dict[str, float] = {}
    for name, seconds in zip(names, clock.seconds(), strict=True):
        total[name] = total.get(name, 0.0) + seconds * 1e3 / num_chunks
    return total


def whole_chunk_ms(engine: Engine, settings: Settings, num_chunks: int) -> float:
    """Milliseconds a chunk of a rollout that goes on, nothing marked in it."""
    first = engine.table.layers[0].num_chunks
    clock = ChunkClock(settings.device)
    rollout = engine.rollout.run(make_plan(engine, settings, first + num_chunks + 4), first)
    for chunk in rollout:
        if chunk.index == first + 1:
            clock = ChunkClock(settings.device)
        elif chunk.index > first + 1:
            clock.tick()
        if chunk.index == first + 1 + num_chunks:
            break
    rollout.close()
    return sum(clock.seconds()) * 1e3 / num_chunks


def kinds_of_calls(engine: Engine, whole_ms: float) -> dict[str, float]:
    """What the calls of a chunk consist of, by kind of kernel, one after the other; the rest is idle."""
    rollout, is_apart = engine.rollout, engine.variant.history_at is not None
    rollout.attend_at_once(False)  # times of kernels that run side by side do not add up
    # First the call that chooses: one that does not reads the tiles that the call before it asked for, and where those
    # are a clean pass's, most of its own hold what another layer left there, which 8-bit products take longer for.
    choosing, looking = (_by_kind(lambda c=choose: rollout.replay(c)) for choose in (True, False))  # type: ignore[misc]
    clean = _by_kind(lambda: rollout.replay(False, clean=True))
    taking = _by_kind(lambda: rollout.replay(False, False)) if is_apart else looking
    numbers = (engine.num_looking - 1, 1, engine.num_calls - engine.num_looking)
    calls = list(zip((looking, clean, taking), numbers, strict=True))
    kinds = looking | clean | taking
    found = {kind: sum(call.get(kind, 0.0) * num for call, num in calls) for kind in kinds}
    if is_apart:  # a call that takes attends to what all see and to nothing else
        found["attention to own keys"] = taking["attention"] * engine.num_calls
        found["attention to the history"] = found.pop("attention") - found["attention to own keys"]
    more = choosing.get(UNPACKING, 0.0) - looking.get(UNPACKING, 0.0)
    found["selection"] = (sum(choosing.values()) - sum(looking.values()) - more) * len(engine.choose_at)
    if UNPACKING in choosing:
        found[UNPACKING] = found.get(UNPACKING, 0.0) + more * len(engine.choose_at)
    rollout.attend_at_once(True)
    found["idle between kernels of a call, less what runs at once"] = whole_ms - sum(found.values())
    return found


def _by_kind(run: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one call."""
    found: dict[str, float] = {}
    for name, (ms, _) in kernel_times(run).items():
        kind = next((kind for kind, pattern in _KINDS if pattern.search(name)), PASSES)
        found[kind] = found.get(kind, 0.0) + ms
    return found


def kernel_times(run: Callable[[], None], times: int = 3) -> dict[str, tuple[float, float]]:
    """Milliseconds and calls by kernel, of one run on average."""
    run()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    return {
        event.key: (event.device_time_total / 1e3 / times, event.count / times)
        for event in profile.key_averages()
        if event.device_time_total
    }


def feed_forward_rows(settings: Settings, times: int = 20) -> list[dict[str, Any]]:
    """GELU at the end of the first product of a feed-forward, and as a pass after it: time, and how far they differ."""
    backbone = settings.backbone
    tokens = settings.frame_tokens * backbone.chunk_latent_frames
    shapes = (tokens, backbone.dim), (backbone.ffn_dim, backbone.dim)
    x, weight = (torch.randn(shape, device=settings.device).to(settings.dtype) for shape in shapes)
    up = weight / backbone.dim**0.5, weight[:, 0].clone()
    after = torch.compile(lambda: F.gelu(F.linear(x, *up), approximate="tanh"))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "GELU in the product": lambda: linear_gelu(x, *up),
        "GELU after the product": after,
    }
    found, rows = [], []
    for name, way in ways.items():
        ms = sum(ms for ms, _ in kernel_times(lambda way=way: way(), times).values())  # type: ignore[misc]
        found.append(way().float())
        rows.append({"kernel": f"one layer: {name}", "calls": 1, "ms": round(ms, 4)})
    error = float((found[0] - found[1]).square().mean().sqrt() / found[1].square().mean().sqrt())
    rows[0]["kernel"] += f" (differs by {error:.1e})"
    return rows


def top_kernels(engine: Engine, num: int = 20) -> list[dict[str, Any]]:
    """GPU time by kernel over one captured call with a choice of tiles, and over taking over a chunk."""
    rows = []
    runs: dict[str, Callable[[], None]] = {"call": lambda: engine.rollout.replay(True)}
    if engine.variant.history_at is not None:
        runs["call that takes the history"] = lambda: engine.rollout.replay(False, False)
    runs["chunk taken over"] = lambda: engine.rollout.remember(engine.position)
    for what, run in runs.items():
        spare = engine.sizes.spare_chunks if what == "chunk taken over" else 3  # each layer merges once
        times = sorted(kernel_times(run, spare).items(), key=lambda item: -item[1][0])
        rows += [
            {"kernel": f"{what}: {name[:80]}", "calls": calls, "ms": round(ms, 3)} for name, (ms, calls) in times[:num]
        ]
    return rows
