"""Attention over listed tiles in Triton, made for tables of whole tiles: no masks over keys, log m by one more product.

Each program takes a tile of queries of one head through the key tiles in its list. The channels of log m go through
the tensor cores as the key's own do, so a logit costs one multiply-add before its exponential. On Hopper keys and
values can come through tensor descriptors (TMA), which costs the warps no address arithmetic. Equality with the
reference was tested with Triton's interpreter; `python -m tests.bench.listed_kernels` compares shapes on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.listed_tiles import AttendLse, AttendTable

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """How the work is cut."""

    block_m: int = 128
    """Queries of a program."""
    block_n: int = 64
    """Keys of one step."""
    num_warps: int = 8
    num_stages: int = 3
    """Steps whose keys are under way."""
    by_tma: bool = False
    """Keys and values through tensor descriptors; from compute capability 9.0 on."""


HOPPER = Config(block_m=128, block_n=128, num_warps=8, num_stages=2)
"""The fastest there for channels of two bytes."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def attend_listed(  # type: ignore[no-untyped-def]
    q, k, v, k_rows, extra_rows, v_rows, out, lse, index,
    stride_qt, stride_qn, stride_kn, stride_kt, stride_vn, stride_vt,
    scale, heads, num_queries, num_slots, num_listed, head_dim,
    TILE: tl.constexpr, EXTRA: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, BY_TMA: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one tile and head over all listed keys, in base 2."""
    PARTS: tl.constexpr = TILE // BLOCK_M
    STEPS: tl.constexpr = TILE // BLOCK_N
    row_tile, head = tl.program_id(0) // PARTS, tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = token < num_queries
    channel, extra = tl.arange(0, BLOCK_D), tl.arange(0, EXTRA)
    is_channel = channel < head_dim
    at_q = q + token.to(tl.int64)[:, None] * stride_qt + head * stride_qn
    query = tl.load(at_q + channel[None, :], mask=is_query[:, None] & is_channel[None, :], other=0.0)
    query_extra = tl.load(at_q + head_dim + extra[None, :], mask=is_query[:, None], other=0.0)
    at_k, at_v = k + head * stride_kn, v + head * stride_vn
    list_start = index + (head * (tl.num_programs(0) // PARTS) + row_tile) * num_listed

    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.range(0, num_listed * STEPS):
        start = tl.load(list_start + i // STEPS) * TILE + (i % STEPS) * BLOCK_N
        if BY_TMA:
            line = (head * num_slots).to(tl.int32) + start
            keys = k_rows.load([line, 0])
            mass = extra_rows.load([line, head_dim])
            values = v_rows.load([line, 0])
        else:
            key = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
            keys = tl.load(at_k + key * stride_kt + channel[None, :], mask=is_channel[None, :], other=0.0)
            mass = tl.load(at_k + key * stride_kt + head_dim + extra[None, :])
            values = tl.load(at_v + key * stride_vt + channel[None, :], mask=is_channel[None, :], other=0.0)
        logit = tl.dot(query_extra, tl.trans(mass), input_precision=PRECISION)
        logit = tl.dot(query, tl.trans(keys), logit, input_precision=PRECISION)
        # A finite number stands for log m where there is no key, so nothing here is infinite.
        higher = tl.maximum(most, tl.max(logit, 1) * scale)
        weight = tl.exp2(logit * scale - higher[:, None])
        fade = tl.exp2(most - higher)
        total = total * fade + tl.sum(weight, 1)
        summed = tl.dot(weight.to(values.dtype), values, summed * fade[:, None], input_precision=PRECISION)
        most = higher
    at_out = out + (token.to(tl.int64)[:, None] * heads + head) * head_dim + channel[None, :]
    result = summed / total[:, None]
    tl.store(at_out, result.to(out.dtype.element_ty), mask=is_query[:, None] & is_channel[None, :])
    if HAS_LSE:
        length = (most + tl.log2(total)) * 0.6931471805599453
        tl.store(lse + token.to(tl.int64) * heads + head, length, mask=is_query)


def make_triton_listed(tile: int, config: Config | None = None) -> AttendTable:
    """Attention over tiles of that many keys, a power of two from 16 on."""
    attend = _make(tile, config or Config())
    return lambda q, k, v, index: attend(q, k, v, index, None)


def make_triton_listed_lse(tile: int, config: Config | None = None) -> AttendLse:
    """The same with the log-sum-exp."""
    attend = _make(tile, config or Config())

    def attend_lse(q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor) -> tuple[Tensor, Tensor]:
        lse = torch.empty(q_QNW.shape[:2], dtype=torch.float32, device=q_QNW.device)
        return attend(q_QNW, k_NLW, v_NLD, index_NIJ, lse), lse

    return attend_lse


def _make(tile: int, chosen: Config) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """Writes lse_QN where there is room for it."""
    assert tile >= 16
    assert tile & (tile - 1) == 0
    block_m, block_n = min(chosen.block_m, tile), min(chosen.block_n, tile)

    def attend(q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, lse_QN: Tensor | None) -> Tensor:
        num_queries, heads = q_QNW.shape[:2]
        num_slots, head_dim = v_NLD.shape[1:]
        block_d = max(16, triton.next_power_of_2(head_dim))
        by_tma = chosen.by_tma and block_d == head_dim and k_NLW.is_contiguous() and v_NLD.is_contiguous()
        described = _describe_rows(k_NLW, v_NLD, block_n, block_d) if by_tma else (k_NLW, k_NLW, v_NLD)
        out = torch.empty((num_queries, heads, head_dim), dtype=q_QNW.dtype, device=q_QNW.device)
        attend_listed[(index_NIJ.shape[1] * (tile // block_m), heads)](
            q_QNW, k_NLW, v_NLD, *described, out, out if lse_QN is None else lse_QN, index_NIJ,
            *q_QNW.stride()[:2], *k_NLW.stride()[:2], *v_NLD.stride()[:2],
            head_dim**-0.5 * _LOG2_E, heads, num_queries, num_slots, index_NIJ.shape[2], head_dim,
            TILE=tile, EXTRA=k_NLW.shape[2] - head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n,
            PRECISION="ieee" if q_QNW.dtype == torch.float32 else "tf32", BY_TMA=by_tma,
            HAS_LSE=lse_QN is not None,
            num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
        return out

    return attend


def _describe_rows(k_NLW: Tensor, v_NLD: Tensor, block_n: int, block_d: int) -> tuple[object, object, object]:
    """Keys, their channels behind, and values as rows of one matrix each."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    k, v = k_NLW.flatten(0, 1), v_NLD.flatten(0, 1)
    extra = k_NLW.shape[2] - v_NLD.shape[2]
    return (
        TensorDescriptor.from_tensor(k, [block_n, block_d]),
        TensorDescriptor.from_tensor(k, [block_n, extra]),
        TensorDescriptor.from_tensor(v, [block_n, block_d]),
    )
