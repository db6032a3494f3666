"""Attention kernels side by side: dense against tiles at several densities, and the ways that log m can take.

`python -m tests.bench.kernels`: on a GPU at the geometry of Wan2.1-1.3B with every kernel that can run there, else on
one CPU thread at that of the bundled model. `--geometry wan2.1-t2v-14b` and `--geometry hunyuanvideo` are models that
nothing was tuned on. `first` is a step that gathers or plans, `again` a later step of the same chunk, which finds that
done.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.bench.record import keep, median_and_spread, report
from workers.contracts import Kernel, KeyValues, TiledKeys, Tiles
from workers.errors import KernelUnavailable
from workers.kernels.mass import ROUTES
from workers.kernels.sdpa import SdpaKernel, attend_sdpa
from workers.kernels.select import CAPABILITIES, Hardware, KernelNeed, choose, load_kernel
from workers.model.backbones import HUNYUAN_VIDEO, find_backbone

DENSITIES = (0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Setting:
    """Sizes of one layer's attention."""

    name: str
    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    num_queries: int
    num_keys: int
    tiles: tuple[tuple[int, int], ...]
    repeats: int


def chunk_setting(name: str, num_keys: int) -> Setting:
    """A chunk of a backbone over a long history, as a rollout has it; on a GPU."""
    sizes = find_backbone(name)
    num_queries = sizes.chunk_latent_frames * sizes.tokens_per_latent_frame(sizes.width, sizes.height)
    cuda = torch.device("cuda"), torch.bfloat16
    return Setting(name, *cuda, sizes.num_heads, sizes.head_dim, num_queries, num_keys, ((128, 128),), 20)


def hunyuan_setting() -> Setting:
    """Four latent frames of a video that attends both ways, over all of its tokens and the prompt's."""
    sizes = HUNYUAN_VIDEO
    num_queries = 4 * sizes.rows * sizes.columns
    cuda = torch.device("cuda"), torch.bfloat16
    return Setting(sizes.name, *cuda, sizes.num_heads, sizes.head_dim, num_queries, sizes.num_tokens, ((128, 128),), 10)


CPU = Setting(
    "longtake-world", torch.device("cpu"), torch.float32, 4, 64, 192, 20_000, ((16, 16), (32, 32), (64, 64)), 9
)
GPU: dict[str, Callable[[], Setting]] = {
    "wan2.1-t2v-1.3b": lambda: chunk_setting("wan2.1-t2v-1.3b", 131_072),
    "wan2.1-t2v-14b": lambda: replace(chunk_setting("wan2.1-t2v-14b", 131_072), repeats=10),
    "hunyuanvideo": hunyuan_setting,
}
TUNED_ON = "wan2.1-t2v-1.3b"


def seconds(call: Callable[[], object], setting: Setting) -> float:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    before = time.perf_counter()
    call()
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - before


def timed_row(
    names: tuple[str, str], call: Callable[[], object], dense: Callable[[], object], setting: Setting, density: float
) -> dict[str, Any]:
    """Case and kernel; the call and the dense one in turn, so that a busy machine slows both."""
    call(), dense()
    times = [(seconds(call, setting), seconds(dense, setting)) for _ in range(setting.repeats)]
    median, spread = median_and_spread([taken for taken, _ in times])
    dense_median, _ = median_and_spread([taken for _, taken in times])
    figures = {"ms": median * 1e3, "spread_ms": spread * 1e3, "dense_ms": dense_median * 1e3}
    return {"case": names[0], "kernel": names[1], "density": density} | figures | {"of_dense": median / dense_median}


def random_tiles(setting: Setting, tile: tuple[int, int], density: float) -> Tiles:
    """Each query tile sees the same number of key tiles, drawn at random."""
    rows, columns = -(-setting.num_queries // tile[0]), -(-setting.num_keys // tile[1])
    seen = max(1, round(columns * density))
    chosen = torch.rand(1, setting.heads, rows, columns, device=setting.device).topk(seen, -1).indices
    visible = torch.zeros(1, setting.heads, rows, columns, dtype=torch.bool, device=setting.device)
    return Tiles(visible.scatter_(-1, chosen, True), *tile)


def bench_tiles(name: str, kernel: Kernel, setting: Setting, q: Tensor, keys: KeyValues) -> list[dict[str, Any]]:
    """Every tile size and density against the same kernel's dense attention."""

    def dense() -> object:
        return kernel.attend(q, (keys,))

    rows = []
    for tile in setting.tiles:
        for density in DENSITIES:
            tiles = random_tiles(setting, tile, density)
            size, exact = f"{tile[0]}x{tile[1]}", float(tiles.mean_keys(q.shape[1], keys.num_tokens)) / keys.num_tokens

            def first(like: Tiles = tiles) -> object:
                same = Tiles(like.visible_BNIJ, like.query_tile, like.key_tile)
                return kernel.attend(q, (TiledKeys(keys, same),))

            def again(like: Tiles = tiles) -> object:
                return kernel.attend(q, (TiledKeys(keys, like),))

            rows.append(timed_row((f"tiles {size}, first", name), first, dense, setting, exact))
            rows.append(timed_row((f"tiles {size}, again", name), again, dense, setting, exact))
    return rows


def bench_mass(setting: Setting, q: Tensor, keys: KeyValues) -> list[dict[str, Any]]:
    """The routes through torch's kernel against no log m; m is 1, 2 or 4, a tenth of the slots is empty."""
    values = torch.tensor([1.0, 2.0, 4.0], device=setting.device)
    mass = values[torch.randint(0, 3, (1, setting.heads, setting.num_keys), device=setting.device)].log()
    mass = mass.masked_fill(torch.rand_like(mass) < 0.1, -torch.inf)
    merged = KeyValues(keys.k_BKND, keys.v_BKND, keys.position_K3, mass)

    def dense() -> object:
        return attend_sdpa(q, keys)

    rows = []
    for name, route in ROUTES.items():
        call = partial(route, attend_sdpa, q, merged)
        rows.append(timed_row((f"log m by {name}", "sdpa"), call, dense, setting, 1.0))
    return rows


def usable_kernels(setting: Setting, only: Collection[str] = ()) -> dict[str, Kernel]:
    """Those that can run here and are worth timing, of `only` if any; the others are named with their reasons."""
    hardware, need = Hardware.of(setting.device), KernelNeed(setting.dtype, setting.head_dim, tiles=True)
    if setting.device.type == "cpu":
        return {"sdpa": SdpaKernel()}
    kernels: dict[str, Kernel] = {}
    for capability in CAPABILITIES:
        if capability.name == "reference" or (only and capability.name not in only):
            continue
        try:
            kernels[capability.name] = choose(capability.name, hardware, need, load_kernel).kernel
        except KernelUnavailable as error:
            print(f"left out: {error}")
    return kernels


def bench(
    setting: Setting,
    only: Collection[str] = (),
    on_rows: Callable[[list[dict[str, Any]], list[str]], None] = lambda rows, failures: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and what could not be measured with its reason: one kernel's failure leaves the others.

    Args:
        setting: Sizes.
        only: Kernels; empty means all.
        on_rows: Told both after each kernel.
    """
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    with torch.inference_mode():
        q = torch.randn(1, setting.num_queries, setting.heads, setting.head_dim, device=setting.device)
        k, v = torch.randn(2, 1, setting.num_keys, setting.heads, setting.head_dim, device=setting.device).unbind(0)
        q, k, v = (x.to(setting.dtype) for x in (q, k, v))
        keys = KeyValues(k, v, torch.zeros(setting.num_keys, 3, device=setting.device))
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            name: partial(bench_tiles, name, kernel, setting, q, keys)
            for name, kernel in usable_kernels(setting, only).items()
        }
        parts["log m"] = partial(bench_mass, setting, q, keys)
        for name, part in parts.items():
            try:
                rows += part()
            except (RuntimeError, ValueError, NotImplementedError) as error:
                failures.append(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}")
                print(f"failed: {failures[-1]}", flush=True)
            on_rows(rows, failures)
    return rows, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--geometry", choices=list(GPU), default=TUNED_ON, help="on a GPU")
    parser.add_argument("--kernels", help="names, separated by commas; all without")
    args = parser.parse_args()
    if args.device == "cpu":
        setting, name = CPU, "kernels_cpu"
        torch.set_num_threads(1)
    else:
        setting = GPU[args.geometry]()
        name = "kernels_cuda" if args.geometry == TUNED_ON else f"kernels_cuda_{args.geometry}"
    sizes = f"{setting.num_queries} queries, {setting.num_keys:,} keys, {setting.heads} heads of {setting.head_dim}"
    notes = (
        f"Geometry of {setting.name}: {sizes}, {str(setting.dtype).removeprefix('torch.')}, torch {torch.__version__}, "
        f"medians of {setting.repeats} with half the distance of the extremes; of_dense is against the same kernel's "
        f"dense call, timed in turn; load average {os.getloadavg()[0]:.1f}"
    )

    def all_notes(failures: list[str]) -> str:
        return "; ".join([notes, *(f"not measured: {failure}" for failure in failures)])

    def keep_so_far(rows: list[dict[str, Any]], failures: list[str]) -> None:
        keep(name, rows, all_notes(failures))

    only = args.kernels.split(",") if args.kernels else ()
    rows, failures = bench(setting, only, keep_so_far)
    report(name, rows, all_notes(failures))


if __name__ == "__main__":
    main()
