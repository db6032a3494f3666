"""Triton kernels that make tiles of `fp8_tiles.py` from queries, keys and values in 16 or 32 bits."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Of a program; a divisor of 128 from 32."""
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _cast(x, scale):  # type: ignore[no-untyped-def]
    """To e4m3, saturating, as bytes."""
    x = tl.minimum(tl.maximum(x.to(tl.float32) * scale, -448.0), 448.0)
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _swizzled(rows):  # type: ignore[no-untyped-def]
    """Where pieces of 16 bytes lie in a tile: [rows, 8, 16]."""
    piece = tl.arange(0, 8)[None, :, None]
    at = rows[:, None, None] * 128 + (piece ^ (rows[:, None, None] & 7)) * 16
    return at + tl.arange(0, 16)[None, None, :]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rows_kernel(  # type: ignore[no-untyped-def]
    x, to, num, stride_row, stride_head, tiles, scale, ROWS: tl.constexpr
):
    """Rows [num, heads, 128] into tiles."""
    part, head = tl.program_id(0), tl.program_id(1)
    row = part * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, 8)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    at = row.to(tl.int64)[:, None, None] * stride_row + head.to(tl.int64) * stride_head + channel
    code = _cast(tl.load(x + at, mask=(row < num)[:, None, None], other=0.0), scale)
    tile = head.to(tl.int64) * tiles + part * ROWS // 128
    tl.store(to + tile * 16384 + _swizzled(row % 128), code)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _run_kernel(  # type: ignore[no-untyped-def]
    k, v, to_k, to_v, bias, num,
    k_row, k_head, v_row, v_head, tiles, scale_k, scale_v, no_key, factor,
    HAS_MASS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys [heads, num, >= 128] and values into tiles; ROWS of them, for values as many bytes of all channels."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = part * ROWS
    tile = (head * tiles + first // 128) * 16384
    row = first + tl.arange(0, ROWS)
    channel = tl.arange(0, 8)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    k += head * k_head
    at = row.to(tl.int64)[:, None, None] * k_row + channel
    code = _cast(tl.load(k + at, mask=(row < num)[:, None, None], other=0.0), scale_k)
    tl.store(to_k + tile + _swizzled(row % 128), code)

    mass = tl.zeros([ROWS], tl.float32)
    if HAS_MASS:
        at_mass = row.to(tl.int64) * k_row + 128
        high = tl.load(k + at_mass, mask=row < num, other=0.0).to(tl.float32)
        mass = high + tl.load(k + at_mass + 1, mask=row < num, other=0.0).to(tl.float32)
    exists = (row < num) & (mass >= no_key)
    tl.store(bias + head * tiles * 128 + row, tl.where(exists, mass * factor, float("-inf")))

    position = tl.arange(0, ROWS)
    inside = (position & 16) + (position >> 1 & 1) * 8 + (position >> 2 & 3) * 2 + (position & 1)
    key = first + (position - position % 32) + inside
    at_v = key.to(tl.int64)[:, None] * v_row + tl.arange(0, 128)[None, :]
    values = tl.load(v + head * v_head + at_v, mask=(key < num)[:, None], other=0.0)
    turned = tl.reshape(tl.trans(_cast(values, scale_v)), [128, ROWS // 16, 16])
    line = tl.arange(0, 128)[:, None, None]
    piece = first % 128 // 16 + tl.arange(0, ROWS // 16)[None, :, None]
    tl.store(to_v + tile + line * 128 + (piece ^ (line & 7)) * 16 + tl.arange(0, 16)[None, None, :], turned)


def code_rows(q_QNW: Tensor, scale: float) -> Tensor:
    """uint8 [heads, tiles, 16384] of the first 128 channels; rows behind the last are zero."""
    num, heads, width = q_QNW.shape
    assert width >= 128
    assert q_QNW.stride(2) == 1
    tiles = -(-num // 128)
    out = torch.empty(heads, tiles, 16384, dtype=torch.uint8, device=q_QNW.device)
    _rows_kernel[(tiles * 128 // ROWS, heads)](
        q_QNW, out, num, q_QNW.stride(0), q_QNW.stride(1), tiles, scale, ROWS=ROWS, num_warps=WARPS
    )
    return out


def code_run(
    k_NKW: Tensor, v_NKD: Tensor, to_k: Tensor, to_v: Tensor, bias_NL: Tensor, numbers: tuple[float, float, float]
) -> None:
    """Keys and values into tiles.

    Args:
        numbers: Scales of keys and values, and what a key's channels with log m sum to at least.
    """
    heads, num, width = k_NKW.shape
    assert v_NKD.shape == (heads, num, 128)
    assert width == 128 or width >= 130
    assert k_NKW.stride(2) == v_NKD.stride(2) == 1
    assert to_k.is_contiguous()
    assert to_v.is_contiguous()
    assert bias_NL.is_contiguous()
    tiles = to_k.shape[1]
    _run_kernel[(tiles * 128 // ROWS, heads)](
        k_NKW, v_NKD, to_k, to_v, bias_NL, num,
        k_NKW.stride(1), k_NKW.stride(0), v_NKD.stride(1), v_NKD.stride(0), tiles,
        *numbers, math.log2(math.e) / math.sqrt(128), HAS_MASS=width > 128, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
