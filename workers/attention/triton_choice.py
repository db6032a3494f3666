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
    q, k, query_place, key_place, lse, stride_ql, stride_qn, stride_kn, stride_kl, num_queries, num_tiles, scale,
    tiles_at_once, M: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    QUANT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: M queries of one head, T tiles of S keys at a time; N is T, or 16 if that is more."""
    own = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, D)[None, :]
    inside = own < num_queries
    at_q = tl.load(query_place + own, mask=inside, other=0) * stride_ql + head * stride_qn
    queries = tl.load(q + at_q[:, None] + channel, mask=inside[:, None], other=0.0)
    step_q = tl.full([M], 1.0, tl.float32)
    if QUANT:
        step_q = tl.maximum(tl.max(tl.abs(queries.to(tl.float32)), 1), 1e-20) / 127
        queries = tl.floor(queries.to(tl.float32) * (1.0 / step_q)[:, None] + 0.5).to(queries.dtype)
    column = tl.arange(0, N)
    is_of_tile = (tl.arange(0, T * S)[:, None] // S == column[None, :]).to(tl.float32)
    first = tl.program_id(2) * tiles_at_once
    for start in range(first, tl.minimum(first + tiles_at_once, num_tiles), T):
        sample = start * S + tl.arange(0, T * S)
        there = sample < num_tiles * S
        at_k = tl.load(key_place + sample, mask=there, other=0) * stride_kl + head * stride_kn
        keys = tl.load(k + at_k[:, None] + channel, mask=there[:, None], other=0.0)
        mass = tl.load(k + at_k + D, mask=there, other=0.0).to(tl.float32)
        mass += tl.load(k + at_k + D + 1, mask=there, other=0.0).to(tl.float32)
        if QUANT:
            step_k = tl.maximum(tl.max(tl.abs(keys.to(tl.float32)), 1), 1e-20) / 127
            keys = tl.floor(keys.to(tl.float32) * (1.0 / step_k)[:, None] + 0.5).to(keys.dtype)
            product = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * step_q[:, None] * step_k[None, :]
        else:
            product = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        weight = tl.exp(tl.minimum((product + mass[None, :]) * scale, _LARGEST))
        total = tl.dot(weight, is_of_tile, input_precision=PRECISION)
        tile = start + column
        at = (head * num_queries + own)[:, None] * num_tiles + tile[None, :]
        is_stored = (column < T) & (tile < num_tiles)
        tl.store(lse + at, tl.log(total), mask=inside[:, None] & is_stored[None, :])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _heaviest(  # type: ignore[no-untyped-def]
    lse, is_candidate, index, num_queries, num_tiles, num_chosen, num_listed, R: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """One program: the list of one tile of queries; R sampled queries of it."""
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
    limit = tl.full([], 0, tl.int32)
    for step in tl.static_range(31):
        raised = limit | (1 << (30 - step))
        enough = tl.sum((bits >= raised).to(tl.int32), 0) >= num_chosen
        limit = tl.where(enough, raised, limit)
    above = (bits > limit).to(tl.int32)
    equal = (bits == limit).to(tl.int32)
    room = num_chosen - tl.sum(above, 0)
    taken = above + equal * (tl.cumsum(equal, 0) <= room).to(tl.int32)
    place = tl.cumsum(taken, 0) - 1
    at_list = index + (head * tl.num_programs(0) + tl.program_id(0)) * num_listed
    tl.store(at_list + place, tile, mask=taken > 0)


QUERIES_AT_ONCE, WARPS, STAGES = 64, 4, 2
"""Of the first kernel; `tests/bench/tile_choice.py` times others."""


def tile_lse(
    q_QNW: Tensor, k_NLW: Tensor, places: tuple[Tensor, Tensor], lse_NSJ: Tensor, head_dim: int, *, quant: bool,
    keys_at_once: int,
) -> None:  # fmt: skip
    """Log of the mass of a sample of each tile's keys, for a sample of the queries.

    Args:
        q_QNW: After RoPE.
        k_NLW: Keys with log m behind their own channels.
        places: Of the sampled queries, and of the sampled keys, equally many of each tile; int64.
        lse_NSJ: Written; float32, contiguous.
        head_dim: A power of two; so is the number of keys of a tile.
        quant: Products of 8-bit codes.
        keys_at_once: A power of two.
    """
    query_place, key_place = places
    heads, num_queries, num_tiles = lse_NSJ.shape
    samples = len(key_place) // num_tiles
    rows = min(QUERIES_AT_ONCE, max(16, triton.next_power_of_2(num_queries)))
    at_once = max(1, keys_at_once // samples)
    # As many programs as fill a large GPU several times; each a whole number of steps.
    part = at_once * max(1, triton.cdiv(num_tiles, 16 * at_once))
    _tile_lse[(triton.cdiv(num_queries, rows), heads, triton.cdiv(num_tiles, part))](
        q_QNW, k_NLW, query_place, key_place, lse_NSJ, *q_QNW.stride()[:2], *k_NLW.stride()[:2],
        num_queries, num_tiles, head_dim**-0.5, part, M=rows, T=at_once, S=samples, D=head_dim, N=max(16, at_once),
        QUANT=quant, PRECISION="ieee" if q_QNW.dtype.itemsize == 4 else "tf32", num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


def write_heaviest(lse_NSJ: Tensor, is_candidate_J: Tensor, num_chosen: int, index_NIJ: Tensor) -> None:
    """The `num_chosen` candidates with the highest mean share into the lists, in rising order.

    Args:
        lse_NSJ: From `tile_lse`; equally many queries, a power of two, of each tile of queries.
        is_candidate_J: int32.
        num_chosen: At most the number of candidates.
        index_NIJ: The first `num_chosen` entries of each list are written.
    """
    heads, num_queries, num_tiles = lse_NSJ.shape
    query_tiles = index_NIJ.shape[1]
    _heaviest[(query_tiles, heads)](
        lse_NSJ, is_candidate_J, index_NIJ, num_queries, num_tiles, num_chosen, index_NIJ.shape[2],
        R=num_queries // query_tiles, J=triton.next_power_of_2(num_tiles), num_warps=4,
    )  # fmt: skip
