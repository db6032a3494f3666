"""A Triton kernel for what `pair_conv.py` convolves: norm and SiLU of frames, and at once their sums and differences.

A program goes through time with some pixels, so each frame is read and normed once; the last two are kept for the next
call. Plain forms: `_norm_into` in wan_fast_decode.py and `transform_frames`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.model.fused import silu_of_unit

_VALUES = 2048
"""Of a frame that a program holds, about: it holds four frames."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _norm_frame(  # type: ignore[no-untyped-def]
    x, gamma, there, channels, scale, KIND: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Of pixels [P, 1] at x: up to three pieces of their channels; all rounded as by `_normalise`."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    a = tl.load(x + channel, mask=there, other=0.0).to(tl.float32)
    squares = a * a
    if PIECES > 1:
        b = tl.load(x + BLOCK_C + channel, mask=there, other=0.0).to(tl.float32)
        squares += b * b
    if PIECES > 2:
        c = tl.load(x + 2 * BLOCK_C + channel, mask=there, other=0.0).to(tl.float32)
        squares += c * c
    inverse = (1.0 / tl.maximum(tl.sqrt(tl.sum(squares, 1)), 1e-12))[:, None]
    a = silu_of_unit(a * inverse, tl.load(gamma + channel).to(tl.float32), scale, KIND, True).to(KIND)
    if PIECES == 1:
        b = a
    if PIECES < 3:
        c = a
    if PIECES > 1:
        b = silu_of_unit(b * inverse, tl.load(gamma + BLOCK_C + channel).to(tl.float32), scale, KIND, True).to(KIND)
    if PIECES > 2:
        c = silu_of_unit(c * inverse, tl.load(gamma + 2 * BLOCK_C + channel).to(tl.float32), scale, KIND, True).to(KIND)
    return a, b, c


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_piece(out, at, there, d0, d1, d2, d3, stride):  # type: ignore[no-untyped-def]
    """Sums and differences of one piece."""
    d0, d1, d2, d3 = d0.to(tl.float32), d1.to(tl.float32), d2.to(tl.float32), d3.to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + at, (d1 + d2).to(kind), mask=there)
    tl.store(out + at + stride, (d2 - d1).to(kind), mask=there)
    tl.store(out + at + 2 * stride, (d0 - d2).to(kind), mask=there)
    tl.store(out + at + 3 * stride, (d1 - d3).to(kind), mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _norm_pairs(  # type: ignore[no-untyped-def]
    x, before, gamma, out, last, num_pixels, num_frames, channels, scale,
    HAS_BEFORE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of all frames."""
    pixel = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    there = pixel < num_pixels
    at = pixel.to(tl.int64) * channels
    stride = num_pixels.to(tl.int64) * channels
    channel = tl.arange(0, BLOCK_C)[None, :]
    kind = x.dtype.element_ty
    nothing = tl.zeros([BLOCK_P, BLOCK_C], tl.float32).to(kind)
    older_a, older_b, older_c, old_a, old_b, old_c = nothing, nothing, nothing, nothing, nothing, nothing
    if HAS_BEFORE:
        older_a = tl.load(before + at + channel, mask=there, other=0.0)
        old_a = tl.load(before + stride + at + channel, mask=there, other=0.0)
        if PIECES > 1:
            older_b = tl.load(before + at + BLOCK_C + channel, mask=there, other=0.0)
            old_b = tl.load(before + stride + at + BLOCK_C + channel, mask=there, other=0.0)
        if PIECES > 2:
            older_c = tl.load(before + at + 2 * BLOCK_C + channel, mask=there, other=0.0)
            old_c = tl.load(before + stride + at + 2 * BLOCK_C + channel, mask=there, other=0.0)
    num_pairs = tl.cdiv(num_frames, 2)
    for pair in range(num_pairs):
        frame = x + 2 * pair * stride + at
        has_second = 2 * pair + 1 < num_frames
        new_a, new_b, new_c = _norm_frame(frame, gamma, there, channels, scale, kind, BLOCK_C, PIECES)
        # Where nothing is read, nothing comes of it: the norm of zeros is zero.
        next_a, next_b, next_c = _norm_frame(
            frame + stride, gamma, there & has_second, channels, scale, kind, BLOCK_C, PIECES
        )
        to = at + 4 * pair * stride + channel
        _store_piece(out, to, there, older_a, old_a, new_a, next_a, stride)
        if PIECES > 1:
            _store_piece(out, to + BLOCK_C, there, older_b, old_b, new_b, next_b, stride)
        if PIECES > 2:
            _store_piece(out, to + 2 * BLOCK_C, there, older_c, old_c, new_c, next_c, stride)
        older_a, older_b, older_c = old_a, old_b, old_c
        if has_second:
            older_a, older_b, older_c = new_a, new_b, new_c
        old_a, old_b, old_c = new_a, new_b, new_c
        if has_second:
            old_a, old_b, old_c = next_a, next_b, next_c
    tl.store(last + at + channel, older_a, mask=there)
    tl.store(last + stride + at + channel, old_a, mask=there)
    if PIECES > 1:
        tl.store(last + at + BLOCK_C + channel, older_b, mask=there)
        tl.store(last + stride + at + BLOCK_C + channel, old_b, mask=there)
    if PIECES > 2:
        tl.store(last + at + 2 * BLOCK_C + channel, older_c, mask=there)
        tl.store(last + stride + at + 2 * BLOCK_C + channel, old_c, mask=there)


def norm_pairs(x_THWC: Tensor, before_THWC: Tensor | None, gamma_C: Tensor) -> tuple[Tensor, Tensor]:
    """`transform_frames` of norm and SiLU of frames, float16 [4 * pairs, H, W, C]; and the last two of these frames.

    Args:
        x_THWC: Contiguous; one to three times a power of two channels.
        before_THWC: The last two frames of the call before, contiguous; None: zeros.
        gamma_C: Weights of the norm.
    """
    num, height, width, channels = x_THWC.shape
    block_c = channels & -channels
    pieces = channels // block_c
    assert pieces <= 3
    assert x_THWC.is_contiguous()
    assert before_THWC is None or (before_THWC.is_contiguous() and before_THWC.shape == (2, *x_THWC.shape[1:]))
    out = torch.empty((4 * -(-num // 2), height, width, channels), dtype=torch.float16, device=x_THWC.device)
    last = x_THWC.new_empty((2, height, width, channels))
    block_p = max(1, _VALUES // triton.next_power_of_2(channels))
    _norm_pairs[(triton.cdiv(height * width, block_p),)](
        x_THWC, x_THWC if before_THWC is None else before_THWC, gamma_C, out, last, height * width, num, channels,
        channels**0.5, HAS_BEFORE=before_THWC is not None, BLOCK_P=block_p, BLOCK_C=block_c, PIECES=pieces,
        num_warps=4,
    )  # fmt: skip
    return out, last
