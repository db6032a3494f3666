"""Triton kernels for what the model does around its large products on a GPU; each has its plain form beside its user.

Imported where a tensor lies on a GPU, never earlier. Equality with the plain forms was tested with Triton's interpreter
on a CPU; tests/gpu/test_fused.py does it on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def takes_three_pieces(channels: int) -> bool:
    """Whether channels divide into three pieces that a tensor core takes."""
    piece = channels // 3
    return channels % 3 == 0 and 16 <= piece <= 128 and piece & (piece - 1) == 0


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate(  # type: ignore[no-untyped-def]
    x, cos, sin, out,
    stride_xb, stride_xk, stride_xn, stride_tb, stride_tk, stride_tn, stride_ob, stride_ok, stride_on,
    num_tokens, heads, head_dim, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K tokens of one head. Each channel meets its partner, the other one of its pair."""
    token = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)[None, :]
    there = (token < num_tokens) & (channel < head_dim)
    at_x = x + batch * stride_xb + head * stride_xn + token * stride_xk
    own = tl.load(at_x + channel, mask=there, other=0.0).to(tl.float32)
    partner = tl.load(at_x + (channel ^ 1), mask=there, other=0.0).to(tl.float32)
    at_table = batch * stride_tb + head * stride_tn + token * stride_tk + channel // 2
    c = tl.load(cos + at_table, mask=there, other=0.0)
    s = tl.load(sin + at_table, mask=there, other=0.0)
    turned = own * c + tl.where(channel % 2 == 0, -partner, partner) * s
    at_out = out + batch * stride_ob + head * stride_on + token * stride_ok + channel
    tl.store(at_out, turned.to(out.dtype.element_ty), mask=there)


def rotate_into(out_BKND: Tensor, x_BKND: Tensor, cos: Tensor, sin: Tensor) -> None:
    """RoPE in one pass, computed in float32.

    Args:
        out_BKND: Written; any dtype, channels side by side.
        x_BKND: Channels side by side.
        cos, sin: float32 [B or 1, K, N or 1, D / 2], contiguous.
    """
    batch, num_tokens, heads, head_dim = x_BKND.shape
    assert x_BKND.stride(-1) == out_BKND.stride(-1) == 1
    assert cos.stride() == sin.stride()
    table = [0 if size == 1 else stride for size, stride in zip(cos.shape, cos.stride(), strict=True)][:3]
    block = 32
    _rotate[(triton.cdiv(num_tokens, block), batch * heads)](
        x_BKND, cos, sin, out_BKND, *x_BKND.stride()[:3], *table, *out_BKND.stride()[:3],
        num_tokens, heads, head_dim, BLOCK_K=block, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _normalise(  # type: ignore[no-untyped-def]
    x, gamma, out, num_pixels, height, width, stride_t, stride_h, channels, scale,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels with all their channels. Roundings are those of the plain form, in its order.

    Channels come in pieces, since three times a power of two would leave a quarter of the threads idle, and twice: the
    second time from a cache. Quotients are products with inverses, which take a third of the instructions.
    """
    pixel = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    kind = out.dtype.element_ty
    at_x = x + pixel.to(tl.int64) * channels
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for piece in tl.static_range(PIECES):
        channel = piece * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        value = tl.load(at_x + channel, mask=(pixel < num_pixels) & (channel < channels), other=0.0).to(tl.float32)
        squares += value * value
    inverse = (1.0 / tl.maximum(tl.sqrt(tl.sum(squares, 1)), 1e-12))[:, None]
    line = pixel // width
    at = (line // height).to(tl.int64) * stride_t + (line % height).to(tl.int64) * stride_h
    at_out = out + at + (pixel % width).to(tl.int64) * channels
    for piece in tl.static_range(PIECES):
        channel = piece * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        there = (pixel < num_pixels) & (channel < channels)
        value = tl.load(at_x + channel, mask=there, other=0.0).to(tl.float32)
        weight = tl.load(gamma + channel, mask=channel < channels, other=0.0).to(tl.float32)
        unit = (value * inverse).to(kind).to(tl.float32)
        result = ((unit * scale).to(kind).to(tl.float32) * weight).to(kind).to(tl.float32)
        if SILU:
            grown = 1.0 + tl.exp2(result * -1.4426950408889634)
            result = result * tl.rsqrt(grown * grown)
        tl.store(at_out + channel, result.to(kind), mask=there)


def normalise_into(out_THWC: Tensor, x_THWC: Tensor, gamma_C: Tensor, *, silu: bool) -> None:
    """x / |x| * sqrt(C) * gamma over the last dimension, then SiLU if wanted, in one pass.

    Args:
        out_THWC: Written; a row's pixels lie side by side. Does not overlap x.
        x_THWC: Contiguous.
        gamma_C: Weights of the norm.
    """
    num, height, width, channels = x_THWC.shape
    assert x_THWC.is_contiguous()
    assert out_THWC.shape == x_THWC.shape
    assert out_THWC.stride()[2:] == (channels, 1)
    num_pixels = num * height * width
    block_c = channels & -channels  # the greatest power of two that divides it
    if block_c < 32:
        block_c = triton.next_power_of_2(channels)
    pieces = triton.cdiv(channels, block_c)
    block_p = max(1, 4096 // triton.next_power_of_2(channels))
    _normalise[(triton.cdiv(num_pixels, block_p),)](
        x_THWC, gamma_C, out_THWC, num_pixels, height, width, *out_THWC.stride()[:2], channels, channels**0.5,
        SILU=silu, BLOCK_P=block_p, BLOCK_C=block_c, PIECES=pieces, num_warps=4,
    )  # fmt: skip
