"""Attention over listed tiles in plain torch, one tile of queries after another: what runs where no kernel can.

Only the listed keys are touched, so the cost follows the density and memory stays small; shapes are fixed. The
reference that it is compared with (`listed_tiles.attend_listed_plain`) multiplies all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def attend_gathered(q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, tile: int) -> Tensor:
    """See `listed_tiles.AttendTable`; computes in float32 or wider."""
    parts = _attend_tiles(q_QNW, k_NLW, v_NLD, index_NIJ, tile)
    return torch.cat([out for out, _ in parts])


def attend_gathered_lse(
    q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, tile: int
) -> tuple[Tensor, Tensor]:
    """See `listed_tiles.AttendLse`."""
    parts = [(out, logit.logsumexp(-1).T) for out, logit in _attend_tiles(q_QNW, k_NLW, v_NLD, index_NIJ, tile)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _attend_tiles(
    q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, tile: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each tile of queries the result out_TND and the logits of its listed keys."""
    dtype = torch.promote_types(q_QNW.dtype, torch.float32)
    heads, dim = k_NLW.shape[0], v_NLD.shape[-1]
    head_N1 = torch.arange(heads, device=k_NLW.device)[:, None]
    within = torch.arange(tile, device=k_NLW.device)
    for i, q_TNW in enumerate(q_QNW.split(tile)):
        slot_NK = (index_NIJ[:, i, :, None].long() * tile + within).flatten(1)
        logit = q_TNW.to(dtype).transpose(0, 1) @ k_NLW[head_N1, slot_NK].to(dtype).mT / math.sqrt(dim)
        out_NTD = logit.softmax(-1) @ v_NLD[head_N1, slot_NK].to(dtype)
        yield out_NTD.transpose(0, 1).to(q_QNW.dtype), logit
