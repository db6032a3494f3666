"""The whole history through a tile table, at Wan2.1-1.3B sizes: a bench of its own, whose parts `rollout` uses too.

`python -m tests.bench.rollout_history --quick` checks the kernels at small sizes, says where a chunk's time goes and
rolls out one policy over 420 frames; without `--quick` all rows, those of the whole policy over all frames. Random
weights: time and memory are those of the sizes, densities and budgets that stand in each row. Rows called `pairs` merge
as `quality_tables` measures it; their numbers are the latent frames kept and seen, and `int4` is how their history
lies. Rows called `once` look at the history in the first step of a chunk and in the clean pass alone. A table of 180 is
full after 61 chunks: `--frames` below 800 measures less. A part that fails says so and takes no other along.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.bench.history_checks import check_compiled, choose_attend, choose_kernels, choose_nearest
from tests.bench.history_engine import (
    ALL,
    Compiled,
    Engine,
    Variant,
    choose_fp8_of,
    make_engine,
    make_plan,
    read_changes,
    warm_up,
)
from tests.bench.history_log import log_row
from tests.bench.history_once import ONCE, choose_parted
from tests.bench.history_parts import (
    ChunkClock,
    feed_forward_rows,
    parts_of_chunk,
    top_kernels,
    upkeep_share,
    whole_chunk_ms,
)
from tests.bench.history_snapshot import snapshot_row
from tests.bench.least_work import BYTES_NOTE
from tests.bench.record import report
from tests.bench.rollout_models import make_vae, seconds_with_pictures
from tests.bench.rollout_rows import RowResult, Settings, release_memory
from workers.assemble_tiles import tile_runs
from workers.cache.packed_table import PackedTable
from workers.kernels.listed_tiles import AttendTable, ListedName
from workers.model.backbones import find_backbone
from workers.search.nearest_rows import NearestRows, nearest_rows

VARIANTS = {
    v.name: v
    for v in (
        Variant("fastar-quant", estimate="quant", with_pictures=True),
        Variant("fastar-lsh", estimate="lsh"),
        Variant("fastar-exact", estimate="exact", with_pictures=True),
        Variant("fastar-dense-regions", density=0.05, always_sink=True, always_recent=True),
        Variant("fastar-20%", density=0.2),
        Variant("fastar-fp8", fp8="large", with_pictures=True),
        Variant("fastar-layers", estimate="quant", kernels=False),
        Variant("pairs", estimate="quant", rule="pairs"),
        Variant("pairs-exact", estimate="exact", rule="pairs"),
        Variant("pairs-57-seen-12", estimate="quant", rule="pairs", kept_chunks=12, density=12 / 57),
        *(
            Variant(f"pairs-120-seen-{seen}", estimate="quant", rule="pairs", kept_chunks=33, density=seen / 120)
            for seen in (6, 12, 24, 48)
        ),
        *ONCE,
        *(
            Variant(
                f"pairs-{slots}-seen-12-int4",
                kept,
                spare,
                rule="pairs",
                storage="int4",
                estimate="quant",
                density=12 / slots,
            )
            for slots, kept, spare in ((180, 48, 10), (186, 55, 5), (240, 68, 10))
        ),
        Variant("tempcache", density=1.0, whole=False),
        Variant("annsa", density=0.28, kept_chunks=34, whole=False),
    )
}
_TO_400 = 35  # chunks: frame 400 is in the 34th


@dataclass
class _Choices:
    """What the checks of this process found; rows made by `rollout` ask for it too."""

    attend: AttendTable | None = None
    attend_name: ListedName = "torch"
    parted_name: ListedName = "torch"
    """Of attention in two parts."""
    nearest: NearestRows = nearest_rows
    compiled: Compiled = ()
    kernels: tuple[str, ...] = ()
    is_checked: bool = False


_CHOICES = _Choices()


def check(settings: Settings, kernels: str = "auto", *, compiled: bool = True) -> list[str]:
    """Once per process: which kernel and whether to compile, by comparing at small sizes; lines that say so."""
    if _CHOICES.is_checked:
        return []
    name, attend, lines = choose_attend(settings, kernels)
    _CHOICES.attend, _CHOICES.attend_name, _CHOICES.is_checked = attend, name, True
    _CHOICES.nearest, line = choose_nearest(settings, kernels)
    lines.append(line)
    _CHOICES.parted_name, line = choose_parted(settings, name)
    lines.append(line)
    _CHOICES.kernels, kernel_lines = choose_kernels(settings)
    lines += kernel_lines
    if compiled and settings.device.type == "cuda":
        torch._dynamo.config.recompile_limit = 256  # every variant has other strides
        for parts in (ALL, ("layers", "chooser"), ("layers",)):
            is_equal, line = check_compiled(settings, attend, _CHOICES.nearest, parts, _CHOICES.kernels)
            lines.append(line)
            if is_equal:
                _CHOICES.compiled = parts
                break
    for line in lines:
        say(line)
    return lines


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def choices(settings: Settings) -> _Choices:
    """Those of this process, made now if they were not."""
    check(settings)
    return _CHOICES


def compression_share(engine: Engine, settings: Settings) -> float:
    """Of selection, matching, merging and moving in a chunk, once the table is full."""
    return parts_of_chunk(engine, settings)[1]


def engine_for(variant: Variant, settings: Settings) -> Engine:
    check(settings)
    return make_engine(
        variant,
        settings,
        _CHOICES.attend,
        "inductor",
        _CHOICES.nearest,
        _CHOICES.compiled,
        kernels=_CHOICES.kernels,
        attend_name=_CHOICES.parted_name,
    )


def roll(engine: Engine, settings: Settings, num_chunks: int) -> tuple[list[float], dict[int, float], float]:
    """Seconds of each chunk, peak GB when so many chunks were made, density at the end."""
    engine.table.clear()
    release_memory(settings.device)
    peaks: dict[int, float] = {}
    clock, density = ChunkClock(settings.device), 1.0
    # One more chunk is planned than taken, so that each one taken has become history.
    rollout = engine.rollout.run(make_plan(engine, settings, num_chunks + 1))
    for chunk in rollout:
        clock.tick()
        density = chunk.density
        if chunk.index + 1 in (settings.backbone.num_chunks(600), num_chunks):
            peaks[chunk.index + 1] = peak_gb(settings.device)
        if chunk.index + 1 == num_chunks:
            break
    rollout.close()
    return clock.seconds(), peaks, density


def peak_gb(device: torch.device) -> float:
    """What torch holds of the GPU, captured graphs and free pieces included."""
    return torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0


def make_row(variant: Variant, settings: Settings) -> RowResult:
    engine = engine_for(variant, settings)
    say(f"{variant.name}: warming up")
    warm_up(engine, settings)
    num_chunks = settings.num_chunks if variant.whole else min(_TO_400, settings.num_chunks)
    seconds, peaks, _ = roll(engine, settings, num_chunks)
    frames = settings.chunk_frames

    def fps(first: int, stop: int) -> float | None:
        part = seconds[first // frames : stop // frames]
        return frames * len(part) / sum(part) if part and stop // frames <= len(seconds) else None

    is_whole = num_chunks == settings.num_chunks
    steady = sorted(seconds[-8:])[len(seconds[-8:]) // 2]
    total = sum(seconds) + steady * (settings.num_chunks - num_chunks)
    runs = tile_runs(engine.sizes, always_sink=variant.always_sink, always_recent=variant.always_recent)
    notes = [
        f"{engine.chooser.num_chosen} of {sum(b - a for a, b in runs.candidates)} cached tiles chosen, "
        f"{engine.chooser.num_early} until the table merges, {round(engine.slots_seen)} slots seen; "
        f"{_CHOICES.attend_name}; "
        f"compiled: {', '.join(_CHOICES.compiled) or 'nothing'}; "
        f"kernels: {', '.join(_CHOICES.kernels if variant.kernels else ()) or 'none'}; fp8: {variant.fp8}"
        f"{choose_fp8_of(variant, settings, _CHOICES.kernels).version}; "
        f"tiles chosen at steps {variant.choose_at}"
        + (
            ""
            if variant.history_at is None
            else f"; history looked at in steps {variant.history_at} and the clean pass"
        )
    ]
    if isinstance(engine.table, PackedTable):
        share = engine.table.seen_share
        notes.append(f"history in {engine.sizes.storage}; {share:.0%} of all tiles are seen by some query")
    if not is_whole:
        notes.append(f"measured over {num_chunks} chunks; seconds_3000_frames goes on at their last pace")
    # Said before pictures are measured: a row may run out of time there.
    last = fps(num_chunks * frames - 100, num_chunks * frames) if is_whole else None
    found = {"fps_300_400": fps(300, 400), "fps_last_100": last, "peak_gb": peaks, "seconds_3000_frames": total}
    say(f"{variant.name}: {json.dumps(found | {'chunk_ms': [round(s * 1e3, 1) for s in seconds[-10:]]})}")
    with_vae = attempt("pictures", lambda: fps_with_pictures(engine, settings)) if variant.with_pictures else None
    parts, share = parts_of_chunk(engine, settings)
    notes.append(f"compression {upkeep_share(parts):.1%} without reading codes")
    return RowResult(
        variant.name,
        fps_300_400=fps(300, 400),
        fps_last_100=last,
        fps_with_vae=with_vae,
        peak_gb_600=peaks.get(settings.backbone.num_chunks(600)),
        peak_gb_3000=peaks.get(num_chunks) if is_whole else None,
        seconds_3000_frames=total,
        cache_keys=engine.sizes.num_keys_cached,
        density=engine.slots_seen / (num_chunks * engine.sizes.chunk_tokens),
        compression_share=share,
        notes="; ".join(notes),
    )


def fps_with_pictures(engine: Engine, settings: Settings) -> float:
    """Going on from where the table is, each chunk's pictures decoded beside the next one and encoded."""
    vae, said = make_vae(settings)
    say(said)
    first = engine.table.layers[0].num_chunks
    chunks = engine.rollout.run(make_plan(engine, settings, first + settings.timed_chunks + 8), first)
    return settings.chunk_frames / seconds_with_pictures(chunks, vae, settings, settings.timed_chunks)


def where_time_goes(variant: Variant, settings: Settings) -> list[dict[str, Any]]:
    """The table of parts beside the time of a whole captured chunk."""
    engine = engine_for(variant, settings)
    warm_up(engine, settings)
    roll(engine, settings, min(engine.chunks_to_fill + 6, settings.num_chunks))
    # Groups grow, and chunks with them a little: so the whole is measured before the parts and after.
    num = 2 * engine.sizes.spare_chunks
    before = whole_chunk_ms(engine, settings, num)
    rows, share = parts_of_chunk(engine, settings)
    chunk_ms = (before + whole_chunk_ms(engine, settings, num)) / 2
    engine.hold(settings)
    parts_ms = rows[-1]["ms_per_chunk"]
    rows.append({"part": "a chunk, captured", "ms_per_chunk": round(chunk_ms, 3), "share": chunk_ms / parts_ms})
    say(
        f"{variant.name}: {chunk_ms:.1f} ms a chunk = {settings.chunk_frames / chunk_ms * 1e3:.1f} FPS; parts "
        f"{parts_ms:.1f} ms; compression {share:.1%}, {upkeep_share(rows):.1%} without reading codes; "
        f"peak {peak_gb(settings.device):.2f} GB"
    )
    if settings.device.type == "cuda":
        rows += attempt("kernels", lambda: top_kernels(engine)) or []
        rows += attempt("feed-forward", lambda: feed_forward_rows(settings)) or []
    return rows


def snapshots(variant: Variant, settings: Settings) -> list[dict[str, Any]]:
    """A row with all streams at one priority; on a GPU one more, where the rollout has a higher one than the copy."""
    is_cuda = settings.device.type == "cuda"

    def chunk_seconds(rollout: Iterator[Any], num_chunks: int, after_chunk: Callable[[int], None]) -> Sequence[float]:
        clock = ChunkClock(settings.device)
        for chunk in rollout:
            clock.tick()
            after_chunk(chunk.index)
            if chunk.index + 1 == num_chunks:
                break
        return clock.seconds()

    def make_row_at(priority: int) -> dict[str, Any]:
        release_memory(settings.device)
        own = torch.cuda.stream(torch.cuda.Stream(priority=priority)) if priority else nullcontext()
        with own:
            engine = engine_for(variant, settings)
            warm_up(engine, settings)
            row = snapshot_row(engine, settings, chunk_seconds, compiled="table" in _CHOICES.compiled)
            if is_cuda:
                torch.cuda.synchronize()
        return {"policy": variant.name, "rollout_priority": priority} | row | {"peak_gb": peak_gb(settings.device)}

    rows = []
    for priority in (0, -1) if is_cuda else (0,):
        row = attempt(f"snapshot at priority {priority}", lambda p=priority: make_row_at(p))
        rows += [] if row is None else [row]
        say(f"snapshot: {json.dumps(row)}")
    return rows


def chunk_logs(variant: Variant, settings: Settings) -> list[dict[str, Any]]:
    """One row."""
    engine = engine_for(variant, settings)
    warm_up(engine, settings)
    row = {"policy": variant.name} | log_row(engine, settings) | {"peak_gb": peak_gb(settings.device)}
    say(f"chunk log: {json.dumps(row)}")
    return [row]


def attempt(name: str, make: Callable[[], Any]) -> Any:
    """What it returns; None, said loudly, where it failed."""
    try:
        return make()
    except Exception as error:
        traceback.print_exc()
        say(f"{name} FAILED: {type(error).__name__}: {str(error)[:300]}")
        return None


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="checks, the table of parts, one row over 420 frames")
    parser.add_argument("--rows", nargs="*", default=None, choices=list(VARIANTS), help="rows, in this order")
    parser.add_argument("--parts", nargs="*", default=None, choices=list(VARIANTS), help="tables of where time goes")
    parser.add_argument(
        "--snapshot", nargs="?", const="pairs", choices=list(VARIANTS), help="what one costs while generation goes on"
    )
    parser.add_argument(
        "--chunk-log", nargs="?", const="fastar-tiles", choices=list(VARIANTS), help="what one costs, and to replay it"
    )
    parser.add_argument("--kernels", default="auto", choices=["auto", "flash-attn-4", "triton", "torch"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--backbone", default="self-forcing-1.3b")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of every variant: density=0.2 spare_chunks=7 ..."
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no part is begun after so many")
    parser.add_argument("--name", default="rollout-history", help="of the result file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    asked, began = parse(arguments), time.monotonic()
    backbone = find_backbone(asked.backbone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    frames = min(asked.frames, 420) if asked.quick else asked.frames
    settings = Settings(backbone, backbone.width, backbone.height, device, dtype, frames)
    lines = check(settings, asked.kernels, compiled=not asked.no_compile)
    rows_wanted = (["fastar-quant"] if asked.quick else list(VARIANTS)) if asked.rows is None else asked.rows
    parts_wanted = ["fastar-quant"] if asked.parts is None else asked.parts
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    results: list[dict[str, Any]] = []
    for name, is_row in [(n, False) for n in parts_wanted] + [(n, True) for n in rows_wanted]:
        variant = replace(VARIANTS[name], **read_changes(asked.set))
        if time.monotonic() - began > asked.seconds:
            say(f"{name}: not begun, the time given has run out")
            continue
        release_memory(device)
        if is_row:
            made = attempt(name, lambda v=variant: make_row(v, settings))
            results += [] if made is None else [asdict(made)]
            say(json.dumps(results[-1:] if made else []))
        else:
            made = attempt(name, lambda v=variant: where_time_goes(v, settings))
            tables += [] if made is None else [(name, made)]
        notes = " ".join(lines)
        if results:
            report(asked.name, results, notes)
        for part_name, table in tables[-1:] if not is_row else []:
            report(f"{asked.name}-parts-{part_name}", table, f"{BYTES_NOTE} {notes}")
    for what, name, make in (("snapshot", asked.snapshot, snapshots), ("chunk-log", asked.chunk_log, chunk_logs)):
        if name is None or time.monotonic() - began > asked.seconds:
            continue
        release_memory(device)
        variant = replace(VARIANTS[name], **read_changes(asked.set))
        made = attempt(what, lambda v=variant, m=make: m(v, settings))
        if made:
            report(f"{asked.name}-{what}", made, " ".join(lines))
    say(f"done after {time.monotonic() - began:.0f} s; results in {Path(__file__).parent / 'results'}")


if __name__ == "__main__":
    main(sys.argv[1:])
