"""The kernel of `nearest_rows.py`: products of a tile of rows with all others, of which only the largest is kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _nearest(  # type: ignore[no-untyped-def]
    x, y, there, index, best, stride_xs, stride_xq, stride_ys, stride_yk, num_x, num_y, dim,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one set."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < dim
    at_x = x + own * stride_xs + row[:, None] * stride_xq + channel[None, :]
    rows = tl.load(at_x, mask=(row < num_x)[:, None] & is_channel[None, :], other=0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, num_y, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        is_other = other < num_y
        at_y = y + own * stride_ys + other[:, None] * stride_yk + channel[None, :]
        others = tl.load(at_y, mask=is_other[:, None] & is_channel[None, :], other=0.0)
        exists = tl.load(there + own * num_y + other, mask=is_other, other=0) != 0
        cosine = tl.dot(rows, tl.trans(others), input_precision=PRECISION)
        cosine = tl.where(exists[None, :], cosine, float("-inf"))
        most, first = tl.max(cosine, 1), tl.argmax(cosine, 1)
        place = tl.where(most > highest, start + first, place)
        highest = tl.maximum(most, highest)
    at = own * num_x + row
    tl.store(index + at, place, mask=row < num_x)
    tl.store(best + at, highest, mask=row < num_x)


def nearest_rows_triton(x_SQD: Tensor, y_SKD: Tensor, there_SK: Tensor) -> tuple[Tensor, Tensor]:
    """See `nearest_rows.NearestRows`; channels side by side in memory."""
    sets, num_x, dim = x_SQD.shape
    num_y = y_SKD.shape[1]
    index = torch.empty((sets, num_x), dtype=torch.int32, device=x_SQD.device)
    best = torch.empty((sets, num_x), dtype=torch.float32, device=x_SQD.device)
    _nearest[(triton.cdiv(num_x, 128), sets)](
        x_SQD, y_SKD, there_SK.to(torch.int8).contiguous(), index, best,
        x_SQD.stride(0), x_SQD.stride(1), y_SKD.stride(0), y_SKD.stride(1), num_x, num_y, dim,
        BLOCK_M=128, BLOCK_N=64, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        PRECISION="ieee" if x_SQD.dtype == torch.float32 else "tf32", num_warps=8, num_stages=3,
    )  # fmt: skip
    return index.long(), best
