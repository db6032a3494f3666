"""The choice of tiles by kernels, one layer at the sizes of Wan2.1-1.3B, and other shapes of its first kernel.

`python -m tests.bench.tile_choice` on a GPU. Calls are replayed as CUDA graphs, as in a rollout. Beside the time stands
what the bytes of the sampled keys alone would take at the pace of a copy of this run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.bench.listed_kernels import HEAD_DIM, HEADS, TILE, draw_keys, draw_queries, milliseconds
from tests.bench.record import report
from workers.attention import triton_choice
from workers.attention.tile_choice import ChoiceSettings, TileChoice, TileRuns

NUM_QUERIES = 4680
SEEN = 12
_OWN = -(-NUM_QUERIES // TILE)
SHAPES = tuple(itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4)))
"""Queries and keys at once, warps, stages."""


def bench(device: torch.device, latent_frames: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of all sizes: each kernel as it is, then the first kernel in other shapes."""
    rows = []
    for kept in latent_frames:
        tiles = round(kept * NUM_QUERIES / 3 / TILE) + _OWN
        q, (k, _) = draw_queries(NUM_QUERIES, device, torch.bfloat16), draw_keys(tiles * TILE, device, torch.bfloat16)
        runs = TileRuns(((0, tiles - _OWN),), (), tiles)
        settings = ChoiceSettings(round(SEEN / kept * tiles), fused=True, clean_share=1 / 3)
        chooser = TileChoice(settings, runs, NUM_QUERIES, HEAD_DIM, device)
        lists = chooser.new_list(HEADS), chooser.new_list(HEADS, for_clean_pass=True)
        least = HEADS * tiles * settings.keys_per_tile * HEAD_DIM * 2 / copy_pace(device)
        whole = {"latent_frames_kept": kept, "tiles": tiles, "least_ms": least}
        ms = milliseconds(partial(chooser.choose, q, k, *lists), device)
        rows.append({"kernel": "choice, both lists", "ms": ms, **whole})
        lse_NSJ = torch.empty(HEADS, chooser.query_tiles * settings.queries_per_tile, tiles, device=device)
        rows += [{**row, **whole} for row in shapes(chooser, q, k, lse_NSJ, device)]
        for name, some in (("one list", lists[:1]), ("both lists", lists)):
            heaviest = partial(triton_choice.write_heaviest, lse_NSJ, chooser._is_candidate_J, 0, *some)
            rows.append({"kernel": f"heaviest, {name}", "ms": milliseconds(heaviest, device), **whole})
    return rows


def shapes(chooser: TileChoice, q: Tensor, k: Tensor, lse_NSJ: Tensor, device: torch.device) -> list[dict[str, Any]]:
    """The first kernel in all of them, the fastest first."""
    found, usual = [], (triton_choice.QUERIES_AT_ONCE, triton_choice.WARPS, triton_choice.STAGES)
    sizes = HEAD_DIM, TILE, chooser.settings.keys_per_tile
    try:
        for queries, keys, warps, stages in SHAPES:
            triton_choice.QUERIES_AT_ONCE, triton_choice.WARPS, triton_choice.STAGES = queries, warps, stages
            run = partial(
                triton_choice.tile_lse, q, k, chooser._query_S, lse_NSJ, sizes, quant=False, keys_at_once=keys,
            )  # fmt: skip
            try:
                found.append({"kernel": f"masses {queries}x{keys}, {warps} warps, {stages} stages"})
                found[-1]["ms"] = milliseconds(run, device)
            except Exception as error:  # of Triton: it does not fit into shared memory
                found[-1]["notes"] = f"{type(error).__name__}"
    finally:
        triton_choice.QUERIES_AT_ONCE, triton_choice.WARPS, triton_choice.STAGES = usual
    return sorted(found, key=lambda row: row.get("ms", float("inf")))


def copy_pace(device: torch.device) -> float:
    """Bytes a millisecond, read and written."""
    x = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(partial(y.copy_, x), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=int, nargs="*", default=[48, 150, 240], help="latent frames that a table keeps")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("these kernels need a GPU")
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = bench(torch.device("cuda"), asked.kept)
    name = "tile_choice-" + "-".join(torch.cuda.get_device_name().lower().removeprefix("nvidia ").split())
    report(name, rows, f"{HEADS} heads of {HEAD_DIM}, {NUM_QUERIES} queries, bfloat16, tiles of {TILE}, random keys")


if __name__ == "__main__":
    main()
