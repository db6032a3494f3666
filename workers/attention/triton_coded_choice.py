"""Sums of tiles whose keys lie as codes of 4 bits: the bits that `triton_choice.tile_sums` finds in unpacked ones.

All queries of a head are one program's, so every key is read by one program and decoded once. Codes of the next step
are read before this one's products. Programs share all steps of a table evenly: first come those of the history, then
those of what lies beside it as it was computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.attention.triton_choice import LOG2_E, Launch, keys_of_columns, load_queries, places, sums_of_tiles
from workers.key_codes import KeyCodes
from workers.triton_decode import decode_codes, load_codes


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_history(  # type: ignore[no-untyped-def]
    code, largest, mass, first_slot, first_tile, start, stop, of_step, stretch,
    T: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of some tiles from the history's `start` on: codes, largest channels, and both parts of log m."""
    slot = first_slot + start * TILE + places(start, of_step, stretch, first_tile, T, S, TILE)
    there = start + of_step < stop
    a, b, c = load_codes(code, largest, slot * (D // 2), there, D, GROUP)
    parts = tl.load(mass + slot[:, None] * 2 + tl.arange(0, 2)[None, :], mask=there[:, None], other=0.0)
    return a, b, c, parts


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _write_sums(  # type: ignore[no-untyped-def]
    blocks, keys, parts, scale, sums, tile, there, first_own, num_queries, num_tiles,
    M: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one step, by all queries of a program."""
    mass = tl.sum(parts.to(tl.float32), 1) * scale
    keys = tl.trans(keys)
    totals = ()
    for block in tl.static_range(BLOCKS):
        product = tl.dot(blocks[block], keys, input_precision=PRECISION)
        totals += (sums_of_tiles(tl.exp2(product * scale + mass[None, :]), M, T, S),)  # type: ignore[assignment, unused-ignore]
    # Threads wait for each other before each of these: not between the products.
    for block in tl.static_range(BLOCKS):
        own = first_own + block * M
        out = sums + own[:, None] * num_tiles + tile[None, :]
        tl.store(out, totals[block], mask=(own < num_queries)[:, None] & there[None, :])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _coded_tile_sums(  # type: ignore[no-untyped-def]
    q, code, largest, mass, end, query_place, sums, stride_ql, stride_qn, stride_en, stride_el,
    num_queries, num_history, first_tile, num_tiles, scale, steps_at_once,
    M: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCKS times M queries of one head, T tiles of S keys at a time; see `_tile_sums`."""
    head, first_own = tl.program_id(1).to(tl.int64), tl.program_id(0) * (BLOCKS * M) + tl.arange(0, M)
    blocks = ()
    for block in tl.static_range(BLOCKS):
        own = first_own + block * M
        queries, _ = load_queries(q + head * stride_qn, query_place, own, num_queries, stride_ql, D, False)
        blocks += (queries,)  # type: ignore[assignment, unused-ignore]
    sums += head * num_queries * num_tiles
    of_step, stretch = keys_of_columns(T, S)
    first = tl.program_id(2) * steps_at_once * T
    stop, first_slot = tl.minimum(first + steps_at_once * T, num_history), head * num_history * TILE
    a, b, c, parts = _load_history(
        code, largest, mass, first_slot, first_tile, first, stop, of_step, stretch, T, S, TILE, D, GROUP
    )
    for start in range(first, stop, T):
        coming = _load_history(
            code, largest, mass, first_slot, first_tile, start + T, stop, of_step, stretch, T, S, TILE, D, GROUP
        )
        low, high = decode_codes(a, b, c, T * S, D, GROUP)
        low, high = tl.reshape(low, [T * S, D // 2]), tl.reshape(high, [T * S, D // 2])
        keys = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [T * S, D]).to(q.dtype.element_ty)
        tile = start + tl.arange(0, T)
        _write_sums(
            blocks, keys, parts, scale, sums, first_tile + tile, tile < stop, first_own, num_queries, num_tiles,
            M, BLOCKS, T, S, PRECISION,
        )  # fmt: skip
        a, b, c, parts = coming
    # What lies beside the history is counted without it.
    before_ends, num_ends = tl.cdiv(num_history, T) * T, num_tiles - num_history
    first = tl.maximum(tl.program_id(2) * steps_at_once * T - before_ends, 0)
    stop = tl.minimum((tl.program_id(2) + 1) * steps_at_once * T - before_ends, num_ends)
    end += head * stride_en
    channel, part = tl.arange(0, D)[None, :], D + tl.arange(0, 2)[None, :]
    for start in range(first, stop, T):
        before = tl.where(start + of_step < first_tile, 0, num_history)
        slot = start * TILE + places(start, of_step, stretch, before, T, S, TILE)
        at, there = slot[:, None] * stride_el, (start + of_step < stop)[:, None]
        keys = tl.load(end + at + channel, mask=there, other=0.0)
        parts = tl.load(end + at + part, mask=there, other=0.0)
        tile = start + tl.arange(0, T)
        of_table = tl.where(tile < first_tile, tile, tile + num_history)
        _write_sums(
            blocks, keys, parts, scale, sums, of_table, tile < stop, first_own, num_queries, num_tiles,
            M, BLOCKS, T, S, PRECISION,
        )  # fmt: skip


HOPPER = Launch(64, 128, 5, 132, 8, 1)
"""Measured on an H200, the only GPU that this runs on (coded_choice): one stage, as codes are read ahead by hand."""


def coded_tile_sums(
    q_QNW: Tensor, keys: KeyCodes, query_place_S: Tensor, sum_NSJ: Tensor, sizes: tuple[int, int, int],
    launch: Launch = HOPPER,
) -> None:  # fmt: skip
    """See `triton_choice.tile_sums`; codes have 4 bits, and keys beside the history the dtype of the queries."""
    head_dim, tile, samples = sizes
    heads, num_queries, num_tiles = sum_NSJ.shape
    num_history = keys.code_NCB.shape[1] // tile
    assert q_QNW.shape[2] == keys.end_NLW.shape[2] == head_dim + 16
    assert keys.code_NCB.dtype == torch.uint8
    assert keys.history_start % tile == 0
    assert all(x.is_contiguous() for x in keys[:3])
    rows = min(launch.queries, max(16, triton.next_power_of_2(num_queries)))
    blocks = min(launch.blocks, triton.cdiv(num_queries, rows))
    at_once = max(1, launch.keys // samples)
    columns = triton.cdiv(num_queries, rows * blocks), heads
    steps = triton.cdiv(num_history, at_once) + triton.cdiv(num_tiles - num_history, at_once)
    part = triton.cdiv(steps, max(1, launch.programs // (columns[0] * columns[1])))
    _coded_tile_sums[(*columns, triton.cdiv(steps, part))](
        q_QNW, *keys[:4], query_place_S, sum_NSJ, *q_QNW.stride()[:2], *keys.end_NLW.stride()[:2],
        num_queries, num_history, keys.history_start // tile, num_tiles, LOG2_E * head_dim**-0.5, part,
        M=rows, BLOCKS=blocks, T=at_once, S=samples, TILE=tile, D=head_dim, GROUP=head_dim // keys.largest_NCG.shape[2],
        PRECISION="ieee" if q_QNW.dtype.itemsize == 4 else "tf32", num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
