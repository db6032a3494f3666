"""Attention over listed tiles whose keys and values are stored in 8 bits: what part of a table's history needs.

A code times the scale of its vector is the channel (`cache/low_bit.py`). The result comes with its log-sum-exp, so that
it can be merged with that over keys in 16 bits (`lse.py`). The plain way here is the reference of `triton_codes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CodedKeys:
    """Keys after RoPE and values of whole tiles, one row of slots a head."""

    k_NLD: Tensor
    """int8."""
    k_scale_NL: Tensor
    v_NLD: Tensor
    """int8."""
    v_scale_NL: Tensor
    log_mass_NL: Tensor
    """log m, float32; a finite number far below all logits where there is no key."""


AttendCodes = Callable[[Tensor, CodedKeys, Tensor], tuple[Tensor, Tensor]]
"""(q_QND, keys, index_NIJ) -> out_QND and the natural log-sum-exp lse_QN, float32. index as of `AttendTable`."""


def attend_codes_plain(q_QND: Tensor, keys: CodedKeys, index_NIJ: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """The reference: one product over all keys, in float32 or wider."""
    (num_queries, heads), dtype = q_QND.shape[:2], torch.promote_types(q_QND.dtype, torch.float32)
    seen = torch.zeros(heads, index_NIJ.shape[1], keys.k_NLD.shape[1] // tile, dtype=torch.bool, device=q_QND.device)
    seen.scatter_(2, index_NIJ.long(), True)
    mask = seen.repeat_interleave(tile, 1)[:, :num_queries].repeat_interleave(tile, 2)
    k = keys.k_NLD.to(dtype) * keys.k_scale_NL.to(dtype)[..., None]
    v = keys.v_NLD.to(dtype) * keys.v_scale_NL.to(dtype)[..., None]
    logit = q_QND.to(dtype).transpose(0, 1) @ k.mT / math.sqrt(q_QND.shape[-1]) + keys.log_mass_NL[:, None].to(dtype)
    logit = logit.masked_fill(~mask, -torch.inf)
    return (logit.softmax(-1) @ v).transpose(0, 1).to(q_QND.dtype), logit.logsumexp(-1).T.float()
