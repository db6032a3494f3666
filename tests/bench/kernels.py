"""Attention kernels side by side: dense against tiles at several densities, and the ways that log m can take.

`python -m tests.bench.kernels`: on a GPU at the geometry of Wan2.1-1.3B with every kernel that can run there, else on
one CPU thread at that of the bundled model. `first` is a step that gathers or plans, `again` a later step of the same
chunk, which finds that done.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.bench.record import median_and_spread, report
from workers.contracts import Kernel, KeyValues, TiledKeys, Tiles
from workers.errors import KernelUnavailable
from workers.kernels.mass import ROUTES
from workers.kernels.sdpa import SdpaKernel, attend_sdpa
from workers.kernels.select import CAPABILITIES, Hardware, KernelNeed, choose, load_kernel
from workers.model.backbones import find_backbone

DENSITIES = (0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Setting:
    """Sizes of one layer's attention."""

    device: torch.device
    dtype: torch.dtype
    backbone: str
    num_keys: int
    tiles: tuple[tuple[int, int], ...]
    repeats: int

    @property
    def heads(self) -> int:
        return find_backbone(self.backbone).num_heads

    @property
    def head_dim(self) -> int:
        return find_backbone(self.backbone).head_dim

    @property
    def num_queries(self) -> int:
        sizes = find_backbone(self.backbone)
        return sizes.chunk_latent_frames * sizes.tokens_per_latent_frame(sizes.width, sizes.height)


CPU = Setting(torch.device("cpu"), torch.float32, "longtake-world", 20_000, ((16, 16), (32, 32), (64, 64)), 9)
GPU = Setting(torch.device("cuda"), torch.bfloat16, "wan2.1-t2v-1.3b", 131_072, ((128, 128),), 20)


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


def usable_kernels(setting: Setting) -> dict[str, Kernel]:
    """Those that can run here and are worth timing; the others are named with their reasons."""
    hardware, need = Hardware.of(setting.device), KernelNeed(setting.dtype, setting.head_dim, tiles=True)
    if setting.device.type == "cpu":
        return {"sdpa": SdpaKernel()}
    kernels: dict[str, Kernel] = {}
    for capability in CAPABILITIES:
        if capability.name == "reference":
            continue
        try:
            kernels[capability.name] = choose(capability.name, hardware, need, load_kernel).kernel
        except KernelUnavailable as error:
            print(f"left out: {error}")
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    setting = {"cpu": CPU, "cuda": GPU}[parser.parse_args().device]
    if setting is CPU:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        q = torch.randn(1, setting.num_queries, setting.heads, setting.head_dim, device=setting.device)
        k, v = torch.randn(2, 1, setting.num_keys, setting.heads, setting.head_dim, device=setting.device).unbind(0)
        q, k, v = (x.to(setting.dtype) for x in (q, k, v))
        keys = KeyValues(k, v, torch.zeros(setting.num_keys, 3, device=setting.device))
        rows: list[dict[str, Any]] = []
        for name, kernel in usable_kernels(setting).items():
            rows += bench_tiles(name, kernel, setting, q, keys)
        rows += bench_mass(setting, q, keys)
    sizes = f"{setting.num_queries} queries, {setting.num_keys:,} keys, {setting.heads} heads of {setting.head_dim}"
    notes = (
        f"{sizes}, {str(setting.dtype).removeprefix('torch.')}, torch {torch.__version__}, medians of "
        f"{setting.repeats} with half the distance of the extremes; of_dense is against the same kernel's dense call, "
        f"timed in turn; load average {os.getloadavg()[0]:.1f}"
    )
    report(f"kernels_{setting.device.type}", rows, notes)


if __name__ == "__main__":
    main()
