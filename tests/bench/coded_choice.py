"""The choice of tiles by keys as codes, against unpacking what is looked at and summing then: one layer of a table.

`python -m tests.bench.coded_choice` on a GPU: of each launch whether it writes the bits of the way by unpacked keys,
and its time, beside that way's of the same run; then whole choices, and whether they list the same tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from tests.bench.listed_kernels import HEAD_DIM, HEADS, TILE, draw_queries, milliseconds
from workers.attention.tile_choice import ChoiceSettings, TileChoice, TileRuns
from workers.attention.triton_choice import Launch, tile_sums
from workers.attention.triton_coded_choice import HOPPER, coded_tile_sums
from workers.cache.table_codes import group_channels
from workers.cache.table_layout import EXTRA_CHANNELS
from workers.cache.triton_pack import unpack_sample
from workers.key_codes import KeyCodes

QUERIES, TILES, SEEN = 4680, 1865, 146
_CHUNK = -(-QUERIES // TILE)
"""Tiles of the sink, of the newest chunk and of the chunk in hand; all others are the history."""
LAUNCHES = (
    HOPPER,
    Launch(64, 64, 5, 264, 4, 1),
    Launch(64, 64, 5, 132, 4, 1),
    Launch(64, 128, 5, 132, 4, 1),
    Launch(64, 128, 5, 132, 8, 2),
    Launch(64, 64, 5, 264, 8, 1),
    Launch(64, 32, 5, 264, 4, 1),
)


def draw_layer(device: torch.device, tiles: int = TILES) -> tuple[Any, Any, Any]:
    """A layer of random codes, the workspace, and sizes."""
    history, made = (tiles - 3 * _CHUNK) * TILE, torch.Generator(device).manual_seed(0)
    width, groups = HEAD_DIM + EXTRA_CHANNELS, HEAD_DIM // group_channels(HEAD_DIM, "int4")
    low, high = (
        torch.randint(1, 16, (HEADS, history, HEAD_DIM // 2), generator=made, device=device, dtype=torch.uint8)
        for _ in range(2)
    )
    end = torch.randn(HEADS, 3 * _CHUNK * TILE, width, generator=made, device=device).bfloat16()
    end[..., HEAD_DIM + 2 :] = 0
    layer = SimpleNamespace(
        k_code_NCB=low | (high << 4),
        k_largest_NCG=(torch.rand(HEADS, history, groups, generator=made, device=device) + 1).bfloat16(),
        mass_NC2=torch.rand(HEADS, history, 2, generator=made, device=device).bfloat16(),
        k_NLW=end,
    )
    to = SimpleNamespace(k_NLW=torch.zeros(HEADS, tiles * TILE, width, device=device, dtype=torch.bfloat16))
    start = _CHUNK * TILE
    sizes = SimpleNamespace(
        storage="int4", head_dim=HEAD_DIM, width=width, tile=TILE, num_heads=HEADS, num_slots=tiles * TILE,
        history_start=start, recent_start=start + history, history_slots=history,
    )  # fmt: skip
    return layer, to, sizes


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("these kernels need a GPU")
    device = torch.device("cuda")
    torch.manual_seed(0)
    q, (layer, to, sizes) = draw_queries(QUERIES, device, torch.bfloat16), draw_layer(device)
    codes = KeyCodes(layer.k_code_NCB, layer.k_largest_NCG, layer.mass_NC2, layer.k_NLW, sizes.history_start)
    settings = ChoiceSettings(SEEN, fused=True, clean_share=1 / 3)
    runs = TileRuns(((0, TILES - _CHUNK),), (), TILES)
    chooser = TileChoice(settings, runs, QUERIES, HEAD_DIM, device)
    unpack: Any = partial(unpack_sample, layer, to, sizes, chooser.sampled_slot_R)
    time_sums(chooser, unpack, to.k_NLW, q, codes)
    ways: dict[str, Callable[..., None]] = {"unpacked keys": partial(choose_unpacked, chooser, unpack, to.k_NLW)}
    ways["codes"] = partial(chooser.choose, keys=codes)
    lists = []
    for name, choose in ways.items():
        lists.append([chooser.new_list(HEADS, for_clean_pass=clean) for clean in (False, True)])
        index, clean = lists[-1]
        ms = milliseconds(lambda: choose(q, index_NIJ=index, clean_NIJ=clean), device)  # noqa: B023
        print(f"whole choice by {name}: {ms:.4f} ms", flush=True)
    same = all(torch.equal(a, b) for a, b in zip(*lists, strict=True))
    print(f"same lists {same}; a table takes codes here {chooser.takes_codes(codes)}", flush=True)


def choose_unpacked(chooser: TileChoice, unpack: Any, k_NLW: torch.Tensor, q: torch.Tensor, **lists: Any) -> None:
    unpack()
    chooser.choose(q, k_NLW, **lists)


def time_sums(chooser: TileChoice, unpack: Any, k_NLW: torch.Tensor, q: torch.Tensor, codes: KeyCodes) -> None:
    """Both ways, the second one in all launches."""
    places, device = chooser._query_S, q.device
    sums = [torch.zeros(HEADS, len(places), TILES, device=device) for _ in range(2)]
    sizes = HEAD_DIM, TILE, chooser.settings.keys_per_tile
    add: Any = partial(tile_sums, q, k_NLW, places, sums[0], sizes, quant=False)
    unpack()
    add()
    apart = [milliseconds(unpack, device), milliseconds(add, device)]
    print(f"unpack {apart[0]:.4f} and sum {apart[1]:.4f}: {sum(apart):.4f} ms", flush=True)
    for launch in LAUNCHES:
        try:
            sums[1].zero_()
            run: Any = partial(coded_tile_sums, q, codes, places, sums[1], sizes, launch)
            run()
            same, differs = torch.equal(*sums), float(((sums[1] - sums[0]).abs() / sums[0]).max())
            ms = milliseconds(run, device)
            print(f"{launch}: {ms:.4f} ms, same bits {same}, differs {differs:.1e}", flush=True)
        except Exception as problem:  # one launch's failure leaves the others
            print(f"{launch}: {type(problem).__name__}: {str(problem)[:120]}", flush=True)


if __name__ == "__main__":
    main()
