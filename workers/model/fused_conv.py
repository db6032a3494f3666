"""A causal 3x3x3 convolution as one product in Triton, over inputs whose margins are there already.

A pixel's 3 neighbours in a row lie side by side with all their channels, so the sum over 27 places is a product over
nine runs of 3 C numbers, each at a fixed distance from the pixel; nothing is masked, since margins are zeros in memory.
The residual is added before the result is written. Equality was tested with Triton's interpreter on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_RUNS = 9
"""Pairs of (time, row) that a 3x3x3 kernel looks at."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store(  # type: ignore[no-untyped-def]
    total, bias, beside, out, pixel, first, num_pixels, channels, HAS_BESIDE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Add the bias, round, add the residual, write."""
    channel = first + tl.arange(0, BLOCK_N)
    kind = out.dtype.element_ty
    result = (total + tl.load(bias + channel).to(tl.float32)[None, :]).to(kind)
    there = (pixel < num_pixels)[:, None]
    at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    if HAS_BESIDE:
        result = (result.to(tl.float32) + tl.load(beside + at, mask=there, other=0.0).to(tl.float32)).to(kind)
    tl.store(out + at, result, mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _convolve(  # type: ignore[no-untyped-def]
    room, weight, bias, beside, out,
    num_pixels, height, width, stride_t, stride_h, channels_in, channels_out,
    RUN: tl.constexpr, HAS_BESIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, WIDE_N: tl.constexpr, NARROW_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M pixels by WIDE_N + NARROW_N channels (together no power of two needs to fit)."""
    tiles_n = channels_out // (WIDE_N + NARROW_N)
    first = (tl.program_id(0) % tiles_n) * (WIDE_N + NARROW_N)
    pixel = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tl.minimum(pixel, num_pixels - 1)
    line = inside // width
    corner = (line // height).to(tl.int64) * stride_t + (line % height).to(tl.int64) * stride_h
    corner += (inside % width).to(tl.int64) * channels_in
    k = tl.arange(0, BLOCK_K)
    at_room = room + corner[:, None] + k[None, :]
    at_wide = weight + k[:, None] * channels_out + first + tl.arange(0, WIDE_N)[None, :]
    at_narrow = weight + k[:, None] * channels_out + first + WIDE_N + tl.arange(0, NARROW_N)[None, :]
    wide = tl.zeros([BLOCK_M, WIDE_N], tl.float32)
    narrow = tl.zeros([BLOCK_M, NARROW_N], tl.float32)
    steps: tl.constexpr = RUN // BLOCK_K
    for step in range(0, 9 * steps):
        run = step // steps
        distance = (run // 3) * stride_t + (run % 3) * stride_h + (step % steps) * BLOCK_K
        values = tl.load(at_room + distance)
        line_w = step * BLOCK_K * channels_out
        wide = tl.dot(values, tl.load(at_wide + line_w), wide, input_precision=PRECISION)
        narrow = tl.dot(values, tl.load(at_narrow + line_w), narrow, input_precision=PRECISION)
    _store(wide, bias, beside, out, pixel, first, num_pixels, channels_out, HAS_BESIDE, WIDE_N)
    _store(narrow, bias, beside, out, pixel, first + WIDE_N, num_pixels, channels_out, HAS_BESIDE, NARROW_N)


def takes(channels_in: int, channels_out: int) -> bool:
    """Whether these numbers of channels divide into its tiles."""
    return channels_in % 32 == 0 and channels_out % 96 == 0


def flatten_weight(weight_OITHW: Tensor) -> Tensor:
    """Weights as the product reads them: [27 * in, out], in the order (time, row, column, channel)."""
    return weight_OITHW.permute(2, 3, 4, 1, 0).reshape(-1, weight_OITHW.shape[0]).contiguous()


def convolve(room_THWC: Tensor, weight_KO: Tensor, bias_O: Tensor, beside_THWC: Tensor | None) -> Tensor:
    """Result [T, H, W, O], plus `beside` if given.

    Args:
        room_THWC: Contiguous inputs [T + 2, H + 2, W + 2, C], with the two before them and a margin of one pixel.
        weight_KO: `flatten_weight`.
        bias_O: Of the convolution.
        beside_THWC: Contiguous, in the shape of the result.
    """
    num, height, width = (size - 2 for size in room_THWC.shape[:3])
    channels, channels_out = room_THWC.shape[-1], weight_KO.shape[-1]
    assert room_THWC.is_contiguous()
    assert weight_KO.shape[0] == 3 * _RUNS * channels
    assert beside_THWC is None or beside_THWC.is_contiguous()
    out = torch.empty((num, height, width, channels_out), dtype=room_THWC.dtype, device=room_THWC.device)
    run = 3 * channels
    is_wide = channels_out % 192 == 0
    block_m, block_k = (128 if is_wide else 256), (64 if run % 64 == 0 else 32)
    wide, narrow = (128, 64) if is_wide else (64, 32)
    num_pixels = num * height * width
    grid = (triton.cdiv(num_pixels, block_m) * (channels_out // (wide + narrow)),)
    _convolve[grid](
        room_THWC, weight_KO, bias_O, out if beside_THWC is None else beside_THWC, out,
        num_pixels, height, width, room_THWC.stride(0), room_THWC.stride(1), channels, channels_out,
        RUN=run, HAS_BESIDE=beside_THWC is not None,
        PRECISION="ieee" if room_THWC.dtype == torch.float32 else "tf32",
        BLOCK_M=block_m, BLOCK_K=block_k, WIDE_N=wide, NARROW_N=narrow, num_warps=8,
        num_stages=2 if room_THWC.dtype == torch.float32 else 4,  # of twice the bytes
    )  # fmt: skip
    return out
