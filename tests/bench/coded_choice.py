"""Sums of tiles from keys as codes of 4 bits, against unpacking what is looked at and summing then: a bench's kernel.

Every key is read by one program, as all queries of a head are one program's, so each is decoded once. Bytes of the next
step are read before this one's products; products of halves of the channels add up as those of all channels do.
`python -m tests.bench.coded_choice` on a GPU: bits first, then times, beside those of the way in use.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.bench.listed_kernels import HEAD_DIM, HEADS, TILE, draw_queries, milliseconds
from workers.attention.tile_mass import sample_places
from workers.attention.triton_choice import _LOG2_E, _keys_of_columns, _places, _sums_of_tiles, tile_sums
from workers.cache.table_codes import group_channels
from workers.cache.triton_near import side_by_side
from workers.cache.triton_pack import unpack_sample
from workers.cache.triton_rows import decode_codes, load_codes

QUERIES, SAMPLES, TILES, PER_TILE = 4680, 16, 1865, 8
LAUNCHES = ((128, 132, 8), (64, 264, 4), (64, 132, 4), (128, 132, 4), (64, 264, 8), (32, 264, 4), (32, 396, 4))
"""Keys of a product, programs, warps."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load(  # type: ignore[no-untyped-def]
    code, largest, mass, first_slot, start, stop, of_step, stretch,
    T: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    slot = first_slot + start * TILE + _places(start, of_step, stretch, T, S, TILE)
    there = start + of_step < stop
    a, b, c = load_codes(code, largest, slot * (D // 2), there, D, GROUP)
    parts = tl.load(mass + slot[:, None] * 2 + tl.arange(0, 2)[None, :], mask=there[:, None], other=0.0)
    return a, b, c, parts


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def coded_tile_sums(  # type: ignore[no-untyped-def]
    q, code, largest, mass, query_place, sums, stride_ql, stride_qn, slots, num_queries, num_tiles, scale,
    tiles_at_once, M: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """As `_tile_sums`, of a history alone; products of whole keys, or of halves one after the other."""
    head, first_own = tl.program_id(1).to(tl.int64), tl.program_id(0) * (BLOCKS * M) + tl.arange(0, M)
    blocks = ()
    for block in tl.static_range(BLOCKS):
        inside = first_own + block * M < num_queries
        at_q = tl.load(query_place + first_own + block * M, mask=inside, other=0) * stride_ql
        at = q + head * stride_qn + at_q[:, None] + tl.arange(0, D // 2)[None, :]
        if WHOLE:
            at = q + head * stride_qn + at_q[:, None] + tl.arange(0, D)[None, :]
        first_half = tl.load(at, mask=inside[:, None], other=0.0)
        halves = (first_half, first_half)
        if not WHOLE:
            halves = (first_half, tl.load(at + D // 2, mask=inside[:, None], other=0.0))
        blocks += (halves,)  # type: ignore[assignment, unused-ignore]
    of_step, stretch = _keys_of_columns(T, S)
    first = tl.program_id(2) * tiles_at_once
    stop, first_slot = tl.minimum(first + tiles_at_once, num_tiles), head * slots
    a, b, c, parts = _load(code, largest, mass, first_slot, first, stop, of_step, stretch, T, S, TILE, D, GROUP)
    for start in range(first, stop, T):
        coming = _load(code, largest, mass, first_slot, start + T, stop, of_step, stretch, T, S, TILE, D, GROUP)
        low, high = decode_codes(a, b, c, T * S, D, GROUP)
        low, high = tl.reshape(low, [T * S, D // 2]), tl.reshape(high, [T * S, D // 2])
        if WHOLE:
            low = side_by_side(low, high, T * S, D // 2)
        low, high = tl.trans(low.to(q.dtype.element_ty)), tl.trans(high.to(q.dtype.element_ty))
        log_m = tl.sum(parts.to(tl.float32), 1) * scale
        totals = ()
        for block in tl.static_range(BLOCKS):
            product = tl.dot(blocks[block][0], low)
            if not WHOLE:
                product = tl.dot(blocks[block][1], high, product)
            weight = tl.exp2(product * scale + log_m[None, :])
            totals += (_sums_of_tiles(weight, M, T, S),)  # type: ignore[assignment, unused-ignore]
        tile = start + tl.arange(0, T)
        for block in tl.static_range(BLOCKS):
            own = first_own + block * M
            out = sums + (head * num_queries + own)[:, None] * num_tiles + tile[None, :]
            tl.store(out, totals[block], mask=(own < num_queries)[:, None] & (tile < num_tiles)[None, :])
        a, b, c, parts = coming


def sum_codes(
    q: Tensor, layer: Any, query_place: Tensor, sum_NSJ: Tensor, launch: tuple[int, int, int], options: dict[str, Any]
) -> None:
    """Into `sum_NSJ`."""
    heads, num_queries, num_tiles = sum_NSJ.shape
    keys, programs, warps = launch
    blocks, at_once = min(5, triton.cdiv(num_queries, 64)), keys // SAMPLES
    columns = triton.cdiv(num_queries, 64 * blocks), heads
    part = at_once * triton.cdiv(num_tiles, at_once * max(1, programs // (columns[0] * columns[1])))
    coded_tile_sums[(*columns, triton.cdiv(num_tiles, part))](
        q, layer.k_code_NCB, layer.k_largest_NCG, layer.mass_NC2, query_place, sum_NSJ, *q.stride()[:2],
        layer.mass_NC2.shape[1], num_queries, num_tiles, _LOG2_E * HEAD_DIM**-0.5, part, M=64, BLOCKS=blocks,
        T=at_once, S=SAMPLES, TILE=TILE, D=HEAD_DIM, GROUP=group_channels(HEAD_DIM, "int4"), num_warps=warps,
        num_stages=1, **options,
    )  # fmt: skip


def draw_layer(device: torch.device) -> tuple[Any, Any, Any]:
    """A history of random codes that is the whole table, the workspace, and sizes."""
    slots, groups = TILES * TILE, HEAD_DIM // group_channels(HEAD_DIM, "int4")
    made = torch.Generator(device).manual_seed(0)
    low, high = (
        torch.randint(1, 16, (HEADS, slots, HEAD_DIM // 2), generator=made, device=device, dtype=torch.uint8)
        for _ in range(2)
    )
    layer = SimpleNamespace(
        k_code_NCB=low | (high << 4),
        k_largest_NCG=(torch.rand(HEADS, slots, groups, generator=made, device=device) + 1).bfloat16(),
        mass_NC2=torch.rand(HEADS, slots, 2, generator=made, device=device).bfloat16(),
        k_NLW=torch.zeros(HEADS, TILE, HEAD_DIM + 16, device=device, dtype=torch.bfloat16),
    )
    to = SimpleNamespace(k_NLW=torch.zeros(HEADS, slots, HEAD_DIM + 16, device=device, dtype=torch.bfloat16))
    sizes = SimpleNamespace(
        storage="int4", head_dim=HEAD_DIM, width=HEAD_DIM + 16, tile=TILE, num_heads=HEADS, num_slots=slots,
        history_start=0, recent_start=slots, history_slots=slots,
    )  # fmt: skip
    return layer, to, sizes


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("these kernels need a GPU")
    device = torch.device("cuda")
    torch.manual_seed(0)
    q, (layer, to, sizes) = draw_queries(QUERIES, device, torch.bfloat16), draw_layer(device)
    places = sample_places(QUERIES, TILE, PER_TILE, device)[0]
    slots = sample_places(TILES * TILE, TILE, SAMPLES, device)[0]
    sums = [torch.zeros(HEADS, len(places), TILES, device=device) for _ in range(2)]
    unpack: Any = partial(unpack_sample, layer, to, sizes, slots)
    add: Any = partial(tile_sums, q, to.k_NLW, places, sums[0], (HEAD_DIM, TILE, SAMPLES), quant=False)
    unpack()
    add()
    apart = [milliseconds(unpack, device), milliseconds(add, device)]
    print(f"unpack {apart[0]:.4f} and sum {apart[1]:.4f}: {sum(apart):.4f} ms", flush=True)
    for launch in LAUNCHES:
        for options in ({"WHOLE": True}, {"WHOLE": False}):
            try:
                sums[1].zero_()
                run = partial(sum_codes, q, layer, places, sums[1], launch, options)
                run()
                same = torch.equal(*sums)
                differs = float(((sums[1] - sums[0]).abs() / sums[0]).max())
                ms = milliseconds(run, device)
                print(f"{launch} {options}: {ms:.4f} ms, same bits {same}, differs {differs:.1e}", flush=True)
            except Exception as problem:  # one way's failure leaves the others
                print(f"{launch} {options}: {type(problem).__name__}: {str(problem)[:120]}", flush=True)


if __name__ == "__main__":
    main()
