"""`python -m tests.bench.unpack_coded` on a GPU: unpacking tiles of a packed layer into 8-bit floats, at the sizes of
Wan2.1-1.3B, beside a copy that moves as many bytes.

First bits against plain torch, each way of cutting the work; then its time where all tiles, 40% or 15% of them are
seen. Prints a line each; a minute, with `--quick` fewer ways.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.bench.fp8_attention import milliseconds
from tests.bench.full_table import SIZES, changed
from tests.bench.packed_speed import seconds
from tests.packed_checks import check_unpack_coded, draw_table
from workers.cache import unpack_coded
from workers.cache.packed_history import PackedLayer
from workers.cache.unpack_coded import Programs
from workers.coded_tiles import TILE_BYTES

SHARES = 1.0, 0.4, 0.15
KEPT = Programs()
WAYS = (
    KEPT,
    *(
        Programs(256, tiles, stages, together)
        for tiles, stages in ((1, 1), (2, 1), (4, 2), (8, 2))
        for together in (4, 5)
    ),
    Programs(256, 2, 2, 5),
    Programs(256, 4, 3, 4),
    *(Programs(128, tiles, stages, together) for tiles, stages in ((1, 1), (2, 2), (4, 2)) for together in (8, 10)),
)


def draw_flags(share: float) -> Tensor:
    """Which tiles are seen, of those that lists name: never the chunk in hand."""
    s = SIZES
    made = torch.Generator("cuda").manual_seed(2)
    is_seen = torch.rand(s.num_heads, s.num_slots // s.tile, generator=made, device="cuda") < share
    is_seen[:, s.own_start // s.tile :] = False
    return is_seen.to(torch.uint8)


def bytes_moved(is_seen_NJ: Tensor) -> int:
    """Read and written, of the tiles that are seen."""
    s = SIZES
    history = int(is_seen_NJ[:, s.history_start // s.tile : s.recent_start // s.tile].sum())
    ends = int(is_seen_NJ.sum()) - history
    codes, rows = 2 * (TILE_BYTES // 2 + s.tile * 8) + s.tile * 4, s.tile * (s.width + s.head_dim) * 2
    return history * codes + ends * rows + (history + ends) * (2 * TILE_BYTES + s.tile * 16)


def copy_ms(num_bytes: int) -> float:
    """Of a copy that reads and writes so many together."""
    here, there = (torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    return seconds(partial(there.copy_, here)) * 1e3


def try_line(name: str, run: Callable[[], str]) -> bool:
    """Print what it says, or why it failed; whether it did not fail."""
    try:
        print(f"{name}: {run()}", flush=True)
    except Exception as error:
        traceback.print_exc(limit=2)
        print(f"{name}: FAILED: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True


def check(how: Programs) -> str:
    with changed({(unpack_coded, "PROGRAMS"): how}):
        check_unpack_coded("int4")
        check_unpack_coded("int8")
    return "good: the bits of plain torch"


def time_all(ways: tuple[Programs, ...]) -> None:
    table = draw_table(SIZES, torch.bfloat16)
    layer, to = table.layers[0], table.workspace.coded(SIZES)
    assert isinstance(layer, PackedLayer)
    for share in SHARES:
        is_seen = draw_flags(share)
        moved = bytes_moved(is_seen)
        at_least = copy_ms(moved)
        tiles = f"{share:.0%} of {SIZES.num_heads} x {SIZES.own_start // SIZES.tile} tiles"
        print(f"{tiles}: a copy of {moved / 1e9:.3f} GB read and written: {at_least:.4f} ms", flush=True)

        def time(is_seen: Tensor = is_seen, at_least: float = at_least) -> str:
            run = partial(unpack_coded.unpack_coded, layer, to, SIZES, is_seen)
            took = milliseconds(run, repeats=7, calls=10)
            return f"{took:.4f} ms, {at_least / took:.2f} of a copy's pace"

        for how in ways:
            with changed({(unpack_coded, "PROGRAMS"): how}):
                try_line(f"{tiles}, {how}", time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the way that is kept alone")
    ways = (KEPT,) if parser.parse_args().quick else WAYS
    good = tuple(how for how in ways if try_line(str(how), partial(check, how)))
    time_all(good)


if __name__ == "__main__":
    main()
