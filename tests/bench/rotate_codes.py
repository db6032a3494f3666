"""Codes of queries and own keys, written with them or read back: a part of `static_passes.py`.

Each way follows a product and ends with the tiles that attention in 8-bit floats reads. Bits are checked first: rows
are those of the kernel that writes nothing else, codes are the plain ones of these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.bench.fp8_linears import Row
from workers.coded_tiles import (
    CODED_TILE,
    TILE_BYTES,
    CodedTiles,
    code_queries_plain,
    code_values_plain,
    room_for_tiles,
)
from workers.model.fused_rotate import Launch, norm_rotate

Rotate = Callable[..., None]
"""Given what is beside `to` and a cut."""
CUTS = [Launch(1, 2, True), Launch(1, 1, True), Launch(1, 4, True), Launch(1, 2), Launch(2, 4, True)]
"""The first is the usual one."""
WAYS = "read back", "rows and codes", "codes alone"


class Rooms:
    """Of one layer: what is written, nothing where it is left out."""

    def __init__(self, tokens: int, heads: int, padding: int, device: torch.device) -> None:
        wide = CODED_TILE + padding
        shapes = (tokens, heads, wide), (heads, tokens, wide), (heads, tokens, CODED_TILE)
        self.q_QNW, self.k_NQW, self.v_NQD = (torch.zeros(s, device=device, dtype=torch.bfloat16) for s in shapes)
        tiles = -(-tokens // CODED_TILE)
        self.q_NIB = torch.zeros(heads, tiles, TILE_BYTES, device=device, dtype=torch.uint8)
        self.own = room_for_tiles(heads, tiles, device)

    @property
    def to(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_QNW[..., :CODED_TILE], self.k_NQW[..., :CODED_TILE], self.v_NQD

    @property
    def codes(self) -> tuple[Tensor, Tensor]:
        return self.q_NIB, self.own.k_NTB


def ways_of(rotate: Rotate, rooms: Rooms, cut: Launch) -> dict[str, Callable[[], None]]:
    """From products to tiles."""
    from workers.kernels.fp8_tiles import code_chunk, code_values

    def read_back() -> None:
        rotate(rooms.to, launch=cut)
        code_chunk(*rooms.to, CodedTiles(*rooms.own))

    def write(rows: bool) -> None:
        rotate(rooms.to, launch=cut, codes=rooms.codes, rows=rows)
        code_values(rooms.v_NQD, rooms.own.v_NTB)

    return dict(zip(WAYS, (read_back, partial(write, True), partial(write, False)), strict=True))


def check(rotate: Rotate, rooms: Rooms, cut: Launch) -> bool:
    """Whether all bits are those of rows that are coded afterwards."""
    rotate(rooms.to, launch=cut)
    rows = [x.clone() for x in rooms.to]
    expected = code_queries_plain(rows[0]), code_queries_plain(rows[1].transpose(0, 1)), code_values_plain(rows[2])
    same = True
    for name, way in ways_of(rotate, rooms, cut).items():
        for x in (*rooms.codes, rooms.own.v_NTB, rooms.q_QNW, rooms.k_NQW):
            x.zero_()
        way()
        if name == "read back":
            continue
        found = *rooms.codes, rooms.own.v_NTB
        same &= all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        kept = [torch.equal(a, b) for a, b in zip(rooms.to[:2], rows[:2], strict=True)]
        same &= all(kept) if name == "rows and codes" else not any(kept)
    return same


class Given(NamedTuple):
    """Of `static_passes.py`."""

    rooms: Sequence[Rooms]
    product: Callable[[int], Any]
    """What the kernel reads, for the room of this number."""
    norms: tuple[Tensor, Tensor]
    rotation: tuple[Tensor, Tensor]
    eps: float
    ms_of: Callable[[Callable[[int, Any], None]], float]
    """Of what is done in one room with one product, the product left out."""


def rows_of_codes(given: Given) -> list[Row]:
    """All ways and cuts."""

    def rotate(product: Any, to: Any, **other: Any) -> None:
        sums, *scales = product
        norm_rotate(sums, given.norms, given.rotation, given.eps, to, None if scales[0] is None else scales, **other)

    rows: list[Row] = []
    for cut in CUTS:
        for name in WAYS:
            row: Row = {"part": "rotation and codes", "way": name, "cut": str(cut)}
            try:
                row["same_bits"] = check(partial(rotate, given.product(0)), given.rooms[0], cut)

                def way(index: int, product: Any, name: str = name, cut: Launch = cut) -> None:
                    ways_of(partial(rotate, product), given.rooms[index], cut)[name]()

                row["ms"] = round(given.ms_of(way), 5)
            except Exception as problem:  # one way's failure leaves the others
                row["failed"] = f"{type(problem).__name__}: {str(problem)[:160]}"
            rows.append(row)
            print(row, flush=True)
    return rows
