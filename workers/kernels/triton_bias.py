"""Attention in plain Triton: any tiles, any order of queries and keys, log m added to the logits.

Keys are read where they lie, through the order if there is one, so nothing is gathered or copied first. Tested with
Triton's interpreter and on an H200; its speed was not measured (a plain kernel of this kind reached 290-360 TFLOP/s on
an H100). Warp specialisation stays off: it hung there with Triton 3.6.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.contracts import KernelPart, KeyValues, Tiles
from workers.kernels.lse import attend_parts
from workers.kernels.tile_lists import TileLists

_LOG2_E = math.log2(math.e)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _fold(most, total, summed, logit, values, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Take some more keys into a softmax under way: largest logit, sum of the weights, weighted sum of the values."""
    higher = tl.maximum(most, tl.max(logit, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far: no -inf minus -inf
    weight = tl.exp2(logit - base[:, None])
    fade = tl.exp2(most - base)
    summed = summed * fade[:, None] + tl.dot(weight.to(values.dtype), values, input_precision=PRECISION)
    return higher, total * fade + tl.sum(weight, 1), summed


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _finish(most, total, summed):  # type: ignore[no-untyped-def]
    """Result and natural log-sum-exp; 0 and -inf where nothing was seen."""
    empty = total == 0.0
    some = tl.where(empty, 1.0, total)
    return summed / some[:, None], tl.where(empty, float("-inf"), (most + tl.log2(some)) * 0.6931471805599453)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def attend_rows(  # type: ignore[no-untyped-def]
    q, k, v, mass, out, lse, key_tile_index, key_tile_count, query_order, key_order,
    stride_qb, stride_qt, stride_qn, stride_kb, stride_kt, stride_kn, stride_vb, stride_vt, stride_vn,
    scale, heads, num_queries, num_keys, num_key_tiles, query_tile, key_tile, parts_per_tile, head_dim,
    HAS_TILES: tl.constexpr, HAS_MASS: tl.constexpr, HAS_QUERY_ORDER: tl.constexpr, HAS_KEY_ORDER: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one query tile and head, over all keys that the tile sees, in base 2."""
    row_tile = tl.program_id(0) // parts_per_tile
    bn = tl.program_id(1)
    batch, head = bn // heads, bn % heads
    within = (tl.program_id(0) % parts_per_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = row_tile * query_tile + within
    is_query = (within < query_tile) & (place < num_queries)
    token = place
    if HAS_QUERY_ORDER:
        token = tl.load(query_order + bn.to(tl.int64) * num_queries + place, mask=is_query, other=0)
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < head_dim
    at_q = q + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qn
    at_q += token.to(tl.int64)[:, None] * stride_qt + channel[None, :]
    query = tl.load(at_q, mask=is_query[:, None] & is_channel[None, :], other=0.0)
    at_k = k + batch.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kn
    at_v = v + batch.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vn

    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row = bn.to(tl.int64) * (tl.num_programs(0) // parts_per_tile) + row_tile
    num_seen = num_key_tiles
    if HAS_TILES:
        num_seen = tl.load(key_tile_count + row)
    for j in range(0, num_seen):
        tile = j
        if HAS_TILES:
            tile = tl.load(key_tile_index + row * num_key_tiles + j)
        stop = tl.minimum((tile + 1) * key_tile, num_keys)
        for start in range(tile * key_tile, stop, BLOCK_N):
            key_place = start + tl.arange(0, BLOCK_N)
            is_key = key_place < stop
            key = key_place
            if HAS_KEY_ORDER:
                key = tl.load(key_order + bn.to(tl.int64) * num_keys + key_place, mask=is_key, other=0)
            line = key.to(tl.int64)[:, None]
            there = is_key[:, None] & is_channel[None, :]
            keys = tl.load(at_k + line * stride_kt + channel[None, :], mask=there, other=0.0)
            logit = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
            if HAS_MASS:
                extra = tl.load(mass + bn.to(tl.int64) * num_keys + key, mask=is_key, other=float("-inf"))
                logit += (extra * 1.4426950408889634)[None, :]
            logit = tl.where(is_key[None, :], logit, float("-inf"))
            values = tl.load(at_v + line * stride_vt + channel[None, :], mask=there, other=0.0)
            most, total, summed = _fold(most, total, summed, logit, values, PRECISION)
    result, length = _finish(most, total, summed)
    line_out = (batch.to(tl.int64) * num_queries + token) * heads + head
    at_out = out + line_out[:, None] * head_dim + channel[None, :]
    tl.store(at_out, result.to(out.dtype.element_ty), mask=is_query[:, None] & is_channel[None, :])
    tl.store(lse + line_out, length, mask=is_query)


class TritonKernel:
    """The kernel of this file; 16-bit numbers and float32, head dimensions up to 256."""

    def __init__(self) -> None:
        self._lists = TileLists()

    @property
    def version(self) -> str:
        return f"triton (triton {triton.__version__}, torch {torch.__version__})"

    def attend(self, q_BQND: Tensor, parts: tuple[KernelPart, ...]) -> tuple[Tensor, Tensor]:
        return attend_parts(
            lambda q, keys: self._attend(q, keys, None), lambda q, part: self._attend(q, *part), q_BQND, parts
        )

    def _attend(self, q_BQND: Tensor, keys: KeyValues, tiles: Tiles | None) -> tuple[Tensor, Tensor]:
        q, k, v = (_with_dense_channels(x.to(q_BQND.dtype)) for x in (q_BQND, keys.k_BKND, keys.v_BKND))
        batch, num_queries, heads, head_dim = q.shape
        mass = None if keys.log_mass_BNK is None else keys.log_mass_BNK.float().contiguous()
        query_tile, key_tile = (num_queries, keys.num_tokens) if tiles is None else (tiles.query_tile, tiles.key_tile)
        block_m = min(128, max(16, triton.next_power_of_2(query_tile)))
        parts_per_tile = triton.cdiv(query_tile, block_m)
        lists = None if tiles is None else self._lists.of(tiles)
        orders = (None, None) if tiles is None else (tiles.query_order_BNQ, tiles.key_order_BNK)
        query_order, key_order = (None if x is None else x.contiguous() for x in orders)
        out = torch.empty((batch, num_queries, heads, head_dim), dtype=q.dtype, device=q.device)
        lse = torch.empty((batch, num_queries, heads), dtype=torch.float32, device=q.device)
        grid = (triton.cdiv(num_queries, query_tile) * parts_per_tile, batch * heads)
        nothing = lse  # stands where a pointer is not read
        attend_rows[grid](
            q, k, v, nothing if mass is None else mass, out, lse,
            nothing if lists is None else lists.index_BNIJ, nothing if lists is None else lists.count_BNI,
            nothing if query_order is None else query_order, nothing if key_order is None else key_order,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            head_dim**-0.5 * _LOG2_E, heads, num_queries, keys.num_tokens, triton.cdiv(keys.num_tokens, key_tile),
            query_tile, key_tile, parts_per_tile, head_dim,
            HAS_TILES=tiles is not None, HAS_MASS=mass is not None,
            HAS_QUERY_ORDER=query_order is not None, HAS_KEY_ORDER=key_order is not None,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_M=block_m,
            BLOCK_N=min(64, max(16, triton.next_power_of_2(key_tile))),
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=8 if block_m == 128 else 4, num_stages=2,
        )  # fmt: skip
        return out, lse


def _with_dense_channels(x_BKND: Tensor) -> Tensor:
    return x_BKND if x_BKND.stride(3) == 1 else x_BKND.contiguous()
