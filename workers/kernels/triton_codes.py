"""Attention over listed tiles of 8-bit codes in Triton: `triton_listed.py` for keys that are half as large.

Codes are whole numbers up to 127, which every dtype of a product holds exactly: a tile is converted and no more. The
scale of a key multiplies its logits after the product, that of a value the weights before theirs. Equality with the
reference was tested with Triton's interpreter in float32, and the same tests pass on an H200; how fast it is there has
not been measured.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.listed_codes import AttendCodes, CodedKeys
from workers.kernels.triton_listed import Config

_LOG2_E = math.log2(math.e)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def attend_codes(  # type: ignore[no-untyped-def]
    q, k, k_scale, v, v_scale, mass, out, lse, index,
    stride_qt, stride_qn, stride_kn, stride_kt, stride_vn, stride_vt, stride_sn, stride_un, stride_mn,
    scale, log2_e, heads, num_queries, num_listed, head_dim,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one tile and head over all listed keys, in base 2."""
    PARTS: tl.constexpr = TILE // BLOCK_M
    STEPS: tl.constexpr = TILE // BLOCK_N
    row_tile, head = tl.program_id(0) // PARTS, tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = token < num_queries
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < head_dim
    at_q = q + token.to(tl.int64)[:, None] * stride_qt + head * stride_qn + channel[None, :]
    query = tl.load(at_q, mask=is_query[:, None] & is_channel[None, :], other=0.0)
    at_k, at_v = k + head * stride_kn + channel[None, :], v + head * stride_vn + channel[None, :]
    list_start = index + (head * (tl.num_programs(0) // PARTS) + row_tile) * num_listed

    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.range(0, num_listed * STEPS):
        slot = tl.load(list_start + i // STEPS) * TILE + (i % STEPS) * BLOCK_N + tl.arange(0, BLOCK_N)
        key = slot.to(tl.int64)[:, None]
        keys = tl.load(at_k + key * stride_kt, mask=is_channel[None, :], other=0).to(query.dtype)
        values = tl.load(at_v + key * stride_vt, mask=is_channel[None, :], other=0).to(query.dtype)
        of_keys = tl.load(k_scale + head * stride_sn + slot).to(tl.float32) * scale
        of_values = tl.load(v_scale + head * stride_un + slot).to(tl.float32)
        log_mass = tl.load(mass + head * stride_mn + slot) * log2_e
        logit = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * of_keys[None, :] + log_mass[None, :]
        # A finite number stands for log m where there is no key, so nothing here is infinite.
        higher = tl.maximum(most, tl.max(logit, 1))
        weight = tl.exp2(logit - higher[:, None])
        fade = tl.exp2(most - higher)
        total = total * fade + tl.sum(weight, 1)
        weight = (weight * of_values[None, :]).to(query.dtype)
        summed = tl.dot(weight, values, summed * fade[:, None], input_precision=PRECISION)
        most = higher
    at_out = out + (token.to(tl.int64)[:, None] * heads + head) * head_dim + channel[None, :]
    tl.store(at_out, (summed / total[:, None]).to(out.dtype.element_ty), mask=is_query[:, None] & is_channel[None, :])
    tl.store(lse + token.to(tl.int64) * heads + head, (most + tl.log2(total)) / log2_e, mask=is_query)


def make_triton_codes(tile: int, config: Config | None = None) -> AttendCodes:
    """Attention over tiles of that many keys, a power of two from 16 on; without tensor descriptors."""
    assert tile >= 16
    assert tile & (tile - 1) == 0
    chosen = config or Config()
    assert not chosen.by_tma
    block_m, block_n = min(chosen.block_m, tile), min(chosen.block_n, tile)

    def attend(q_QND: Tensor, keys: CodedKeys, index_NIJ: Tensor) -> tuple[Tensor, Tensor]:
        num_queries, heads, head_dim = q_QND.shape
        k, v = keys.k_NLD, keys.v_NLD
        out = torch.empty((num_queries, heads, head_dim), dtype=q_QND.dtype, device=q_QND.device)
        lse = torch.empty((num_queries, heads), dtype=torch.float32, device=q_QND.device)
        attend_codes[(index_NIJ.shape[1] * (tile // block_m), heads)](
            q_QND, k, keys.k_scale_NL, v, keys.v_scale_NL, keys.log_mass_NL, out, lse, index_NIJ,
            *q_QND.stride()[:2], *k.stride()[:2], *v.stride()[:2], keys.k_scale_NL.stride(0),
            keys.v_scale_NL.stride(0), keys.log_mass_NL.stride(0),
            head_dim**-0.5 * _LOG2_E, _LOG2_E, heads, num_queries, index_NIJ.shape[2], head_dim,
            TILE=tile, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_M=block_m, BLOCK_N=block_n,
            PRECISION="ieee" if q_QND.dtype == torch.float32 else "tf32",
            num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
        return out, lse

    return attend
