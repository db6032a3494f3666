"""The Triton kernel of all that stands between two products: `add_norm.py` in one pass, into rows or codes of 8 bits.

A row stays in registers, in pieces of equal length, as its own is seldom a power of two. A program may take several
rows of one latent frame, one after the other: then what modulates them is read once, and the next rows are under way
meanwhile. Imported where a tensor lies on a GPU, never earlier.
"""

# mypy: disable-error-code="var-annotated,assignment,operator"
# Triton grows tuples piece by piece, each of another type.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.model.add_norm import Norm
from workers.model.fp8_linears import Product, room_for_codes

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


_WIDE = 2048
"""Channels beyond which a row takes eight warps, so that it stays in registers."""
ROWS, CODES, STREAM = Launch(num_warps=2), Launch(num_warps=2), Launch(num_warps=2)
"""By what is written. Two warps read 1536 channels by 16 bytes a thread and take 64 registers."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _modulation(layer, time, frame, channel, E: tl.constexpr, PLACE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A piece of one of the six, of a layer and a latent frame together."""
    value = tl.load(layer + PLACE * E + channel).to(tl.float32)
    return value + tl.load(time + (frame * 6 + PLACE) * E + channel).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _factor_and_shift(  # type: ignore[no-untyped-def]
    modulation, time, weight, weight_bias, frame, channel, E: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """A piece of what a normalised row is times and plus: what its latent frame has, or what all have."""
    if SHIFT >= 0:
        factor = 1.0 + _modulation(modulation, time, frame, channel, E, SHIFT + 1)
        shift = _modulation(modulation, time, frame, channel, E, SHIFT)
    else:
        factor = tl.load(weight + channel).to(tl.float32)
        shift = tl.load(weight_bias + channel).to(tl.float32)
    return factor, shift


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _apply_scales(  # type: ignore[no-untyped-def]
    value, row_scale, column_scale, bias, row, channel, SCALED: tl.constexpr
):  # fmt: skip
    """A piece of a row of a product, float32. Scales of columns and bias are every row's and stay near."""
    value = value.to(tl.float32)
    if SCALED:
        value *= tl.load(row_scale + row) * tl.load(column_scale + channel, eviction_policy="evict_last")
        value += tl.load(bias + channel, eviction_policy="evict_last").to(tl.float32)
    return value


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _encode(values, scale, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row over its scale, which is written."""
    most, codes = tl.zeros([PIECE], tl.float32), ()
    for piece in tl.static_range(len(values)):
        most = tl.maximum(most, tl.abs(values[piece]))
    largest = tl.maximum(tl.max(most, 0), 1e-12)
    tl.store(scale, largest / 448.0)
    for piece in tl.static_range(len(values)):
        codes += (values[piece] * (448.0 / largest),)
    return codes


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_norm(  # type: ignore[no-untyped-def]
    x, sums, row_scale, column_scale, bias, gates, modulation, time, weight, weight_bias, out, rows, scale,
    frame_tokens, eps, E: tl.constexpr, GATE: tl.constexpr, SHIFT: tl.constexpr, ADDS: tl.constexpr,
    SCALED: tl.constexpr, FORM: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, REVERSED: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one latent frame. The stream is rounded before it is normalised."""
    block = tl.program_id(0)
    if REVERSED:
        block = tl.num_programs(0) - 1 - block
    frame = block * TOKENS // frame_tokens
    own = tl.arange(0, PIECE)
    gate, factor, shift = (), (), ()
    if TOKENS > 1:  # else what is read where it is needed takes no registers before
        for piece in tl.static_range(E // PIECE):
            if GATE >= 0:
                gate += (_modulation(gates, time, frame, piece * PIECE + own, E, GATE),)
            if FORM != _STREAM:
                both = _factor_and_shift(modulation, time, weight, weight_bias, frame, piece * PIECE + own, E, SHIFT)
                factor += (both[0],)
                shift += (both[1],)
    for step in tl.range(0, TOKENS, num_stages=STAGES):
        row = (block * TOKENS + step).to(tl.int64)
        read, added = (), ()  # all of it before anything is written, as nothing may be read ahead of a write
        for piece in tl.static_range(E // PIECE):
            at = row * E + piece * PIECE + own
            read += (tl.load(x + at),)
            if ADDS:
                added += (tl.load(sums + at, eviction_policy="evict_first"),)
        values, total = (), tl.zeros([PIECE], tl.float32)
        for piece in tl.static_range(E // PIECE):
            channel, value = piece * PIECE + own, read[piece].to(tl.float32)
            if ADDS:
                more = _apply_scales(added[piece], row_scale, column_scale, bias, row, channel, SCALED)
                if GATE >= 0:
                    more *= gate[piece] if TOKENS > 1 else _modulation(gates, time, frame, channel, E, GATE)
                value = (value + more).to(out.dtype.element_ty).to(tl.float32)
            values += (value,)
            total += value
        if ADDS:
            for piece in tl.static_range(E // PIECE):
                tl.store(out + row * E + piece * PIECE + own, values[piece].to(out.dtype.element_ty))
        if FORM != _STREAM:
            mean, squares = tl.sum(total, 0) / E, tl.zeros([PIECE], tl.float32)
            for piece in tl.static_range(E // PIECE):
                squares += (values[piece] - mean) * (values[piece] - mean)
            inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / E + eps)
            found = ()
            for piece in tl.static_range(E // PIECE):
                if TOKENS > 1:
                    by, more = factor[piece], shift[piece]
                else:
                    by, more = _factor_and_shift(
                        modulation, time, weight, weight_bias, frame, piece * PIECE + own, E, SHIFT
                    )
                found += ((values[piece] - mean) * inverse * by + more,)
            if FORM == _CODES:
                found = _encode(found, scale + row, PIECE)
            for piece in tl.static_range(E // PIECE):
                tl.store(rows + row * E + piece * PIECE + own, found[piece].to(rows.dtype.element_ty))


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
    read = (x_QE, *(product or ()), norm.gate_source, norm.modulation_6E, norm.time_T6E, norm.weight_E, norm.bias_E)
    assert all(x is None or x.is_contiguous() for x in read)
    assert num_tokens % len(norm.time_T6E) == 0
    assert form == _STREAM.value or norm.shift >= 0 or (norm.weight_E is not None and norm.bias_E is not None)
    frame_tokens = num_tokens // len(norm.time_T6E)
    tokens = launch.tokens if frame_tokens % launch.tokens == 0 else 1
    _add_norm[(num_tokens // tokens,)](
        x_QE, sums, *(x_QE if s is None else s for s in scales), norm.gate_source, norm.modulation_6E, norm.time_T6E,
        *(x_QE if w is None else w for w in (norm.weight_E, norm.bias_E)), *to, frame_tokens, eps,
        E=dim, GATE=norm.gate if product is not None else -1, SHIFT=norm.shift, ADDS=product is not None,
        SCALED=scales[0] is not None, FORM=form, TOKENS=tokens, STAGES=launch.num_stages,
        REVERSED=launch.is_reversed, PIECE=min(dim & -dim, 512 if dim <= _WIDE else 2048),
        num_warps=launch.num_warps if dim <= _WIDE else 8,
    )  # fmt: skip
