"""Kernels that choose tiles: what `tile_choice.py` does, without storing a product or sorting a list.

A first kernel compares a sample of the queries with a sample of the keys where both lie and keeps the log of the mass
of each tile, summed by a product with ones; a second makes shares of it and finds the heaviest tiles by halving: 31
questions "how many are at least this heavy?" give the exact limit, since floats that are not negative are in the order
of their bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_LARGEST = tl.constexpr(80.0)
"""Logits are cut there: so many exponentials add up in float32 with nothing subtracted."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tile_lse(  # type: ignore[no-untyped-def]
    q, k, query_place, lse, stride_ql, stride_qn, stride_kn, stride_kl, num_queries, num_tiles, scale,
    tiles_at_once, M: tl.constexpr, T: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, QUANT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: M queries of one head, T tiles of S keys at a time; N is T, or 16 if that is more.

    Which keys is worked out here: places that are read first would keep the keys from being fetched ahead. log m is a
    product too, of the 16 channels behind a key's own.
    """
    own = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    channel, behind = tl.arange(0, D)[None, :], D + tl.arange(0, 16)[None, :]
    inside = own < num_queries
    at_q = tl.load(query_place + own, mask=inside, other=0) * stride_ql + head * stride_qn
    queries = tl.load(q + at_q[:, None] + channel, mask=inside[:, None], other=0.0)
    ones = tl.load(q + at_q[:, None] + behind, mask=inside[:, None], other=0.0)
    step_q = tl.full([M], 1.0, tl.float32)
    if QUANT:
        step_q = tl.maximum(tl.max(tl.abs(queries.to(tl.float32)), 1), 1e-20) / 127
        queries = tl.floor(queries.to(tl.float32) * (1.0 / step_q)[:, None] + 0.5).to(queries.dtype)
    column, member = tl.arange(0, N), tl.arange(0, T * S)
    is_of_tile = (member[:, None] // S == column[None, :]).to(tl.float32)
    keys_of_head = k + head * stride_kn
    first = tl.program_id(2) * tiles_at_once
    for start in range(first, tl.minimum(first + tiles_at_once, num_tiles), T):
        tile, stretch = start + member // S, member % S
        place = tile * TILE + stretch * (TILE // S) + (stretch * 5 + tile * 3) % 8 * (TILE // S) // 8
        there = (tile < num_tiles)[:, None]
        at_k = keys_of_head + (place.to(tl.int64) * stride_kl)[:, None]
        keys = tl.load(at_k + channel, mask=there, other=0.0)
        mass = tl.dot(ones, tl.trans(tl.load(at_k + behind, mask=there, other=0.0)), input_precision=PRECISION)
        if QUANT:
            step_k = tl.maximum(tl.max(tl.abs(keys.to(tl.float32)), 1), 1e-20) / 127
            keys = tl.floor(keys.to(tl.float32) * (1.0 / step_k)[:, None] + 0.5).to(keys.dtype)
            product = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * step_q[:, None] * step_k[None, :]
            product += mass
        else:
            product = tl.dot(queries, tl.trans(keys), mass, input_precision=PRECISION)
        weight = tl.exp(tl.minimum(product * scale, _LARGEST))
        total = tl.dot(weight, is_of_tile, input_precision=PRECISION)
        at = (head * num_queries + own)[:, None] * num_tiles + (start + column)[None, :]
        is_stored = (column < T) & (start + column < num_tiles)
        tl.store(lse + at, tl.log(total), mask=inside[:, None] & is_stored[None, :])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _write_list(bits, at_list, num_chosen, tile):  # type: ignore[no-untyped-def]
    """The heaviest tiles, by the bits of their mass, in rising order."""
    limit = tl.full([], 0, tl.int32)
    for step in tl.static_range(31):
        raised = limit | (1 << (30 - step))
        enough = tl.sum((bits >= raised).to(tl.int32), 0) >= num_chosen
        limit = tl.where(enough, raised, limit)
    above = (bits > limit).to(tl.int32)
    equal = (bits == limit).to(tl.int32)
    room = num_chosen - tl.sum(above, 0)
    taken = above + equal * (tl.cumsum(equal, 0) <= room).to(tl.int32)
    tl.store(at_list + tl.cumsum(taken, 0) - 1, tile, mask=taken > 0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _heaviest(  # type: ignore[no-untyped-def]
    lse, is_candidate, index, fewer, num_queries, num_tiles, num_chosen, num_listed, num_chosen_of_fewer,
    num_listed_of_fewer, R: tl.constexpr, J: tl.constexpr, HAS_FEWER: tl.constexpr,
):  # fmt: skip
    """One program: the lists of one tile of queries; R sampled queries of it."""
    own = tl.program_id(0) * R + tl.arange(0, R)
    head = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, J)
    inside = tile < num_tiles
    at = (head * num_queries + own)[:, None] * num_tiles + tile[None, :]
    value = tl.load(lse + at, mask=inside[None, :], other=float("-inf"))
    weight = tl.exp(value - tl.max(value, 1)[:, None])
    mass = tl.sum(weight / tl.sum(weight, 1)[:, None], 0) / R
    may = tl.load(is_candidate + tile, mask=inside, other=0) > 0
    bits = tl.where(may, mass.to(tl.int32, bitcast=True), -1)
    row = head * tl.num_programs(0) + tl.program_id(0)
    _write_list(bits, index + row * num_listed, num_chosen, tile)
    if HAS_FEWER:
        _write_list(bits, fewer + row * num_listed_of_fewer, num_chosen_of_fewer, tile)


QUERIES_AT_ONCE, WARPS, STAGES = 64, 4, 3
"""Of the first kernel; `tests/bench/tile_choice.py` times others."""


def tile_lse(
    q_QNW: Tensor, k_NLW: Tensor, query_place_S: Tensor, lse_NSJ: Tensor, sizes: tuple[int, int, int], *, quant: bool,
    keys_at_once: int,
) -> None:  # fmt: skip
    """Log of the mass of a sample of each tile's keys, for a sample of the queries.

    Args:
        q_QNW: After RoPE; ones in the two channels of log m, zeros in the 14 behind these.
        k_NLW: Keys with those 16 channels behind their own; whole tiles.
        query_place_S: Of the sampled queries, int64.
        lse_NSJ: Written; float32, contiguous.
        sizes: Channels of a key without those of log m, keys of a tile, and how many of these are looked at, at the
            places of `tile_mass.sample_places`; powers of two.
        quant: Products of 8-bit codes.
        keys_at_once: A power of two.
    """
    head_dim, tile, samples = sizes
    heads, num_queries, num_tiles = lse_NSJ.shape
    assert q_QNW.shape[2] == k_NLW.shape[2] == head_dim + 16
    rows = min(QUERIES_AT_ONCE, max(16, triton.next_power_of_2(num_queries)))
    at_once = max(1, keys_at_once // samples)
    # As many programs as fill a large GPU several times; each a whole number of steps.
    part = at_once * max(1, triton.cdiv(num_tiles, 16 * at_once))
    _tile_lse[(triton.cdiv(num_queries, rows), heads, triton.cdiv(num_tiles, part))](
        q_QNW, k_NLW, query_place_S, lse_NSJ, *q_QNW.stride()[:2], *k_NLW.stride()[:2],
        num_queries, num_tiles, head_dim**-0.5, part, M=rows, T=at_once, S=samples, TILE=tile, D=head_dim,
        N=max(16, at_once), QUANT=quant, PRECISION="ieee" if q_QNW.dtype.itemsize == 4 else "tf32", num_warps=WARPS,
        num_stages=STAGES,
    )  # fmt: skip


def write_heaviest(
    lse_NSJ: Tensor,
    is_candidate_J: Tensor,
    num_always: int,
    index_NIJ: Tensor,
    fewer_NIJ: Tensor | None = None,
) -> None:
    """The candidates with the highest mean share into the lists, in rising order.

    Args:
        lse_NSJ: From `tile_lse`; equally many queries, a power of two, of each tile of queries.
        is_candidate_J: int32.
        num_always: Last entries of each list, which are not written; the others are, at most as many as candidates.
        index_NIJ, fewer_NIJ: Lists of the same tiles of queries.
    """
    heads, num_queries, num_tiles = lse_NSJ.shape
    query_tiles, listed = index_NIJ.shape[1:]
    fewer = index_NIJ if fewer_NIJ is None else fewer_NIJ
    _heaviest[(query_tiles, heads)](
        lse_NSJ, is_candidate_J, index_NIJ, fewer, num_queries, num_tiles, listed - num_always, listed,
        fewer.shape[2] - num_always, fewer.shape[2], R=num_queries // query_tiles,
        J=triton.next_power_of_2(num_tiles), HAS_FEWER=fewer_NIJ is not None, num_warps=4,
    )  # fmt: skip
