"""Convolutions as products of tiles that the GPU's copy engine (TMA) brings: compute capability 9.0, 16-bit numbers.

A tile of TILE_T x TILE_H x TILE_W pixels meets each place of the kernel as the same tile moved by (frame, row, column),
one copy of a box of [frames, rows, columns, channels]; what lies outside arrives as zeros. So inputs need no margins,
and the frames before the first are read where they are kept. An enlargement and a doubling of frames are convolutions
whose results lie interleaved, and are written so at once. Each has its plain form beside its user
(`wan_fast_decode.py`); equality was tested with Triton's interpreter on a CPU, and on a GPU by tests/gpu.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_GROUP = 64
"""Tiles side by side that take their turn frame by frame: so few that their frames are in the cache for the next."""


Result = Literal["plain", "doubled", "enlarged"]
"""Where results lie: each at its pixel; the first and second half of channels in two frames, one after the other; four
quarters of channels in four pixels, two by two, by a kernel of 2x2 places."""
_PHASES: Mapping[Result, int] = {"plain": 1, "doubled": 2, "enlarged": 4}


class Tiles(NamedTuple):
    """How a product is cut: pixels by channels by inputs of a step."""

    frames: int = 1
    rows: int = 8
    columns: int = 32
    wide: int = 128
    narrow: int = 64
    """Channels of a program are `wide` + `narrow`, each a power of two; those past the last are not written."""
    block_k: int = 64
    warps: int = 8
    stages: int = 3
    turned: bool = True
    """Weights are the left factor, of 64 channels at least: pixels are read from shared memory once for two warps of
    four. Otherwise pixels are, and pass through registers."""


_TILES: Mapping[tuple[int, int], Tiles] = {
    # 96 channels fill three quarters of 128; a program of 64 and one of 32 would read all pixels twice.
    (96, 96): Tiles(wide=128, narrow=0, block_k=32, stages=6),
    (192, 96): Tiles(wide=128, narrow=0),
    (192, 192): Tiles(),
    (192, 384): Tiles(),
    (384, 192): Tiles(),
    (384, 384): Tiles(),
}
"""By channels in and out (of one phase)."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _multiply(x, weight, total, TURNED: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    if TURNED:
        total = tl.dot(weight, x.T, total, input_precision=PRECISION)
    else:
        total = tl.dot(x, weight.T, total, input_precision=PRECISION)
    return total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _accumulate(  # type: ignore[no-untyped-def]
    source, weight_wide, weight_narrow, wide, narrow, begin, end, frame, row, column, line, channels,
    KH: tl.constexpr, KW: tl.constexpr, PIXELS: tl.constexpr, BLOCK_K: tl.constexpr,
    NARROW_N: tl.constexpr, LINE_NARROW: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps [begin, end), each BLOCK_K channels of one place of the kernel, all in one tensor of frames."""
    steps = channels // BLOCK_K
    for step in range(begin, end):
        place = step // steps
        channel = (step % steps) * BLOCK_K
        box = source.load([frame + place // (KH * KW), row + place // KW % KH, column + place % KW, channel])
        x = tl.reshape(box, [PIXELS, BLOCK_K])
        wide = _multiply(x, weight_wide.load([line, step * BLOCK_K]), wide, TURNED, PRECISION)
        if NARROW_N > 0:
            part = weight_narrow.load([line + LINE_NARROW, step * BLOCK_K])
            narrow = _multiply(x, part, narrow, TURNED, PRECISION)
    return wide, narrow


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store(  # type: ignore[no-untyped-def]
    total, bias, beside, out, at_pixel, there, line, first, channels,
    HAS_BESIDE: tl.constexpr, BLOCK_N: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Add the bias, round, add the residual, write."""
    channel = tl.arange(0, BLOCK_N)
    kind = out.dtype.element_ty
    inside = first + channel < channels
    added = tl.load(bias + line + channel, mask=inside, other=0.0).to(tl.float32)
    result = ((tl.trans(total) if TURNED else total) + added[None, :]).to(kind)
    at = at_pixel[:, None] + (first + channel)[None, :]
    written = there[:, None] & inside[None, :]
    if HAS_BESIDE:
        result = (result.to(tl.float32) + tl.load(beside + at, mask=written, other=0.0).to(tl.float32)).to(kind)
    tl.store(out + at, result, mask=written)


@triton.jit(do_not_specialize=["num", "height", "width"])  # type: ignore[untyped-decorator, unused-ignore]
def _convolve(  # type: ignore[no-untyped-def]
    before, new, weight_wide, weight_narrow, bias, beside, out,
    num, height, width, channels_in, channels_out, stride_t, stride_h, stride_w, jump_t, jump_h, jump_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PHASES: tl.constexpr,
    HAS_BEFORE: tl.constexpr, HAS_BESIDE: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr,
    TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE_N: tl.constexpr, NARROW_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: a tile of pixels by WIDE_N + NARROW_N channels of one phase of the result."""
    PIXELS: tl.constexpr = TILE_T * TILE_H * TILE_W
    tiles_n = tl.cdiv(channels_out, WIDE_N + NARROW_N)
    phase = tl.program_id(0) % (tiles_n * PHASES) // tiles_n
    first = (tl.program_id(0) % tiles_n) * (WIDE_N + NARROW_N)
    rest = tl.program_id(0) // (tiles_n * PHASES)
    tiles_t, tiles_w = tl.cdiv(num, TILE_T), tl.cdiv(width, TILE_W)
    tiles = tl.cdiv(height, TILE_H) * tiles_w
    group = rest // (GROUP * tiles_t)
    size = min(GROUP, tiles - group * GROUP)
    frame = rest % (GROUP * tiles_t) // size * TILE_T
    tile = group * GROUP + rest % (GROUP * tiles_t) % size
    row, column = tile // tiles_w * TILE_H, tile % tiles_w * TILE_W

    if TURNED:
        wide = tl.zeros([WIDE_N, PIXELS], tl.float32)
        narrow = tl.zeros([max(NARROW_N, 16), PIXELS], tl.float32)
    else:
        wide = tl.zeros([PIXELS, WIDE_N], tl.float32)
        narrow = tl.zeros([PIXELS, max(NARROW_N, 16)], tl.float32)
    # The kernel's first place: even phases of an enlargement begin a pixel earlier, as kernels of 3 do.
    from_row = row + (phase // 2 - 1 if KH == 2 else -(KH // 2))
    from_column = column + (phase % 2 - 1 if KW == 2 else -(KW // 2))
    line = phase * channels_out + first
    # A tile of some frames may see both what is kept and what is new: from either, what it lacks arrives as zeros.
    steps = KH * KW * (channels_in // BLOCK_K)
    if HAS_BEFORE:
        wide, narrow = _accumulate(
            before, weight_wide, weight_narrow, wide, narrow, 0, max(KT - 1 - frame, 0) * steps,
            frame, from_row, from_column, line, channels_in,
            KH, KW, PIXELS, BLOCK_K, NARROW_N, WIDE_N, TURNED, PRECISION,
        )  # fmt: skip
    wide, narrow = _accumulate(
        new, weight_wide, weight_narrow, wide, narrow, max(KT - TILE_T - frame, 0) * steps, KT * steps,
        frame - (KT - 1), from_row, from_column, line, channels_in,
        KH, KW, PIXELS, BLOCK_K, NARROW_N, WIDE_N, TURNED, PRECISION,
    )  # fmt: skip

    pixel = tl.arange(0, PIXELS)
    t, y, x = pixel // (TILE_H * TILE_W), row + pixel // TILE_W % TILE_H, column + pixel % TILE_W
    there = (frame + t < num) & (y < height) & (x < width)
    place = frame.to(tl.int64) * stride_t + phase * jump_t + (phase // 2) * jump_h + (phase % 2) * jump_w
    at_pixel = t * stride_t + y * stride_h + x * stride_w
    _store(
        wide, bias, beside + place, out + place, at_pixel, there, line, first, channels_out,
        HAS_BESIDE, WIDE_N, TURNED,
    )  # fmt: skip
    if NARROW_N > 0:
        _store(
            narrow, bias, beside + place, out + place, at_pixel, there, line + WIDE_N, first + WIDE_N, channels_out,
            HAS_BESIDE, NARROW_N, TURNED,
        )  # fmt: skip


def takes(channels_in: int, channels_out: int) -> bool:
    """Whether tiles begin where channels do, and rows of weights and results where the copy engine allows it."""
    return channels_in % 32 == 0 and channels_out % 8 == 0


def choose_tiles(channels_in: int, channels_out: int) -> Tiles:
    """By measurement for the sizes of Wan's VAE, by rule for others."""
    if found := _TILES.get((channels_in, channels_out)):
        return found
    wide = 128 if channels_out > 64 else 64
    narrow = 64 if channels_out % 192 == 0 else 0
    return Tiles(wide=wide, narrow=narrow, block_k=64 if channels_in % 64 == 0 else 32)


def line_up(weight_OITHW: Tensor) -> Tensor:
    """Weights as the product reads them: [out, places * in], places in the order (time, row, column)."""
    return weight_OITHW.permute(0, 2, 3, 4, 1).flatten(1).contiguous()


def convolve(
    before_THWC: Tensor | None,
    new_THWC: Tensor,
    weight_OK: Tensor,
    bias_O: Tensor,
    beside_THWC: Tensor | None = None,
    *,
    size: tuple[int, int, int] = (3, 3, 3),
    result: Result = "plain",
    tiles: Tiles | None = None,
) -> Tensor:
    """A causal convolution over frames whose pictures are bordered by zeros.

    Args:
        before_THWC: The size[0] - 1 frames before the first, contiguous; None: zeros.
        new_THWC: Contiguous; on a GPU in 16 bits.
        weight_OK: `line_up`; with phases, those of the first phase first.
        bias_O: Of all phases.
        beside_THWC: Contiguous, in the shape of the result, which it is added to after rounding.
        size: Places in (time, row, column); each 3 or 1, but (1, 2, 2) for "enlarged".
        result: Where it lies; see `Result`.
        tiles: Other ones than `choose_tiles` says.
    Returns:
        [T, H, W, O], [2 T, H, W, O / 2] or [T, 2 H, 2 W, O / 4].
    """
    channels = new_THWC.shape[3]
    phases = _PHASES[result]
    out_channels = len(weight_OK) // phases
    assert new_THWC.is_contiguous()
    assert weight_OK.is_contiguous()
    assert weight_OK.shape[1] == size[0] * size[1] * size[2] * channels
    assert before_THWC is None or before_THWC.shape == (size[0] - 1, *new_THWC.shape[1:])
    assert before_THWC is None or before_THWC.is_contiguous()
    assert (result == "enlarged") == (size == (1, 2, 2))
    frames_each, pixels_each = (2 if result == "doubled" else 1), (2 if result == "enlarged" else 1)
    num, height, width = new_THWC.shape[:3]
    out = new_THWC.new_empty((num * frames_each, height * pixels_each, width * pixels_each, out_channels))
    assert beside_THWC is None or (beside_THWC.is_contiguous() and beside_THWC.shape == out.shape)
    cut = tiles or choose_tiles(channels, out_channels)
    stride_t, stride_h, stride_w = out.stride()[:3]
    box, tiles_n = [cut.frames, cut.rows, cut.columns, cut.block_k], triton.cdiv(out_channels, cut.wide + cut.narrow)
    new = TensorDescriptor.from_tensor(new_THWC, box)
    tiles_t, tiles_h, tiles_w = (triton.cdiv(*pair) for pair in zip(new_THWC.shape[:3], cut[:3], strict=True))
    grid = (tiles_t * tiles_h * tiles_w * tiles_n * phases,)
    _convolve[grid](
        new if before_THWC is None else TensorDescriptor.from_tensor(before_THWC, box), new,
        TensorDescriptor.from_tensor(weight_OK, [cut.wide, cut.block_k]),
        TensorDescriptor.from_tensor(weight_OK, [cut.narrow or cut.wide, cut.block_k]),
        bias_O, out if beside_THWC is None else beside_THWC, out,
        *new_THWC.shape, out_channels,
        stride_t * frames_each, stride_h * pixels_each, stride_w * pixels_each,
        stride_t * (frames_each - 1), stride_h * (pixels_each - 1), stride_w * (pixels_each - 1),
        KT=size[0], KH=size[1], KW=size[2], PHASES=phases,
        HAS_BEFORE=before_THWC is not None, HAS_BESIDE=beside_THWC is not None,
        PRECISION="ieee" if new_THWC.dtype == torch.float32 else "tf32", TURNED=cut.turned,
        TILE_T=cut.frames, TILE_H=cut.rows, TILE_W=cut.columns, BLOCK_K=cut.block_k,
        WIDE_N=cut.wide, NARROW_N=cut.narrow, GROUP=_GROUP, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out
