"""Attention with products of 8-bit floats in plain torch: the reference of `fp8_tiles.py`, for any tile and head size.

Queries, keys and values are rounded as `coded_tiles.py` says; the shares of a softmax, relative to the largest of a row
and times 256, are rounded too, but their sum is not. Where a GPU has no such products this is what a render runs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.coded_tiles import (
    SCALE_QK,
    SCALE_V,
    CodedTiles,
    decode_masses,
    decode_rows,
    decode_values,
    log2_mass,
    to_e4m3,
)

SHARE_SCALE = 256.0
"""Of the shares of a softmax, the largest of which is one."""
_AT_ONCE = {"cpu": 2**20, "cuda": 2**27}
"""Numbers gathered at a time."""


def attend_rounded(q_BQD: Tensor, k_BKD: Tensor, v_BKD: Tensor, bias_BK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Result [B, Q, D] and natural log-sum-exp [B, Q] in float32.

    Args:
        q_BQD, k_BKD, v_BKD: As they come.
        bias_BK: log2 of m, -inf where there is no key; None: 0.
    """
    q, k, v = _round(q_BQD, SCALE_QK), _round(k_BKD, SCALE_QK), _round(v_BKD, SCALE_V)
    return _attend(q, k, v, bias_BK)


def attend_coded_plain(
    q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor | None, tile: int
) -> tuple[Tensor, Tensor]:
    """Attention over listed tiles: out_QND in the dtype of the queries, and natural log-sum-exp lse_QN, float32.

    Args:
        q_QNW: Queries after RoPE; channels behind those of a value are not read.
        k_NLW: Keys, log m in the channels behind (or no such channels).
        v_NLD: Values.
        index_NIJ: int32: tiles that a tile of queries sees; None: every query sees every key.
        tile: Keys of a tile, and queries of one.
    """
    (num_queries, heads), dim = q_QNW.shape[:2], v_NLD.shape[-1]
    q = _round(q_QNW[..., :dim].transpose(0, 1), SCALE_QK)
    k, v, bias_NL = _round(k_NLW[..., :dim], SCALE_QK), _round(v_NLD, SCALE_V), log2_mass(k_NLW, dim)
    if index_NIJ is None:
        out, lse = _attend(q, k, v, bias_NL)
    else:
        tiles = index_NIJ.shape[1]
        q = F.pad(q, (0, 0, 0, tiles * tile - num_queries)).unflatten(1, (tiles, tile)).flatten(0, 1)
        k, v, bias = (x.unflatten(1, (-1, tile)).flatten(0, 1) for x in (k, v, bias_NL))  # all tiles of all heads
        first_N11 = torch.arange(heads, device=k.device)[:, None, None] * (k_NLW.shape[1] // tile)
        index_RJ = (index_NIJ.long() + first_N11).flatten(0, 1)
        rows = max(1, _AT_ONCE.get(k.device.type, _AT_ONCE["cpu"]) // (index_RJ.shape[1] * tile * dim))
        parts = [
            _attend(q_RTD, *(x[index].flatten(1, 2) for x in (k, v, bias)))
            for q_RTD, index in zip(q.split(rows), index_RJ.split(rows), strict=True)
        ]
        out, lse = (
            torch.cat(x).unflatten(0, (heads, tiles)).flatten(1, 2)[:, :num_queries] for x in zip(*parts, strict=True)
        )
    return out.transpose(0, 1).to(q_QNW.dtype).contiguous(), lse.T


def attend_tiles_plain(
    q_NIB: Tensor,
    tiles: CodedTiles,
    index_NIJ: Tensor | None,
    num_queries: int,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for what is coded already; see `fp8_tiles.attend_coded`."""
    q, k, v = decode_rows(q_NIB), decode_rows(tiles.k_NTB), decode_values(tiles.v_NTB)
    bias = decode_masses(tiles.mass_NTB, k.shape[-1])
    outs, lses = [], []
    for i in range(q.shape[1]):
        seen = [(x if index_NIJ is None else _take(x, index_NIJ[:, i])).flatten(1, 2) for x in (k, v, bias)]
        out_NTD, lse_NT = _attend(q[:, i], *seen)
        outs.append(out_NTD)
        lses.append(lse_NT)
    out_NQD, lse_NQ = torch.cat(outs, 1)[:, :num_queries], torch.cat(lses, 1)[:, :num_queries]
    found = out_NQD.transpose(0, 1).to(torch.bfloat16).contiguous(), lse_NQ.T
    if out is None:
        return found
    for buffer, values in zip(out, found, strict=True):
        buffer.copy_(values)
    return out


def _take(x_NT: Tensor, index_NJ: Tensor) -> Tensor:
    return x_NT[torch.arange(len(x_NT), device=x_NT.device)[:, None], index_NJ.long()]


def _round(x: Tensor, scale: float) -> Tensor:
    """Rounded, still times the scale, float32."""
    return to_e4m3(x, scale).float()


def _attend(q_BQD: Tensor, k_BKD: Tensor, v_BKD: Tensor, bias_BK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of numbers that are rounded and times their scales."""
    scale = math.log2(math.e) / (SCALE_QK**2 * math.sqrt(q_BQD.shape[-1]))
    if bias_BK is None:
        logit = torch.bmm(q_BQD, k_BKD.mT).mul_(scale)
    else:
        logit = torch.baddbmm(bias_BK[:, None], q_BQD, k_BKD.mT, alpha=scale)
    largest_BQ1 = logit.amax(-1, keepdim=True)
    share = logit.sub_(largest_BQ1.clamp(min=torch.finfo(torch.float32).min)).exp2_()  # a row without a key: all 0
    sum_BQ1 = share.sum(-1, keepdim=True)
    rounded = to_e4m3(share, SHARE_SCALE).float()
    out = torch.bmm(rounded, v_BKD) / (sum_BQ1.clamp(min=1e-30) * (SHARE_SCALE * SCALE_V))
    return out, ((largest_BQ1 + sum_BQ1.log2()) * math.log(2.0))[..., 0]
