"""The Triton kernel of RMSNorm over all heads and RoPE of queries and keys, and values, to where attention reads them.

All of a token is read before anything is computed. Attention in 8-bit floats reads codes of queries and keys, which are
written from where they are computed. The plain form is in `static_layers.py`; imported where a tensor lies on a GPU,
never earlier.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.coded_tiles import CODED_TILE, SCALE_QK


class Launch(NamedTuple):
    """How the work is cut."""

    tokens: int = 1
    """Of a program, a power of two."""
    num_warps: int = 2
    is_reversed: bool = False
    """The last tokens first: what a product wrote last is nearest."""


_WIDE = 2048
"""Channels beyond which a token takes eight warps: registers of two do not hold 5120 of a product of codes."""
ROTATE = Launch(is_reversed=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_heads(  # type: ignore[no-untyped-def]
    qkv, token, at, is_token, is_channel, row, column_scale, bias, stride_x, SCALED: tl.constexpr
):  # fmt: skip
    """Some heads of some tokens, scales and bias applied and rounded."""
    x = tl.load(qkv + token * stride_x + at, mask=is_token & is_channel, other=0.0)
    if SCALED:
        kind = x.dtype
        x = x.to(tl.float32) * (row * tl.load(column_scale + at, mask=is_channel, other=0.0))
        x = (x + tl.load(bias + at, mask=is_channel, other=0.0).to(tl.float32)).to(kind)
    return x


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _squares(x):  # type: ignore[no-untyped-def]
    """Of each token, their sum."""
    x = x.to(tl.float32)
    return tl.sum(tl.sum(x * x, 2), 1)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _turn(x, inverse, weight, at, is_channel, c, s):  # type: ignore[no-untyped-def]
    """Some heads of some tokens, normalised and rotated; rounded where the plain form rounds."""
    kind = x.dtype
    x = (x.to(tl.float32) * inverse).to(kind).to(tl.float32)
    x = (x * tl.load(weight + at, mask=is_channel, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), x.shape).to(kind)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_heads(  # type: ignore[no-untyped-def]
    x, rows, codes, token, head, there, stride_n, stride_q, stride_code, code_scale,
    D: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Some heads of some tokens: as they are, and as rows of tiles of `coded_tiles.py`."""
    T: tl.constexpr = x.shape[0]
    H: tl.constexpr = x.shape[1]
    if ROWS:
        channel = tl.arange(0, x.shape[2])[None, None, :]
        tl.store(rows + token * stride_q + head * stride_n + channel, x, mask=there & (channel < D))
    if CODES:
        # Pieces of 16 bytes are an axis of their own, or the compiler would not see that each lies in one run.
        piece, byte = tl.arange(0, D // 16)[None, None, :, None], tl.arange(0, 16)[None, None, None, :]
        token, head = tl.expand_dims(token, 3), tl.expand_dims(head, 3)
        at = head * stride_code + token * D + (piece ^ (token % 8)) * 16 + byte
        code = (x.to(tl.float32) * code_scale).to(codes.dtype.element_ty)
        # All channels are there. A mask that went through a reshape would cut the pieces into bytes.
        tl.store(codes + at, tl.reshape(code, [T, H, D // 16, 16]), mask=tl.expand_dims(there, 3))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _norm_rotate(  # type: ignore[no-untyped-def]
    qkv, row_scale, column_scale, bias, weight_q, weight_k, cos, sin, q, k, v, q_code, k_code,
    stride_x, stride_qn, stride_qq, stride_kn, stride_kq, stride_vn, stride_vq, stride_qc, stride_kc,
    num_tokens, eps, code_scale,
    HEADS: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, REVERSED: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr,
    TOKENS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens, their heads in two pieces."""
    block = tl.program_id(0)
    if REVERSED:
        block = tl.num_programs(0) - 1 - block
    token = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    there = token < num_tokens
    a, b = tl.arange(0, A)[None, :, None], A + tl.arange(0, B)[None, :, None]
    channel, pair = tl.arange(0, BLOCK_D)[None, None, :], tl.arange(0, BLOCK_D // 2)[None, None, :]
    in_a, in_b = (channel < D) & (a < HEADS), (channel < D) & (b < HEADS)
    at_a, at_b, width = a * D + channel, b * D + channel, HEADS * D
    row = tl.load(row_scale + token, mask=there, other=0.0) if SCALED else 1.0
    q_a = _load_heads(qkv, token, at_a, there, in_a, row, column_scale, bias, stride_x, SCALED)
    q_b = _load_heads(qkv, token, at_b, there, in_b, row, column_scale, bias, stride_x, SCALED)
    k_a = _load_heads(qkv, token, width + at_a, there, in_a, row, column_scale, bias, stride_x, SCALED)
    k_b = _load_heads(qkv, token, width + at_b, there, in_b, row, column_scale, bias, stride_x, SCALED)
    v_a = _load_heads(qkv, token, 2 * width + at_a, there, in_a, row, column_scale, bias, stride_x, SCALED)
    v_b = _load_heads(qkv, token, 2 * width + at_b, there, in_b, row, column_scale, bias, stride_x, SCALED)
    at_table, in_table = token * (D // 2) + pair, there & (pair < D // 2)
    c = tl.load(cos + at_table, mask=in_table, other=0.0)
    s = tl.load(sin + at_table, mask=in_table, other=0.0)
    tl.store(v + token * stride_vq + a * stride_vn + channel, v_a, mask=there & in_a)
    tl.store(v + token * stride_vq + b * stride_vn + channel, v_b, mask=there & in_b)
    inverse_q = (1.0 / tl.sqrt((_squares(q_a) + _squares(q_b)) / width + eps))[:, None, None]
    inverse_k = (1.0 / tl.sqrt((_squares(k_a) + _squares(k_b)) / width + eps))[:, None, None]
    here_a, here_b = there & (a < HEADS), there & (b < HEADS)
    strides_q, strides_k = (stride_qn, stride_qq, stride_qc), (stride_kn, stride_kq, stride_kc)
    q_a, q_b = _turn(q_a, inverse_q, weight_q, at_a, in_a, c, s), _turn(q_b, inverse_q, weight_q, at_b, in_b, c, s)
    _store_heads(q_a, q, q_code, token, a, here_a, *strides_q, code_scale, D, ROWS, CODES)
    _store_heads(q_b, q, q_code, token, b, here_b, *strides_q, code_scale, D, ROWS, CODES)
    k_a, k_b = _turn(k_a, inverse_k, weight_k, at_a, in_a, c, s), _turn(k_b, inverse_k, weight_k, at_b, in_b, c, s)
    _store_heads(k_a, k, k_code, token, a, here_a, *strides_k, code_scale, D, ROWS, CODES)
    _store_heads(k_b, k, k_code, token, b, here_b, *strides_k, code_scale, D, ROWS, CODES)


def norm_rotate(
    qkv_QF: Tensor, norms: tuple[Tensor, Tensor], rotation: tuple[Tensor, Tensor], eps: float,
    to: tuple[Tensor, Tensor, Tensor], scales: tuple[Tensor, Tensor, Tensor] | None = None,
    launch: Launch | None = None, codes: tuple[Tensor, Tensor] | None = None, *, rows: bool = True,
) -> None:  # fmt: skip
    """RMSNorm over all heads and RoPE of queries and keys, and values, each to where attention reads it, in one pass.

    Args:
        qkv_QF: Products of the three, side by side.
        norms: Weights for queries and keys, [E].
        rotation: Cosines and sines, float32 [1, Q, 1, D / 2], contiguous.
        eps: Of the norm.
        to: q_QND, k_NQD, v_NQD, written; channels side by side.
        scales: Of rows and columns of the products (float32), and the bias, where they are still to be applied.
        launch: Another than `ROTATE`.
        codes: q_NIB and k_NTB of `coded_tiles.py`, written if given: codes of what is rounded to the dtype of `to`.
        rows: Whether queries and keys are written as they are.
    """
    (q, k, v), (cos, sin), cut = to, rotation, launch or ROTATE
    num_tokens, heads, head_dim = q.shape
    assert qkv_QF.stride(1) == q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert cos.shape == (1, num_tokens, 1, head_dim // 2)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    q_code, k_code = (q, k) if codes is None else (_as_floats(x, num_tokens, heads, head_dim) for x in codes)
    read = qkv_QF, *(scales or (qkv_QF, qkv_QF, qkv_QF)), *norms, cos, sin
    strides = qkv_QF.stride(0), q.stride(1), q.stride(0), *k.stride()[:2], *v.stride()[:2]
    first = max(1, triton.next_power_of_2(heads) // 2)
    _norm_rotate[(triton.cdiv(num_tokens, cut.tokens),)](
        *read, q, k, v, q_code, k_code, *strides, q_code.stride(0), k_code.stride(0), num_tokens, eps, SCALE_QK,
        HEADS=heads, D=head_dim, SCALED=scales is not None, REVERSED=cut.is_reversed, ROWS=rows,
        CODES=codes is not None, TOKENS=cut.tokens, A=first, B=triton.next_power_of_2(max(1, heads - first)),
        BLOCK_D=triton.next_power_of_2(head_dim), num_warps=cut.num_warps if heads * head_dim <= _WIDE else 8,
    )  # fmt: skip


def _as_floats(tiles: Tensor, num_tokens: int, heads: int, head_dim: int) -> Tensor:
    """Tiles of 8-bit floats, with room for so many tokens."""
    assert head_dim == CODED_TILE
    assert tiles.is_contiguous()
    assert tiles.shape[0] == heads
    assert num_tokens <= tiles.shape[1] * CODED_TILE
    return tiles.view(torch.float8_e4m3fn)
