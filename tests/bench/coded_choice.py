"""The choice of tiles by keys as codes, against unpacking what is looked at and summing then: one layer of a table.

`python -m tests.bench.coded_choice` on a GPU of compute capability 9.0: both kernels by Triton and by CUDA, of sums
whether they have the bits of the way by unpacked keys; then whole choices, and whether they list the same tiles.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.bench.listed_kernels import HEAD_DIM, HEADS, TILE, draw_queries, milliseconds
from tests.bench.record import report
from workers.attention import coded_choice
from workers.attention.tile_choice import ChoiceSettings, TileChoice, TileRuns
from workers.attention.triton_choice import Launch, tile_sums, write_heaviest
from workers.attention.triton_coded_choice import HOPPER, coded_tile_sums
from workers.cache.table_codes import group_channels
from workers.cache.table_layout import EXTRA_CHANNELS
from workers.cache.triton_pack import unpack_sample
from workers.key_codes import KeyCodes

QUERIES, TILES, SEEN = 4680, 1865, 146
_CHUNK = -(-QUERIES // TILE)
"""Tiles of the sink, of the newest chunk and of the chunk in hand; all others are the history."""
LAUNCHES = HOPPER, Launch(64, 64, 5, 264, 4, 1)
"""Of Triton."""


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


class Bench:
    """A chooser, and one layer both as codes and where it is unpacked to."""

    def __init__(self, device: torch.device) -> None:
        layer, to, sizes = draw_layer(device)
        self.q, self.k_NLW = draw_queries(QUERIES, device, torch.bfloat16), to.k_NLW
        self.codes = KeyCodes(layer.k_code_NCB, layer.k_largest_NCG, layer.mass_NC2, layer.k_NLW, sizes.history_start)
        settings = ChoiceSettings(SEEN, fused=True, clean_share=1 / 3)
        runs = TileRuns(((0, TILES - _CHUNK),), (), TILES)
        chooser = self.chooser = TileChoice(settings, runs, QUERIES, HEAD_DIM, device)
        self.unpack = partial(unpack_sample, layer, to, sizes, chooser.sampled_slot_R)
        self.places, self.may = chooser._query_S, chooser._is_candidate_J
        self.sizes = HEAD_DIM, TILE, settings.keys_per_tile
        self.by_query = torch.zeros(HEADS, len(self.places), TILES, device=device)
        self.by_tile = coded_choice.new_sums(HEADS, chooser.query_tiles, TILES, device)

    def ms(self, call: Any) -> float:
        return milliseconds(call, self.q.device)

    def new_lists(self) -> list[Tensor]:
        return [self.chooser.new_list(HEADS, for_clean_pass=clean) for clean in (False, True)]

    def choose_unpacked(self, lists: list[Tensor]) -> None:
        self.unpack()
        self.chooser.choose(self.q, self.k_NLW, *lists)

    def choose_by_triton(self, lists: list[Tensor]) -> None:
        """As a choice by codes goes where no CUDA fits."""
        sums = torch.empty_like(self.by_query)
        coded_tile_sums(self.q, self.codes, self.places, sums, self.sizes)
        write_heaviest(sums, self.may, 0, *lists)

    def choose_by_cuda(self, lists: list[Tensor]) -> None:
        self.chooser.choose(self.q, self.codes, *lists)

    def time_sums(self) -> list[dict[str, Any]]:
        """All ways; leaves what unpacked keys sum up to, and what CUDA does."""
        rows = [{"what": "unpack what is looked at", "ms": self.ms(self.unpack)}]
        add = partial(tile_sums, self.q, self.k_NLW, self.places, self.by_query, self.sizes, quant=False)
        rows.append({"what": "sums of it", "ms": self.ms(add)})
        found = torch.zeros_like(self.by_query)
        for launch in LAUNCHES:
            found.zero_()
            run: Any = partial(coded_tile_sums, self.q, self.codes, self.places, found, self.sizes, launch)
            name = f"{launch.keys} keys, {launch.programs} programs, {launch.warps} warps"
            row = {"what": f"sums of codes by Triton, {name}", "ms": self.ms(run)}
            rows.append({**row, "same_bits": torch.equal(found, self.by_query)})
        run = partial(coded_choice.sum_tiles, self.q, self.codes, self.places, self.by_tile)
        row = {"what": "sums of codes by CUDA", "ms": self.ms(run)}
        found = self.by_tile.transpose(3, 4).reshape(self.by_query.shape)
        return [*rows, {**row, "same_bits": torch.equal(found, self.by_query)}]

    def time_lists(self) -> list[dict[str, Any]]:
        """Both lists of what was summed up, then whole choices; each against the first of its kind."""
        kinds: list[dict[str, Any]] = [
            {
                "lists by Triton": lambda lists: write_heaviest(self.by_query, self.may, 0, *lists),
                "lists by CUDA": lambda lists: coded_choice.list_heaviest(self.by_tile, self.may, 0, *lists),
            },
            {
                "whole choice by unpacked keys": self.choose_unpacked,
                "whole choice by codes, Triton": self.choose_by_triton,
                "whole choice by codes, CUDA": self.choose_by_cuda,
            },
        ]
        rows = []
        for ways in kinds:
            expected: list[Tensor] = []
            for what, choose in ways.items():
                lists = self.new_lists()
                rows.append({"what": what, "ms": self.ms(partial(choose, lists))})
                if expected:
                    rows[-1]["same_lists"] = all(torch.equal(a, b) for a, b in zip(lists, expected, strict=True))
                expected = expected or lists
        return rows


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("these kernels need a GPU")
    torch.manual_seed(0)
    with torch.inference_mode():
        bench = Bench(torch.device("cuda"))
        if not bench.chooser.takes_codes(bench.codes) or not coded_choice.fits(bench.codes, coded_choice.SAMPLES):
            raise SystemExit("these kernels need compute capability 9.0 and CUDA's runtime compiler")
        rows = bench.time_sums() + bench.time_lists()
    name = "coded_choice-" + "-".join(torch.cuda.get_device_name().lower().removeprefix("nvidia ").split())
    report(name, rows, f"150 latent frames of {HEADS} heads in int4, {TILES} tiles.")


if __name__ == "__main__":
    main()
