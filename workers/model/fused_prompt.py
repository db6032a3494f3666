"""Triton kernels of cross-attention to the prompt: norm of the queries, logits, softmax and sum in two passes.

A program keeps keys and values of one head and takes block after block of tokens through them, so that they are read a
few times from the second-level cache and not by every block. A query's norm is over all heads, so a small pass before
writes its inverse. By the bytes of 4680 tokens, 12 heads of 128 and 112 rows: queries twice and the result once are
43 MB, keys and values of 264 programs 15 MB; programs for all heads of 32 tokens would read 101 MB of keys and values.
The plain form is in `prompt_attention.py`; imported where a tensor lies on a GPU, never earlier.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.model.fp8_linears import Product
from workers.model.prompt_attention import PromptTable

_LOG2_E = math.log2(math.e)


class Launch(NamedTuple):
    """How the work is cut."""

    block_m: int = 64
    """Tokens at once; a group of four warps multiplies 64."""
    programs: int = 264
    """Of all heads together, about; two for each multiprocessor of an H200, which is what fits."""
    num_warps: int = 4
    num_stages: int = 3
    """Blocks of queries under way, less one; of prompt rows where a prompt is long."""
    whole_p: int = 128
    """Rows of a prompt that stay with a program; a longer one is read anew for each block of tokens."""
    block_p: int = 64
    """Its rows at once."""
    norm_tokens: int = 8
    """Tokens of a program that makes inverse norms."""
    norm_warps: int = 4


HOPPER = Launch()
"""For groups of four warps that read keys and values from shared memory: 107 kB, so two programs fit."""
OTHER = Launch(block_m=32, num_stages=2, whole_p=64)
"""Where the products' operands are in registers: 50 kB, nothing spilled from compute capability 8.0 on."""
WIDE = Launch(block_m=32, num_stages=2, whole_p=32, block_p=32)
"""For float32."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _inverse_norms(  # type: ignore[no-untyped-def]
    sums, row_scale, column_scale, bias, inverse, num_tokens, eps,
    E: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens, their channels in pieces, as a width is seldom a power of two."""
    token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    there = token < num_tokens
    row = tl.load(row_scale + token, mask=there, other=0.0) if SCALED else 1.0
    squares = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for piece in tl.static_range(E // BLOCK_C):
        channel = piece * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        x = tl.load(sums + token * E + channel, mask=there, other=0.0).to(tl.float32)
        if SCALED:
            x = x * (row * tl.load(column_scale + channel)) + tl.load(bias + channel).to(tl.float32)
            x = x.to(sums.dtype.element_ty).to(tl.float32)
        squares += x * x
    tl.store(inverse + token, 1.0 / tl.sqrt(tl.sum(squares, 1, keep_dims=True) / E + eps), mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _attend_to_prompt(  # type: ignore[no-untyped-def]
    sums, row_scale, column_scale, bias, weight, inverse, k, v, log_mass, out,
    num_tokens, num_rows, scale, log2_e,
    E: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: every so many blocks of tokens one of them, and one head; softmax in base 2.

    Queries are rounded where the plain form rounds; logits are not, and weights before they are divided by their sum.
    """
    head = tl.program_id(1)
    kind = out.dtype.element_ty
    own, channel, row = tl.arange(0, BLOCK_M), tl.arange(0, D), tl.arange(0, BLOCK_P)
    at_own, at_row = own[:, None] * E + channel[None, :], row[:, None] * D + channel[None, :]
    k += head.to(tl.int64) * num_rows * D
    v += head.to(tl.int64) * num_rows * D
    factor = tl.load(weight + head * D + channel).to(tl.float32)[None, :]
    if SCALED:
        column = tl.load(column_scale + head * D + channel)[None, :]
        more = tl.load(bias + head * D + channel).to(tl.float32)[None, :]
    if WHOLE:
        keys = tl.load(k + at_row, mask=row[:, None] < num_rows, other=0.0)
        values = tl.load(v + at_row, mask=row[:, None] < num_rows, other=0.0)
        mass = tl.load(log_mass + row, mask=row < num_rows, other=float("-inf")) * log2_e
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES if WHOLE else 1):
        first = block * BLOCK_M
        start = first.to(tl.int64) * E + head * D
        there = own < num_tokens - first
        x = tl.load(sums + start + at_own, mask=there[:, None], other=0.0).to(tl.float32)
        if SCALED:
            x = x * (tl.load(row_scale + first + own, mask=there, other=0.0)[:, None] * column) + more
            x = x.to(kind).to(tl.float32)
        x = (x * tl.load(inverse + first + own, mask=there, other=0.0)[:, None]).to(kind).to(tl.float32)
        query = (x * factor).to(kind)
        if WHOLE:
            logit = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale + mass[None, :]
            share = tl.exp2(logit - tl.max(logit, 1)[:, None])
            total = tl.sum(share, 1)
            summed = tl.dot(share.to(kind), values, input_precision=PRECISION)
        else:
            most = tl.full([BLOCK_M], -1e30, tl.float32)  # not infinite: all rows at once may be ones of no weight
            total = tl.zeros([BLOCK_M], tl.float32)
            summed = tl.zeros([BLOCK_M, D], tl.float32)
            for begin in tl.range(0, num_rows, BLOCK_P, num_stages=STAGES):
                inside = row < num_rows - begin
                keys = tl.load(k + begin * D + at_row, mask=inside[:, None], other=0.0)
                values = tl.load(v + begin * D + at_row, mask=inside[:, None], other=0.0)
                mass = tl.load(log_mass + begin + row, mask=inside, other=float("-inf")) * log2_e
                logit = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale + mass[None, :]
                higher = tl.maximum(most, tl.max(logit, 1))
                share = tl.exp2(logit - higher[:, None])
                fade = tl.exp2(most - higher)
                total = total * fade + tl.sum(share, 1)
                summed = tl.dot(share.to(kind), values, summed * fade[:, None], input_precision=PRECISION)
                most = higher
        tl.store(out + start + at_own, (summed * (1.0 / total)[:, None]).to(kind), mask=there[:, None])


def inverse_norms(product: Product, eps: float, launch: Launch = HOPPER) -> Tensor:
    """1 / sqrt(mean of squares + eps) of each row of the product's value, float32 [Q]."""
    sums, *scales = product
    num_tokens, dim = sums.shape
    assert sums.is_contiguous()
    inverse = sums.new_empty(num_tokens, dtype=torch.float32)
    _inverse_norms[(triton.cdiv(num_tokens, launch.norm_tokens),)](
        sums, *(sums if s is None else s for s in scales), inverse, num_tokens, eps,
        E=dim, SCALED=scales[0] is not None, BLOCK_M=launch.norm_tokens,
        BLOCK_C=min(dim & -dim, 512), num_warps=launch.norm_warps,
    )  # fmt: skip
    return inverse


def attend_prompt(
    product: Product, norm_E: Tensor, prompt: PromptTable, eps: float, launch: Launch | None = None
) -> Tensor:
    """`prompt_attention.attend_prompt_plain`, contiguous; a head's channels are a power of two, from 16 on."""
    launch = launch or _choose_launch(product.sum_QO)
    sums, *scales = product
    heads, num_rows, head_dim = prompt.k_NPD.shape
    num_tokens, dim = sums.shape
    assert dim == heads * head_dim
    assert all(x.is_contiguous() for x in (sums, norm_E, *prompt))
    inverse = inverse_norms(product, eps, launch)
    out = sums.new_empty(num_tokens, heads, head_dim)
    rows_at_once = max(16, triton.next_power_of_2(num_rows))  # no product has fewer
    is_whole = rows_at_once <= launch.whole_p
    grid = min(triton.cdiv(num_tokens, launch.block_m), max(1, launch.programs // heads)), heads
    _attend_to_prompt[grid](
        sums, *(sums if s is None else s for s in scales), norm_E, inverse, *prompt, out,
        num_tokens, num_rows, _LOG2_E / head_dim**0.5, _LOG2_E, E=dim, D=head_dim, SCALED=scales[0] is not None,
        WHOLE=is_whole, BLOCK_M=launch.block_m, BLOCK_P=rows_at_once if is_whole else launch.block_p,
        STAGES=launch.num_stages, PRECISION="ieee" if sums.dtype == torch.float32 else "tf32",
        num_warps=launch.num_warps,
    )  # fmt: skip
    return out


def _choose_launch(x: Tensor) -> Launch:
    if x.dtype == torch.float32:
        return WIDE
    return HOPPER if torch.cuda.get_device_capability(x.device)[0] == 9 else OTHER
