"""Kernels that choose tiles: what `tile_choice.py` does, without storing a product or sorting a list.

A first kernel compares a sample of the queries with a sample of the keys where both lie and keeps the mass of each
tile. It reads keys in an order in which one thread has all of a tile's logits for a query, so that they are
summed where they are. A second makes shares of it and finds the heaviest tiles by halving: 30 questions "how many are
at least this heavy?", of both lists at once, give the exact limits, since floats that are not negative are in the order
of their bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST = tl.constexpr(1e34)
"""Sums are cut there, at e to the 78: nothing is subtracted before the exponential, and float32 ends at e to the 88.
Fewer than 2 to the 15 of them have a finite sum, too."""
_LEAST = tl.constexpr(1e-37)
"""A row that has less in all has no mass: reciprocals are finite."""
_MOST_BITS = tl.constexpr((1 << 30) - 1)
LOG2_E = 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_queries(q, query_place, own, num_queries, stride_ql, D: tl.constexpr, QUANT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of one head: some queries, and what they are to be multiplied by."""
    inside = own < num_queries
    at_q = tl.load(query_place + own, mask=inside, other=0) * stride_ql
    queries = tl.load(q + at_q[:, None] + tl.arange(0, D)[None, :], mask=inside[:, None], other=0.0)
    step = tl.full([own.shape[0]], 1.0, tl.float32)
    if QUANT:
        step = tl.maximum(tl.max(tl.abs(queries.to(tl.float32)), 1), 1e-20) / 127
        queries = tl.floor(queries.to(tl.float32) * (1.0 / step)[:, None] + 0.5).to(queries.dtype)
    return queries, step


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def keys_of_columns(T: tl.constexpr, S: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tile of a step, and stretch of that tile, whose key stands in each column of a product.

    Four threads have a row, each two neighbouring columns of every eight: tile t of four lies in columns 2t and 2t + 1
    of every eight, so all its logits are in one thread.
    """
    PAIR: tl.constexpr = min(2, S)
    QUAD: tl.constexpr = min(4, T)
    column = tl.arange(0, T * S)
    of_thread = column // (PAIR * QUAD)
    of_step = of_thread // (S // PAIR) * QUAD + column // PAIR % QUAD
    return of_step, of_thread % (S // PAIR) * PAIR + column % PAIR


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def sums_of_tiles(weight, M: tl.constexpr, T: tl.constexpr, S: tl.constexpr):  # type: ignore[no-untyped-def]
    """[M, T] of columns as `keys_of_columns` has them."""
    PAIR: tl.constexpr = min(2, S)
    QUAD: tl.constexpr = min(4, T)
    of_tile = tl.reshape(weight, [M, T // QUAD, S // PAIR, QUAD, PAIR])
    return tl.minimum(tl.reshape(tl.sum(tl.sum(of_tile, 4), 2), [M, T]), _LARGEST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tile_sums(  # type: ignore[no-untyped-def]
    q, k, query_place, sums, stride_ql, stride_qn, stride_kn, stride_kl, num_queries, num_tiles, scale,
    tiles_at_once, M: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, QUANT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCKS times M queries of one head, T tiles of S keys at a time.

    Which keys is worked out here: places that are read first would keep the keys from being fetched ahead.
    """
    head, first_own = tl.program_id(1).to(tl.int64), tl.program_id(0) * (BLOCKS * M) + tl.arange(0, M)
    blocks = ()
    for block in tl.static_range(BLOCKS):
        own = first_own + block * M
        own_queries = load_queries(q + head * stride_qn, query_place, own, num_queries, stride_ql, D, QUANT)
        blocks += (own_queries,)  # type: ignore[assignment, unused-ignore]
    of_step, stretch = keys_of_columns(T, S)
    first = tl.program_id(2) * tiles_at_once
    stop = tl.minimum(first + tiles_at_once, num_tiles)
    keys_of_head, stride_j = k + head * stride_kn, tl.full([], TILE, tl.int64) * stride_kl
    channel, part = tl.arange(0, D)[None, :], D + tl.arange(0, 2)[None, :]
    at = places(first, of_step, stretch, 0, T, S, TILE)[:, None] * stride_kl
    there = (first + of_step < num_tiles)[:, None]
    log_m = tl.load(keys_of_head + first * stride_j + at + part, mask=there, other=0.0)
    for start in range(first, stop, T):
        here, there = keys_of_head + start * stride_j, (start + of_step < num_tiles)[:, None]
        at = places(start, of_step, stretch, 0, T, S, TILE)[:, None] * stride_kl
        keys = tl.load(here + at + channel, mask=there, other=0.0)
        mass = tl.sum(log_m.to(tl.float32), 1) * scale
        # Of the next step: the product does not fetch these ahead by itself.
        here, there = here + T * stride_j, (start + T + of_step < stop)[:, None]
        at = places(start + T, of_step, stretch, 0, T, S, TILE)[:, None] * stride_kl
        log_m = tl.load(here + at + part, mask=there, other=0.0)
        step_k = scale
        if QUANT:
            step_k = tl.maximum(tl.max(tl.abs(keys.to(tl.float32)), 1), 1e-20) / 127
            keys = tl.floor(keys.to(tl.float32) * (1.0 / step_k)[:, None] + 0.5).to(keys.dtype)
            step_k *= scale
        keys = tl.trans(keys)
        totals = ()
        for block in tl.static_range(BLOCKS):
            queries, step_q = blocks[block]  # type: ignore[var-annotated, unused-ignore]
            product = tl.dot(queries, keys, input_precision=PRECISION)
            if QUANT:
                logit = product * step_q[:, None] * step_k[None, :] + mass[None, :]
            else:
                logit = product * step_k + mass[None, :]
            totals += (sums_of_tiles(tl.exp2(logit), M, T, S),)  # type: ignore[assignment, unused-ignore]
        # Threads wait for each other before each of these: not between the products.
        tile = start + tl.arange(0, T)
        for block in tl.static_range(BLOCKS):
            own = first_own + block * M
            out = sums + (head * num_queries + own)[:, None] * num_tiles + tile[None, :]
            tl.store(out, totals[block], mask=(own < num_queries)[:, None] & (tile < num_tiles)[None, :])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def places(start, of_step, stretch, before, T: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which keys of T tiles are looked at, from the first one's on; see `tile_mass.sample_places`.

    `start` counts from the tile that has so many `before` it.
    """
    turn = of_step + before
    if T % 8 != 0:  # else the same in each step, which begins at a multiple of T
        turn += start
    return of_step * TILE + stretch * (TILE // S) + (stretch * 5 + turn * 3) % 8 * (TILE // S) // 8


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _write_list(bits, limit, at_list, num_chosen, tile):  # type: ignore[no-untyped-def]
    """The tiles above the limit, and the first that are equal to it, in rising order."""
    above, equal = (bits > limit).to(tl.int32), (bits == limit).to(tl.int32)
    # Two running sums in one: rows are shorter than 2 to the 15.
    before = tl.cumsum(above | (equal << 16), 0)
    room = num_chosen - tl.sum(above, 0)
    equals = before >> 16
    taken = (above > 0) | ((equal > 0) & (equals <= room))
    tl.store(at_list + (before & 0xFFFF) + tl.minimum(equals, room) - 1, tile, mask=taken)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _heaviest(  # type: ignore[no-untyped-def]
    sums, is_candidate, index, fewer, num_queries, num_tiles, num_chosen, num_listed, num_chosen_of_fewer,
    num_listed_of_fewer, R: tl.constexpr, J: tl.constexpr, HAS_FEWER: tl.constexpr,
):  # fmt: skip
    """One program: the lists of one tile of queries; R sampled queries of it."""
    own = tl.program_id(0) * R + tl.arange(0, R)
    head = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, J)
    inside = tile < num_tiles
    at = (head * num_queries + own)[:, None] * num_tiles + tile[None, :]
    value = tl.load(sums + at, mask=inside[None, :], other=0.0)
    share = 1.0 / (tl.maximum(tl.sum(value, 1), _LEAST) * R)
    mass = tl.sum(value * share[:, None], 0)
    may = tl.load(is_candidate + tile, mask=inside, other=0) > 0
    # No share is 2 or more; what is no number must not be either, or more would be written than a list holds.
    bits = tl.where(may, tl.minimum(mass.to(tl.int32, bitcast=True), _MOST_BITS), -1)
    limit = tl.full([], 0, tl.int32)
    limit_of_fewer = tl.full([], 0, tl.int32)
    for step in tl.static_range(30):
        raised = limit | (1 << (29 - step))
        count = (bits >= raised).to(tl.int32)
        if HAS_FEWER:
            raised_of_fewer = limit_of_fewer | (1 << (29 - step))
            both = tl.sum(count | ((bits >= raised_of_fewer).to(tl.int32) << 16), 0)
            limit_of_fewer = tl.where((both >> 16) >= num_chosen_of_fewer, raised_of_fewer, limit_of_fewer)
            limit = tl.where((both & 0xFFFF) >= num_chosen, raised, limit)
        else:
            limit = tl.where(tl.sum(count, 0) >= num_chosen, raised, limit)
    row = head * tl.num_programs(0) + tl.program_id(0)
    _write_list(bits, limit, index + row * num_listed, num_chosen, tile)
    if HAS_FEWER:
        _write_list(bits, limit_of_fewer, fewer + row * num_listed_of_fewer, num_chosen_of_fewer, tile)


class Launch(NamedTuple):
    """Of the first kernel; `tests/bench/tile_choice.py` times others."""

    queries: int
    """Of a product, at most."""
    keys: int
    """Of a product, a power of two."""
    blocks: int
    """Products with the same keys, at most; more read keys less often."""
    programs: int
    """As near as heads and whole steps come."""
    warps: int
    stages: int


HOPPER, HOPPER_CODES = Launch(64, 128, 5, 132, 8, 3), Launch(64, 64, 5, 264, 4, 1)
"""Products in 16 bits and of codes, measured on an H200 (tile_choice-h200); for its 228 KB of shared memory."""
OTHER = Launch(64, 64, 1, 960, 4, 2)
WARPS_OF_HEAVIEST = 4


def choose_launch(k_NLW: Tensor, *, quant: bool) -> Launch:
    """For keys of 4 bytes, and elsewhere, what takes less shared memory."""
    is_hopper = k_NLW.is_cuda and torch.cuda.get_device_capability(k_NLW.device)[0] == 9
    if not is_hopper or k_NLW.dtype.itemsize > 2:
        return OTHER
    return HOPPER_CODES if quant else HOPPER


def tile_sums(
    q_QNW: Tensor, k_NLW: Tensor, query_place_S: Tensor, sum_NSJ: Tensor, sizes: tuple[int, int, int], *, quant: bool,
    launch: Launch | None = None,
) -> None:  # fmt: skip
    """Mass of a sample of each tile's keys, for a sample of the queries.

    Args:
        q_QNW: After RoPE; ones in the two channels of log m, zeros in the 14 behind these.
        k_NLW: Keys with those 16 channels behind their own; whole tiles.
        query_place_S: Of the sampled queries, int64.
        sum_NSJ: Written; float32, contiguous.
        sizes: Channels of a key without those of log m, keys of a tile, and how many of these are looked at, at the
            places of `tile_mass.sample_places`; powers of two.
        quant: Products of 8-bit codes.
        launch: None: what suits device and dtype.
    """
    head_dim, tile, samples = sizes
    heads, num_queries, num_tiles = sum_NSJ.shape
    assert q_QNW.shape[2] == k_NLW.shape[2] == head_dim + 16
    launch = launch or choose_launch(k_NLW, quant=quant)
    rows = min(launch.queries, max(16, triton.next_power_of_2(num_queries)))
    blocks = min(launch.blocks, triton.cdiv(num_queries, rows))
    at_once = max(1, launch.keys // samples)
    columns = triton.cdiv(num_queries, rows * blocks), heads
    part = at_once * triton.cdiv(num_tiles, at_once * max(1, launch.programs // (columns[0] * columns[1])))
    _tile_sums[(*columns, triton.cdiv(num_tiles, part))](
        q_QNW, k_NLW, query_place_S, sum_NSJ, *q_QNW.stride()[:2], *k_NLW.stride()[:2],
        num_queries, num_tiles, LOG2_E * head_dim**-0.5, part, M=rows, BLOCKS=blocks, T=at_once, S=samples, TILE=tile,
        D=head_dim, QUANT=quant, PRECISION="ieee" if q_QNW.dtype.itemsize == 4 else "tf32", num_warps=launch.warps,
        num_stages=launch.stages,
    )  # fmt: skip


def write_heaviest(
    sum_NSJ: Tensor,
    is_candidate_J: Tensor,
    num_always: int,
    index_NIJ: Tensor,
    fewer_NIJ: Tensor | None = None,
) -> None:
    """The candidates with the highest mean share into the lists, in rising order.

    Args:
        sum_NSJ: From `tile_sums`, float32; equally many queries, a power of two, of each tile of queries.
        is_candidate_J: int32.
        num_always: Last entries of each list, which are not written; the others are, at most as many as candidates.
        index_NIJ, fewer_NIJ: Lists of the same tiles of queries.
    """
    heads, num_queries, num_tiles = sum_NSJ.shape
    query_tiles, listed = index_NIJ.shape[1:]
    assert num_tiles < 1 << 15, "two counts share 32 bits, and sums of a row are finite"
    fewer = index_NIJ if fewer_NIJ is None else fewer_NIJ
    _heaviest[(query_tiles, heads)](
        sum_NSJ, is_candidate_J, index_NIJ, fewer, num_queries, num_tiles, listed - num_always, listed,
        fewer.shape[2] - num_always, fewer.shape[2], R=num_queries // query_tiles,
        J=triton.next_power_of_2(num_tiles), HAS_FEWER=fewer_NIJ is not None, num_warps=WARPS_OF_HEAVIEST,
    )  # fmt: skip
