"""The Triton kernel of all that stands between two products: `add_norm.py` in one pass, into rows or codes of 8 bits.

A row stays in registers, in two pieces, as its length is seldom a power of two. A program may take several rows of one
latent frame, one after the other: then what modulates them is read once, and the next rows are under way meanwhile.
Imported where a tensor lies on a GPU, never earlier.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.model.add_norm import Norm
from workers.model.fp8_linears import Product, room_for_codes
from workers.model.fused_codes import apply_scales, pieces_of, store_codes

_STREAM, _ROWS, _CODES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What is written besides the stream: nothing, rows, codes."""


class Launch(NamedTuple):
    """How the work is cut."""

    tokens: int = 1
    """Of a program, where they divide a latent frame; else one."""
    num_warps: int = 4
    num_stages: int = 1
    """Tokens under way, where there are several."""
    is_reversed: bool = False
    """The last tokens first: what a product wrote last is nearest."""


ROWS, CODES, STREAM = Launch(), Launch(), Launch()


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _modulation(  # type: ignore[no-untyped-def]
    layer, time, frame, channel, inside, E: tl.constexpr, PLACE: tl.constexpr
):  # fmt: skip
    """A piece of one of the six, of a layer and a latent frame together."""
    value = tl.load(layer + PLACE * E + channel, mask=inside, other=0.0).to(tl.float32)
    return value + tl.load(time + (frame * 6 + PLACE) * E + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _factor_and_shift(  # type: ignore[no-untyped-def]
    modulation, time, weight, weight_bias, frame, channel, inside, E: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """A piece of what a normalised row is times and plus: what its latent frame has, or what all have."""
    if SHIFT >= 0:
        factor = 1.0 + _modulation(modulation, time, frame, channel, inside, E, SHIFT + 1)
        shift = _modulation(modulation, time, frame, channel, inside, E, SHIFT)
    else:
        factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(weight_bias + channel, mask=inside, other=0.0).to(tl.float32)
    return factor, shift


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_norm(  # type: ignore[no-untyped-def]
    x, sums, row_scale, column_scale, bias, gates, modulation, time, weight, weight_bias, out, rows, scale,
    frame_tokens, eps, E: tl.constexpr, GATE: tl.constexpr, SHIFT: tl.constexpr, ADDS: tl.constexpr,
    SCALED: tl.constexpr, FORM: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, REVERSED: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one latent frame. The stream is rounded before it is normalised."""
    block = tl.program_id(0)
    if REVERSED:
        block = tl.num_programs(0) - 1 - block
    frame = block * TOKENS // frame_tokens
    at_a, at_b = tl.arange(0, A), A + tl.arange(0, B)
    in_a, in_b = at_a < E, at_b < E
    if TOKENS > 1:  # else what is read where it is needed takes no registers before
        if GATE >= 0:
            gate_a = _modulation(gates, time, frame, at_a, in_a, E, GATE)
            gate_b = _modulation(gates, time, frame, at_b, in_b, E, GATE)
        if FORM != _STREAM:
            factor_a, shift_a = _factor_and_shift(modulation, time, weight, weight_bias, frame, at_a, in_a, E, SHIFT)
            factor_b, shift_b = _factor_and_shift(modulation, time, weight, weight_bias, frame, at_b, in_b, E, SHIFT)
    for step in tl.range(0, TOKENS, num_stages=STAGES):
        row = (block * TOKENS + step).to(tl.int64)
        a = tl.load(x + row * E + at_a, mask=in_a, other=0.0).to(tl.float32)
        b = tl.load(x + row * E + at_b, mask=in_b, other=0.0).to(tl.float32)
        if ADDS:
            more_a = apply_scales(sums, row_scale, column_scale, bias, row, at_a, in_a, E, SCALED)
            more_b = apply_scales(sums, row_scale, column_scale, bias, row, at_b, in_b, E, SCALED)
            if GATE >= 0:
                if TOKENS == 1:
                    gate_a = _modulation(gates, time, frame, at_a, in_a, E, GATE)
                    gate_b = _modulation(gates, time, frame, at_b, in_b, E, GATE)
                more_a *= gate_a
                more_b *= gate_b
            rounded_a, rounded_b = (a + more_a).to(out.dtype.element_ty), (b + more_b).to(out.dtype.element_ty)
            tl.store(out + row * E + at_a, rounded_a, mask=in_a)
            tl.store(out + row * E + at_b, rounded_b, mask=in_b)
            a, b = rounded_a.to(tl.float32), rounded_b.to(tl.float32)
        if FORM != _STREAM:
            mean = (tl.sum(a, 0) + tl.sum(b, 0)) / E
            a, b = tl.where(in_a, a - mean, 0.0), tl.where(in_b, b - mean, 0.0)
            inverse = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / E + eps)
            if TOKENS == 1:
                factor_a, shift_a = _factor_and_shift(
                    modulation, time, weight, weight_bias, frame, at_a, in_a, E, SHIFT
                )
                factor_b, shift_b = _factor_and_shift(
                    modulation, time, weight, weight_bias, frame, at_b, in_b, E, SHIFT
                )
            a, b = a * inverse * factor_a + shift_a, b * inverse * factor_b + shift_b
            if FORM == _CODES:
                store_codes(rows, scale, row, a, b, at_a, at_b, in_a, in_b, E)
            else:
                tl.store(rows + row * E + at_a, a.to(rows.dtype.element_ty), mask=in_a)
                tl.store(rows + row * E + at_b, b.to(rows.dtype.element_ty), mask=in_b)


def norm_rows(
    x_QE: Tensor, product: Product | None, norm: Norm, eps: float, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """`add_norm.norm_rows_plain`, with one rounding of each; without a product x is given back, else a new one."""
    out, rows = x_QE if product is None else torch.empty_like(x_QE), torch.empty_like(x_QE)
    _run(x_QE, product, norm, eps, (out, rows, x_QE), _ROWS.value, launch or ROWS)
    return out, rows


def norm_codes(
    x_QE: Tensor, product: Product | None, norm: Norm, eps: float, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm.norm_codes_plain`: the stream, codes, scales."""
    out, (code, scale) = x_QE if product is None else torch.empty_like(x_QE), room_for_codes(x_QE, x_QE.shape[1])
    _run(x_QE, product, norm, eps, (out, code, scale), _CODES.value, launch or CODES)
    return out, code, scale


def add_product(x_QE: Tensor, product: Product, norm: Norm, launch: Launch | None = None) -> Tensor:
    """The stream alone."""
    out = torch.empty_like(x_QE)
    _run(x_QE, product, norm, 0.0, (out, x_QE, x_QE), _STREAM.value, launch or STREAM)
    return out


def _run(
    x_QE: Tensor, product: Product | None, norm: Norm, eps: float, to: tuple[Tensor, Tensor, Tensor], form: int,
    launch: Launch,
) -> None:  # fmt: skip
    (num_tokens, dim), (sums, *scales) = x_QE.shape, product or Product(x_QE)
    read = (x_QE, *(product or ()), norm.gate_from_6E, norm.modulation_6E, norm.time_T6E, norm.weight_E, norm.bias_E)
    assert all(x is None or x.is_contiguous() for x in read)
    assert num_tokens % len(norm.time_T6E) == 0
    assert form == _STREAM.value or norm.shift >= 0 or (norm.weight_E is not None and norm.bias_E is not None)
    frame_tokens = num_tokens // len(norm.time_T6E)
    tokens = launch.tokens if frame_tokens % launch.tokens == 0 else 1
    _add_norm[(num_tokens // tokens,)](
        x_QE, sums, *(x_QE if s is None else s for s in scales), norm.gate_from_6E, norm.modulation_6E, norm.time_T6E,
        *(x_QE if w is None else w for w in (norm.weight_E, norm.bias_E)), *to, frame_tokens, eps,
        E=dim, GATE=norm.gate if product is not None else -1, SHIFT=norm.shift, ADDS=product is not None,
        SCALED=scales[0] is not None, FORM=form, TOKENS=tokens, STAGES=launch.num_stages,
        REVERSED=launch.is_reversed, **pieces_of(dim), num_warps=launch.num_warps,
    )  # fmt: skip
