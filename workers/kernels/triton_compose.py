"""Attention over the union of two sets of keys from the results over each, in one pass: read once, written once.

The reference is `lse.merge`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
"""Of a program; a row is one token and head."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def compose_rows(  # type: ignore[no-untyped-def]
    out_a, lse_a, out_b, lse_b, out, stride_at, stride_an, stride_bt, stride_bn, num_rows, heads, head_dim,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = row < num_rows
    token, head = row // heads, row % heads
    length_a = tl.load(lse_a + token * stride_at + head * stride_an, mask=is_row, other=0.0)
    length_b = tl.load(lse_b + token * stride_bt + head * stride_bn, mask=is_row, other=0.0)
    # Where neither saw a key the difference would be no number.
    length_a = tl.where(length_b == float("-inf"), 0.0, length_a)
    share_b = 1.0 / (1.0 + tl.exp2(tl.minimum((length_a - length_b) * 1.4426950408889634, 126.0)))
    channel = tl.arange(0, BLOCK_D)
    place = row.to(tl.int64)[:, None] * head_dim + channel[None, :]
    there = is_row[:, None] & (channel < head_dim)[None, :]
    a = tl.load(out_a + place, mask=there, other=0.0).to(tl.float32)
    b = tl.load(out_b + place, mask=there, other=0.0).to(tl.float32)
    result = a * (1.0 - share_b)[:, None] + b * share_b[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=there)


def compose(out_a_QND: Tensor, lse_a_QN: Tensor, out_b_QND: Tensor, lse_b_QN: Tensor) -> Tensor:
    """See `listed_parts.Compose`; results are contiguous, log-sum-exps float32 with any strides."""
    assert out_a_QND.is_contiguous()
    assert out_b_QND.is_contiguous()
    num_queries, heads, head_dim = out_a_QND.shape
    rows, out = num_queries * heads, torch.empty_like(out_a_QND)
    compose_rows[(triton.cdiv(rows, _ROWS),)](
        out_a_QND, lse_a_QN, out_b_QND, lse_b_QN, out, *lse_a_QN.stride(), *lse_b_QN.stride(), rows, heads, head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_R=_ROWS, num_warps=4,
    )  # fmt: skip
    return out
