"""The decoder's last convolution in Triton: norm, SiLU and a causal 3x3x3 one to three channels, as two kernels.

Three channels are no shape for a tensor core, but three at each of nine places of a picture are 27. So the first
kernel goes through time with some pixels, norms each frame once and multiplies it with all places of three moments;
what a frame's moments add up to stays in registers, and one number for each place and channel is written. The second
adds up nine places, each from another pixel. Plain forms: `_norm_into` in wan_fast_decode.py and F.conv3d.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.model.fused import takes_three_pieces

COLORS = 3
_COLUMNS = 32
"""Of a product: 27, filled up."""
_BLOCK_P = 64
"""Pixels of a program that multiplies."""
_BLOCK_SUM = 512
"""Pixels of one that adds up."""
_MOST_REGISTERS = 128
"""Of a thread that multiplies: four programs to a multiprocessor are a tenth faster than three."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _silu_of_half(half):  # type: ignore[no-untyped-def]
    turn = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1)
    return half + half * turn


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _norm(a, b, c, factor, BLOCK_C: tl.constexpr, BY_TANH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Norm and SiLU of pixels in three pieces of their channels, in float32; `factor` is gamma times sqrt(C).

    By tanh, which a GPU finds to 2^-11 at once, SiLU is off by an eighth of what rounding to bfloat16 does at most
    where it is above 1; and takes half as many instructions.
    """
    channel = tl.arange(0, BLOCK_C)[None, :]
    kind = a.dtype
    a, b, c = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
    inverse = tl.minimum(tl.rsqrt(tl.sum(a * a + b * b + c * c, 1)), 1e12)
    inverse = (inverse * (0.5 if BY_TANH else -1.4426950408889634))[:, None]
    a = a * inverse * tl.load(factor + channel)
    b = b * inverse * tl.load(factor + BLOCK_C + channel)
    c = c * inverse * tl.load(factor + 2 * BLOCK_C + channel)
    if BY_TANH:
        a, b, c = _silu_of_half(a), _silu_of_half(b), _silu_of_half(c)
    else:
        # Three quotients by one inverse, as inverses take eight times as long as products. Without the limit the
        # product of what they are divided by would overflow; past it SiLU is below 1e-10.
        by_a = 1.0 + tl.exp2(tl.minimum(a, 40.0))
        by_b = 1.0 + tl.exp2(tl.minimum(b, 40.0))
        by_c = 1.0 + tl.exp2(tl.minimum(c, 40.0))
        by_ab = by_a * by_b
        root = tl.rsqrt(by_ab * by_c)
        inverse_abc = root * root * -0.6931471805599453
        inverse_ab = inverse_abc * by_c
        a, b, c = a * (inverse_ab * by_b), b * (inverse_ab * by_a), c * (inverse_abc * by_ab)
    return a.to(kind), b.to(kind), c.to(kind)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add(a, b, c, weight_a, weight_b, weight_c, total, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.dot(a, weight_a, total, input_precision=PRECISION)
    total = tl.dot(b, weight_b, total, input_precision=PRECISION)
    return tl.dot(c, weight_c, total, input_precision=PRECISION)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_pieces(x, there, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.arange(0, BLOCK_C)[None, :]
    a = tl.load(x + channel, mask=there, other=0.0)
    b = tl.load(x + BLOCK_C + channel, mask=there, other=0.0)
    c = tl.load(x + 2 * BLOCK_C + channel, mask=there, other=0.0)
    return a, b, c


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_pieces(x, a, b, c, there, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.arange(0, BLOCK_C)[None, :]
    tl.store(x + channel, a, mask=there)
    tl.store(x + BLOCK_C + channel, b, mask=there)
    tl.store(x + 2 * BLOCK_C + channel, c, mask=there)


@triton.jit(do_not_specialize=["num_frames"])  # type: ignore[untyped-decorator, unused-ignore]
def _multiply(  # type: ignore[no-untyped-def]
    x, before, factor, weight, partial, last, num_pixels, num_frames, plane,
    HAS_BEFORE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr,
    USED: tl.constexpr, BY_TANH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels in all frames."""
    place = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = (place < num_pixels)[:, None]
    stride = num_pixels.to(tl.int64) * (3 * BLOCK_C)
    at = place.to(tl.int64)[:, None] * (3 * BLOCK_C)
    column = tl.arange(0, COLUMNS)[None, :]
    to = partial + column.to(tl.int64) * plane + place[:, None]
    is_written = column < USED  # planes end with a program, so pixels past the last have room
    piece = BLOCK_C * COLUMNS
    own = weight + tl.arange(0, BLOCK_C)[:, None] * COLUMNS + column
    old_a, old_b, old_c = tl.load(own), tl.load(own + piece), tl.load(own + 2 * piece)
    mid_a, mid_b, mid_c = tl.load(own + 3 * piece), tl.load(own + 4 * piece), tl.load(own + 5 * piece)
    new_a, new_b, new_c = tl.load(own + 6 * piece), tl.load(own + 7 * piece), tl.load(own + 8 * piece)
    nothing = tl.zeros([BLOCK_P, COLUMNS], tl.float32)
    # Of the next frame and the one after it, what frames so far add. Moments are added from the oldest on whatever a
    # call begins with, so pixels do not depend on where a video is cut.
    total, after = nothing, nothing
    if HAS_BEFORE:
        a, b, c = _load_pieces(before + at, there, BLOCK_C)
        total = _add(a, b, c, old_a, old_b, old_c, nothing, PRECISION)
        a, b, c = _load_pieces(before + stride + at, there, BLOCK_C)
        total = _add(a, b, c, mid_a, mid_b, mid_c, total, PRECISION)
        after = _add(a, b, c, old_a, old_b, old_c, nothing, PRECISION)
        if num_frames == 1:
            _store_pieces(last + at, a, b, c, there, BLOCK_C)
    elif num_frames == 1:
        zero = tl.zeros([BLOCK_P, BLOCK_C], x.dtype.element_ty)
        _store_pieces(last + at, zero, zero, zero, there, BLOCK_C)
    a, b, c = _load_pieces(x + at, there, BLOCK_C)
    for frame in range(num_frames):
        # The next frame is on its way while this one is normed.
        next_a, next_b, next_c = _load_pieces(x + (frame + 1) * stride + at, there & (frame + 1 < num_frames), BLOCK_C)
        a, b, c = _norm(a, b, c, factor, BLOCK_C, BY_TANH)
        if frame + 2 >= num_frames:
            _store_pieces(last + (frame + 2 - num_frames) * stride + at, a, b, c, there, BLOCK_C)
        done = _add(a, b, c, new_a, new_b, new_c, total, PRECISION)
        total = _add(a, b, c, mid_a, mid_b, mid_c, after, PRECISION)
        after = _add(a, b, c, old_a, old_b, old_c, nothing, PRECISION)
        tl.store(to + frame * (USED * plane).to(tl.int64), done.to(partial.dtype.element_ty), mask=is_written)
        a, b, c = next_a, next_b, next_c


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_places(  # type: ignore[no-untyped-def]
    partial, bias, out, height, width, plane, COLORS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels in one frame."""
    frame = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    row, column, there = pixel // width, pixel % width, pixel < height * width
    red = tl.zeros([BLOCK_P], tl.float32) + tl.load(bias).to(tl.float32)
    green = tl.zeros([BLOCK_P], tl.float32) + tl.load(bias + 1).to(tl.float32)
    blue = tl.zeros([BLOCK_P], tl.float32) + tl.load(bias + 2).to(tl.float32)
    source = partial + frame * plane * (9 * COLORS) + pixel
    for place in tl.static_range(9):
        down, right = place // 3 - 1, place % 3 - 1
        seen = there & (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        at = source + place * COLORS * plane.to(tl.int64) + (down * width + right)
        red += tl.load(at, mask=seen, other=0.0).to(tl.float32)
        green += tl.load(at + plane, mask=seen, other=0.0).to(tl.float32)
        blue += tl.load(at + 2 * plane, mask=seen, other=0.0).to(tl.float32)
    to = out + (frame * height * width + pixel) * COLORS
    kind = out.dtype.element_ty
    tl.store(to, red.to(kind), mask=there)
    tl.store(to + 1, green.to(kind), mask=there)
    tl.store(to + 2, blue.to(kind), mask=there)


def fits(factor_C: Tensor, weight_TCN: Tensor) -> bool:
    """Whether what lies between the kernels stays in float16 whatever pixels are: a normed one is no longer than the
    greatest factor. Waits for the GPU: asked once, when weights are laid out."""
    most = weight_TCN.float().square().sum((0, 1)).sqrt().max() * 3**0.5 * factor_C.abs().max()
    return bool(most < 60_000.0)


def convolve(
    before_THWC: Tensor | None,
    x_THWC: Tensor,
    factor_C: Tensor,
    weight_TCN: Tensor,
    bias_O: Tensor,
    *,
    kind: torch.dtype = torch.float16,
    by_tanh: bool = True,
) -> tuple[Tensor, Tensor]:
    """Three channels [T, H, W, 3] of norm and SiLU of frames; and the last two of these, for the next call.

    Args:
        before_THWC: The last two of the call before, contiguous; None: zeros.
        x_THWC: Contiguous; channels as `takes_three_pieces` says.
        factor_C, weight_TCN: `wan_decode_weights.lay_out_places`: float32, and in the dtype of x.
        bias_O: Of the convolution; those past the third are not read.
        kind: Of what lies between the kernels. In float16 its rounding is an eighth of that of pixels in bfloat16.
        by_tanh: Whether a GPU finds SiLU by its tanh; see `_norm`. Elsewhere it never does.
    """
    num, height, width, channels = x_THWC.shape
    num_pixels, used = height * width, 9 * COLORS
    assert takes_three_pieces(channels)
    assert weight_TCN.shape == (3, channels, _COLUMNS)
    assert factor_C.dtype == torch.float32
    assert all(given.is_contiguous() for given in (x_THWC, factor_C, weight_TCN))
    assert before_THWC is None or (before_THWC.is_contiguous() and before_THWC.shape == (2, *x_THWC.shape[1:]))
    out, last = x_THWC.new_empty((num, height, width, COLORS)), x_THWC.new_empty((2, height, width, channels))
    plane = triton.cdiv(num_pixels, _BLOCK_P) * _BLOCK_P
    partial = torch.empty((num, used, plane), dtype=kind, device=x_THWC.device)
    _multiply[(triton.cdiv(num_pixels, _BLOCK_P),)](
        x_THWC, x_THWC if before_THWC is None else before_THWC, factor_C, weight_TCN, partial, last,
        num_pixels, num, plane,
        HAS_BEFORE=before_THWC is not None, BLOCK_P=_BLOCK_P, BLOCK_C=channels // 3, COLUMNS=_COLUMNS, USED=used,
        BY_TANH=by_tanh and x_THWC.is_cuda, PRECISION="ieee" if x_THWC.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=1, maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    _add_places[(triton.cdiv(num_pixels, _BLOCK_SUM), num)](
        partial, bias_O, out, height, width, plane, COLORS=COLORS, BLOCK_P=_BLOCK_SUM, num_warps=4
    )
    return out, last
