"""Triton kernels that write the inputs of products of 8-bit floats: codes and the scale of each row, in one pass.

Each does what stands between two products: scales and bias of the one before, GELU, then the row's largest magnitude
and its codes; those behind a norm are in `fused_norms.py`. A row stays in registers, in two pieces, as its length is
seldom a power of two. The plain forms are in `fp8_linears.py`; imported where a tensor lies on a GPU, never earlier.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.model.fp8_linears import Product, room_for_codes

GELU_WARPS, ROW_WARPS, WEIGHT_WARPS = 8, 4, 4
"""Of a program, which does one row."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _apply_scales(  # type: ignore[no-untyped-def]
    sums, row_scale, column_scale, bias, row, channel, inside, E: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    """A piece of a row of a product, float32. Scales of columns and bias are every row's and stay near."""
    value = tl.load(sums + row * E + channel, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if SCALED:
        column = tl.load(column_scale + channel, mask=inside, other=0.0, eviction_policy="evict_last")
        value = value * (tl.load(row_scale + row) * column)
        value += tl.load(bias + channel, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return value


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_codes(  # type: ignore[no-untyped-def]
    code, scale, row, a, b, at_a, at_b, in_a, in_b, E: tl.constexpr
):  # fmt: skip
    """Two pieces of a row, zero outside of it."""
    most = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
    most = tl.maximum(most, 1e-12)
    tl.store(scale + row, most / 448.0)
    tl.store(code + row * E + at_a, (a * (448.0 / most)).to(code.dtype.element_ty), mask=in_a)
    tl.store(code + row * E + at_b, (b * (448.0 / most)).to(code.dtype.element_ty), mask=in_b)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gelu(x, APPROXIMATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """By tanh; approximate: by the unit that a GPU has for it, off by 2^-11, where a code is off by 2^-4."""
    inner = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    if APPROXIMATE:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * x * (1.0 + tanh)
    return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gelu_codes(  # type: ignore[no-untyped-def]
    sums, row_scale, column_scale, bias, code, scale,
    E: tl.constexpr, SCALED: tl.constexpr, APPROXIMATE: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One program: a token."""
    row = tl.program_id(0).to(tl.int64)
    at_a, at_b = tl.arange(0, A), A + tl.arange(0, B)
    in_a, in_b = at_a < E, at_b < E
    a = _gelu(_apply_scales(sums, row_scale, column_scale, bias, row, at_a, in_a, E, SCALED), APPROXIMATE)
    b = _gelu(_apply_scales(sums, row_scale, column_scale, bias, row, at_b, in_b, E, SCALED), APPROXIMATE)
    _store_codes(code, scale, row, a, b, at_a, at_b, in_a, in_b, E)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _row_codes(  # type: ignore[no-untyped-def]
    h, code, scale, stride_q, stride_n, E: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One program: a token, its heads wherever they lie."""
    row = tl.program_id(0).to(tl.int64)
    at_a, at_b = tl.arange(0, A), A + tl.arange(0, B)
    in_a, in_b = at_a < E, at_b < E
    at = h + row * stride_q
    a = tl.load(at + (at_a // D).to(tl.int64) * stride_n + at_a % D, mask=in_a, other=0.0).to(tl.float32)
    b = tl.load(at + (at_b // D).to(tl.int64) * stride_n + at_b % D, mask=in_b, other=0.0).to(tl.float32)
    _store_codes(code, scale, row, a, b, at_a, at_b, in_a, in_b, E)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _weight_codes(weight, scale, code, E: tl.constexpr, A: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: an output. Codes are read next, weights not before the next call."""
    row = tl.program_id(0).to(tl.int64)
    at_a, at_b = tl.arange(0, A), A + tl.arange(0, B)
    in_a, in_b = at_a < E, at_b < E
    a = tl.load(weight + row * E + at_a, mask=in_a, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b = tl.load(weight + row * E + at_b, mask=in_b, other=0.0, eviction_policy="evict_first").to(tl.float32)
    step = tl.load(scale + row)
    tl.store(code + row * E + at_a, (a / step).to(code.dtype.element_ty), mask=in_a)
    tl.store(code + row * E + at_b, (b / step).to(code.dtype.element_ty), mask=in_b)


def gelu_codes(product: Product, num_warps: int = GELU_WARPS, *, approximate: bool = True) -> tuple[Tensor, Tensor]:
    """`fp8_linears.gelu_codes_plain`."""
    sums, *scales = product
    assert sums.is_contiguous()
    code, scale = room_for_codes(sums, sums.shape[1])
    _gelu_codes[(len(sums),)](
        sums, *(sums if s is None else s for s in scales), code, scale, E=sums.shape[1],
        SCALED=scales[0] is not None, APPROXIMATE=approximate, **_pieces(sums.shape[1]), num_warps=num_warps,
    )  # fmt: skip
    return code, scale


def row_codes(h_QND: Tensor, num_warps: int = ROW_WARPS) -> tuple[Tensor, Tensor]:
    """`fp8_linears.row_codes_plain`; channels of a head lie side by side."""
    num_tokens, heads, head_dim = h_QND.shape
    assert h_QND.stride(2) == 1
    code, scale = room_for_codes(h_QND, heads * head_dim)
    _row_codes[(num_tokens,)](
        h_QND, code, scale, *h_QND.stride()[:2], E=heads * head_dim, D=head_dim,
        **_pieces(heads * head_dim), num_warps=num_warps,
    )  # fmt: skip
    return code, scale


def weight_codes(weight_OI: Tensor, scale_1O: Tensor, num_warps: int = WEIGHT_WARPS) -> Tensor:
    """`fp8_linears.weight_codes_plain`."""
    assert weight_OI.is_contiguous()
    assert scale_1O.is_contiguous()
    code = torch.empty_like(weight_OI, dtype=torch.float8_e4m3fn)
    outputs, inputs = weight_OI.shape
    _weight_codes[(outputs,)](weight_OI, scale_1O, code, E=inputs, **_pieces(inputs), num_warps=num_warps)
    return code


def _pieces(width: int) -> dict[str, Any]:
    """Two powers of two that hold a row with little to spare: 1536 is 1024 and 512, 8960 is 8192 and 768 of 1024."""
    first = triton.next_power_of_2(width) // 2
    return {"A": first, "B": triton.next_power_of_2(width - first)}
