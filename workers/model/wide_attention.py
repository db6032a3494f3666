"""Attention of one wide head within each frame, in Triton: of 384 channels, which torch has no fast kernel for.

A program keeps some queries and what they gather, in three pieces of channels, and passes keys once. Programs that hold
so much are one to a multiprocessor, so keys are dealt out to some programs each, or the last round of them would leave
most of a GPU idle; a second kernel joins what they found. For compute capability 9.0, whose copy engine brings keys.
Plain form: `F.scaled_dot_product_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from workers.model.fused import takes_three_pieces


class Cut(NamedTuple):
    """How attention is dealt out."""

    queries: int = 128
    keys: int = 32
    shares: int = 4
    """Of a frame's keys, for one program each. Each takes 4 bytes a channel and query between the kernels."""
    warps: int = 8
    stages: int = 2


CUT = Cut()


@triton.jit(do_not_specialize=["num"])  # type: ignore[untyped-decorator, unused-ignore]
def _gather(  # type: ignore[no-untyped-def]
    queries, keys, sums, peaks, totals, num, num_rows, share, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of a frame and one share of its keys.

    What lies past a frame is of the next one, or zeros: such keys weigh nothing, such queries are not written.
    """
    first, frame = tl.program_id(0) * BLOCK_Q, tl.program_id(1)
    begin = tl.program_id(2) * share
    line = frame * num
    q0 = queries.load([line + first, 0])
    q1 = queries.load([line + first, PIECE])
    q2 = queries.load([line + first, 2 * PIECE])
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sum0 = tl.zeros([BLOCK_Q, PIECE], tl.float32)
    sum1 = tl.zeros([BLOCK_Q, PIECE], tl.float32)
    sum2 = tl.zeros([BLOCK_Q, PIECE], tl.float32)
    for key in tl.range(begin, min(begin + share, num), BLOCK_K, num_stages=STAGES):
        score = tl.dot(q0, keys.load([line + key, 3 * PIECE]).T, input_precision=PRECISION)
        score = tl.dot(q1, keys.load([line + key, 4 * PIECE]).T, score, input_precision=PRECISION)
        score = tl.dot(q2, keys.load([line + key, 5 * PIECE]).T, score, input_precision=PRECISION)
        score = tl.where((key + tl.arange(0, BLOCK_K) < num)[None, :], score * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        peak = higher
        v0 = keys.load([line + key, 6 * PIECE])
        weight = weight.to(v0.dtype)
        sum0 = tl.dot(weight, v0, sum0 * shrink[:, None], input_precision=PRECISION)
        sum1 = tl.dot(weight, keys.load([line + key, 7 * PIECE]), sum1 * shrink[:, None], input_precision=PRECISION)
        sum2 = tl.dot(weight, keys.load([line + key, 8 * PIECE]), sum2 * shrink[:, None], input_precision=PRECISION)
    query = first + tl.arange(0, BLOCK_Q)
    there = query < num
    row = tl.program_id(2).to(tl.int64) * num_rows + line + query
    to = sums + row[:, None] * (3 * PIECE) + tl.arange(0, PIECE)[None, :]
    # A share's rows are its own means, which are the result where it has all keys.
    inverse = (1.0 / total)[:, None]
    tl.store(to, (sum0 * inverse).to(sums.dtype.element_ty), mask=there[:, None])
    tl.store(to + PIECE, (sum1 * inverse).to(sums.dtype.element_ty), mask=there[:, None])
    tl.store(to + 2 * PIECE, (sum2 * inverse).to(sums.dtype.element_ty), mask=there[:, None])
    tl.store(peaks + row, peak, mask=there)
    tl.store(totals + row, total, mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _join(  # type: ignore[no-untyped-def]
    sums, peaks, totals, out, num_rows, SHARES: tl.constexpr, BLOCK_Q: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q rows, in one of three pieces; shares in their order."""
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    there = query < num_rows
    at = query.to(tl.int64)[:, None] * (3 * PIECE) + tl.program_id(1) * PIECE + tl.arange(0, PIECE)[None, :]
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    for share in tl.static_range(SHARES):
        peak = tl.maximum(peak, tl.load(peaks + share * num_rows + query, mask=there, other=0.0))
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, PIECE], tl.float32)
    for share in tl.static_range(SHARES):
        mass = tl.load(totals + share * num_rows + query, mask=there, other=1.0)
        mass *= tl.exp2(tl.load(peaks + share * num_rows + query, mask=there, other=0.0) - peak)
        total += mass
        part = tl.load(sums + share * num_rows.to(tl.int64) * (3 * PIECE) + at, mask=there[:, None], other=0.0)
        result += part.to(tl.float32) * mass[:, None]
    tl.store(out + at, (result / total[:, None]).to(out.dtype.element_ty), mask=there[:, None])


def attend(qkv_TQC: Tensor, cut: Cut = CUT) -> Tensor:
    """softmax(q k^T / sqrt(C)) v [T, Q, C] of each frame on its own, whatever others are beside it.

    Args:
        qkv_TQC: Queries, keys and values side by side [T, Q, 3 * C], contiguous; on a GPU in 16 bits.
        cut: How it is dealt out.
    """
    frames, num, channels = qkv_TQC.shape[0], qkv_TQC.shape[1], qkv_TQC.shape[2] // 3
    assert takes_three_pieces(channels)
    assert qkv_TQC.is_contiguous()
    piece, rows = channels // 3, frames * num
    share = triton.cdiv(triton.cdiv(num, cut.keys), cut.shares) * cut.keys
    shares = triton.cdiv(num, share)  # none without a key
    out = qkv_TQC.new_empty((frames, num, channels))
    sums = out if shares == 1 else torch.empty((shares, rows, channels), device=out.device)
    peaks, totals = torch.empty((2, shares, rows), device=out.device)
    flat = qkv_TQC.flatten(0, 1)
    _gather[(triton.cdiv(num, cut.queries), frames, shares)](
        TensorDescriptor.from_tensor(flat, [cut.queries, piece]), TensorDescriptor.from_tensor(flat, [cut.keys, piece]),
        sums, peaks, totals, num, rows, share, channels**-0.5 * 1.4426950408889634,
        BLOCK_Q=cut.queries, BLOCK_K=cut.keys, PIECE=piece, STAGES=cut.stages,
        PRECISION="ieee" if flat.dtype == torch.float32 else "tf32", num_warps=cut.warps,
    )  # fmt: skip
    if shares > 1:
        block = max(1, 2048 // piece)
        _join[(triton.cdiv(rows, block), 3)](
            sums, peaks, totals, out, rows, SHARES=shares, BLOCK_Q=block, PIECE=piece, num_warps=4
        )
    return out
