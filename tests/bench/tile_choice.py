"""The choice of tiles by kernels, one layer at the sizes of Wan2.1-1.3B, and other launches of both kernels.

`python -m tests.bench.tile_choice` on a GPU. Calls are replayed as CUDA graphs, as in a rollout. Beside the time stands
what the bytes of the sampled keys alone would take at the pace of a copy of this run; of each launch of the first
kernel whether it wrote the bits of the first one, and of the choice how many tiles the plain way does not choose.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.bench.listed_kernels import HEAD_DIM, HEADS, TILE, draw_keys, draw_queries, milliseconds
from tests.bench.record import report
from workers.attention import triton_choice
from workers.attention.tile_choice import ChoiceSettings, TileChoice, TileRuns
from workers.attention.triton_choice import Launch

NUM_QUERIES = 4680
SEEN = 12
_OWN = -(-NUM_QUERIES // TILE)
LAUNCHES = (
    *(Launch(64, 64, 1, 960, 4, stages) for stages in (2, 3, 4)),
    Launch(64, 128, 1, 960, 4, 2),
    Launch(64, 64, 2, 396, 4, 3),
    Launch(64, 128, 2, 396, 8, 2),
    *(Launch(64, 64, 3, 264, 4, stages) for stages in (2, 3)),
    *(Launch(64, 128, 3, 264, 8, stages) for stages in (1, 2)),
    *(Launch(64, 64, 5, programs, 4, stages) for programs, stages in ((264, 1), (132, 3))),
    *(Launch(64, 128, 5, programs, 8, stages) for programs, stages in ((132, 1), (132, 2), (264, 2), (132, 3))),
    *(Launch(128, 64, 3, 132, 8, stages) for stages in (2, 3)),
    # Two programs of a multiprocessor, whose products and exponentials are not in step; the first fill its memory.
    *(Launch(64, 64, 5, programs, 4, 2) for programs in (264, 528)),
    *(Launch(64, 32, 5, 264, 4, stages) for stages in (2, 3)),
    *(Launch(64, 32, 5, 528, 4, stages) for stages in (2, 3)),
    Launch(64, 64, 3, 396, 4, 2),
)
"""Keys at once, and the rest."""
LAUNCHES_OF_CODES = tuple(LAUNCHES[place] for place in (3, 5, 7, 9, 10, 13))
"""Those of them that are timed with products of 8-bit codes, which need more registers."""
WARPS_OF_HEAVIEST = 4, 8, 16


def bench(device: torch.device, latent_frames: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of all sizes: each kernel as it is, then both in other launches."""
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
        rows.append({"kernel": "choice, both lists", "ms": ms, "others": others(chooser, q, k, lists), **whole})
        sum_NSJ = torch.empty(HEADS, chooser.query_tiles * settings.queries_per_tile, tiles, device=device)
        for quant in (False, True):
            rows += [{**row, **whole} for row in launches(chooser, q, k, sum_NSJ, quant=quant)]
        rows += [{**row, **whole} for row in launches_of_heaviest(chooser, sum_NSJ, lists)]
    return rows


def others(chooser: TileChoice, q: Tensor, k: Tensor, lists: tuple[Tensor, Tensor]) -> float:
    """Share of the tiles in these lists that plain torch does not choose, of the inputs in float32."""
    worst, plain = 0.0, replace(chooser.settings, fused=False)
    by_torch = TileChoice(plain, chooser.runs, NUM_QUERIES, HEAD_DIM, q.device)
    expected = [torch.zeros_like(index) for index in lists]
    by_torch.choose(q.float(), k.float(), *expected)
    for a, b in zip(lists, expected, strict=True):
        seen = [
            torch.zeros(*x.shape[:2], chooser.runs.num_tiles, device=q.device).scatter_(2, x.long(), 1) for x in (a, b)
        ]
        worst = max(worst, float((seen[0] - seen[1]).clamp(min=0).sum() / seen[1].sum()))
    return worst


def launches(chooser: TileChoice, q: Tensor, k: Tensor, sum_NSJ: Tensor, *, quant: bool) -> list[dict[str, Any]]:
    """The first kernel in all of them, the fastest first."""
    found, written = list[dict[str, Any]](), None
    usual = triton_choice.choose_launch(k, quant=quant)
    sizes = HEAD_DIM, TILE, chooser.settings.keys_per_tile
    for launch in (usual, *(LAUNCHES_OF_CODES if quant else LAUNCHES)):
        run = partial(
            triton_choice.tile_sums, q, k, chooser._query_S, sum_NSJ, sizes, quant=quant, launch=launch,
        )  # fmt: skip
        queries, keys, blocks, programs, warps, stages = launch
        name = f"sums{' of codes' if quant else ''}, {blocks}x{queries} queries x {keys} keys, {programs} programs"
        found.append({"kernel": f"{name}, {warps} warps, {stages} stages"})
        try:
            found[-1]["ms"] = milliseconds(run, q.device)
            written = sum_NSJ.clone() if written is None else written
            found[-1]["same_bits"] = torch.equal(sum_NSJ, written)
            found[-1]["differs"] = float(((sum_NSJ - written).abs() / written).max())
        except Exception as error:  # of Triton: it does not fit into shared memory
            found[-1]["notes"] = f"{type(error).__name__}"
    return sorted(found, key=lambda row: row.get("ms", float("inf")))


def launches_of_heaviest(chooser: TileChoice, sum_NSJ: Tensor, lists: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """The second kernel, of both lists and of one."""
    rows, usual = list[dict[str, Any]](), triton_choice.WARPS_OF_HEAVIEST
    try:
        for warps in WARPS_OF_HEAVIEST:
            triton_choice.WARPS_OF_HEAVIEST = warps
            for name, some in (("one list", lists[:1]), ("both lists", lists)):
                heaviest = partial(triton_choice.write_heaviest, sum_NSJ, chooser._is_candidate_J, 0, *some)
                ms = milliseconds(heaviest, sum_NSJ.device)
                rows.append({"kernel": f"heaviest, {name}, {warps} warps", "ms": ms})
    finally:
        triton_choice.WARPS_OF_HEAVIEST = usual
    return rows


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
