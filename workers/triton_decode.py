"""Codes of 4 bits times steps as bfloat16, two at once: what `cache/triton_rows.py` does for other dtypes one by one.

Three quarters of the instructions; kernels that merge or choose are bound by what they calculate, not what they read.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEP_OF_4 = tl.constexpr(1 / 7)
"""Of a code, where the largest channel is 1: the largest code of 4 bits is 7."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def two_parts(step):  # type: ignore[no-untyped-def]
    """A float32 as the nearest bfloat16 and that of the rest, each twice in a word."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 back;
            .reg .f32 rest;
            cvt.rn.bf16x2.f32 $0, $2, $2;
            shl.b32 back, $0, 16;
            sub.rn.f32 rest, $2, back;
            cvt.rn.bf16x2.f32 $1, rest, rest;
        }
        """,
        "=&r,=r,f",
        [step],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def scaled_codes(code, first, first_rest, second, second_rest):  # type: ignore[no-untyped-def]
    """Codes of 4 bits times steps, both in two parts, rounded to bfloat16 as if of the float32 product.

    Two at once. The parts lack 2^-17 of a step, and a largest channel of 8 bits times a code over 7 is never nearer
    than 2^-12 to where rounding changes. Behind 2^7 the last bit of a bfloat16 is 1.
    """
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 a, b, c, d, step, rest, of_rest, one, less, none;
            mov.b32 one, 0x3F803F80;
            mov.b32 less, 0xC308C308;
            mov.b32 none, 0x80008000;
            shr.b32 b, $8, 8;
            shr.b32 c, $8, 4;
            shr.b32 d, $8, 12;
            lop3.b32 a, $8, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 a, a, one, less;
            fma.rn.bf16x2 b, b, one, less;
            fma.rn.bf16x2 c, c, one, less;
            fma.rn.bf16x2 d, d, one, less;
            prmt.b32 step, $9, $11, 0x7610;
            prmt.b32 rest, $13, $15, 0x7610;
            fma.rn.bf16x2 of_rest, a, rest, none;
            fma.rn.bf16x2 a, a, step, of_rest;
            prmt.b32 step, $10, $12, 0x7610;
            prmt.b32 rest, $14, $16, 0x7610;
            fma.rn.bf16x2 of_rest, b, rest, none;
            fma.rn.bf16x2 b, b, step, of_rest;
            prmt.b32 step, $17, $19, 0x7610;
            prmt.b32 rest, $21, $23, 0x7610;
            fma.rn.bf16x2 of_rest, c, rest, none;
            fma.rn.bf16x2 c, c, step, of_rest;
            prmt.b32 step, $18, $20, 0x7610;
            prmt.b32 rest, $22, $24, 0x7610;
            fma.rn.bf16x2 of_rest, d, rest, none;
            fma.rn.bf16x2 d, d, step, of_rest;
            shl.b32 $0, a, 16;
            shl.b32 $1, b, 16;
            and.b32 $2, a, 0xFFFF0000;
            and.b32 $3, b, 0xFFFF0000;
            shl.b32 $4, c, 16;
            shl.b32 $5, d, 16;
            and.b32 $6, c, 0xFFFF0000;
            and.b32 $7, d, 0xFFFF0000;
        }
        """,
        "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [code, first, first_rest, second, second_rest],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=4,
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_codes(x, largest, at, there, D: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of rows of `int4`: bytes, and the largest channels of the groups of either half."""
    HALF: tl.constexpr = D // 2
    RUN: tl.constexpr = GROUP if GROUP < HALF else HALF
    here = there[:, None]
    code = tl.load(x + at[:, None] + tl.arange(0, HALF)[None, :], mask=here, other=0)
    at_largest = (at // HALF * (D // GROUP))[:, None] + tl.arange(0, HALF // RUN)[None, :] * RUN // GROUP
    of_first = tl.load(largest + at_largest, mask=here, other=0.0)
    of_second = of_first
    if GROUP < D:
        of_second = tl.load(largest + at_largest + HALF // GROUP, mask=here, other=0.0)
    return code, of_first, of_second


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def decode_codes(  # type: ignore[no-untyped-def]
    code, of_first, of_second, M: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Halves of M rows that `load_codes` read, rounded to bfloat16: float32 [M, runs, RUN]."""
    HALF: tl.constexpr = D // 2
    RUN: tl.constexpr = GROUP if GROUP < HALF else HALF
    first_step, first_rest = two_parts(of_first.to(tl.float32) * STEP_OF_4)
    second_step, second_rest = first_step, first_rest
    if GROUP < D:
        second_step, second_rest = two_parts(of_second.to(tl.float32) * STEP_OF_4)
    return scaled_codes(
        tl.reshape(code, [M, HALF // RUN, RUN]), first_step[:, :, None], first_rest[:, :, None],
        second_step[:, :, None], second_rest[:, :, None],
    )  # fmt: skip
