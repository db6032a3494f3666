"""Attention by torch's fused kernels, with the log-sum-exp that its public function drops.

CPU: the flash kernel of torch. CUDA: flash attention, or the memory-efficient kernel where log m or the dtype asks for
it. The operators called are those that `scaled_dot_product_attention` dispatches to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import KeyValues, TiledKeys
from workers.kernels.lse import attend_parts
from workers.kernels.reference import attend_reference
from workers.kernels.tiled import GatherMemory, attend_tiled

_MAX_FLASH_HEAD_DIM = 256
_MIN_CPU_KEYS = 16
"""Fewer than a vector holds, and the CPU kernel takes a query that is NaN for one that sees nothing, which hides it."""


class SdpaKernel:
    """torch's own attention; every device and head dimension that it supports. Keys that tiles choose are gathered."""

    def __init__(self) -> None:
        self._memory = GatherMemory()

    @property
    def version(self) -> str:
        return f"sdpa (torch {torch.__version__})"

    def attend(self, q_BQND: Tensor, parts: tuple[KeyValues | TiledKeys, ...]) -> tuple[Tensor, Tensor]:
        return attend_parts(attend_sdpa, self._attend_tiled, q_BQND, parts)

    def _attend_tiled(self, q_BQND: Tensor, part: TiledKeys) -> tuple[Tensor, Tensor]:
        return attend_tiled(q_BQND, part, attend_sdpa, self._memory)


def attend_sdpa(q_BQND: Tensor, keys: KeyValues, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """One dense call."""
    if keys.num_tokens == 0 or (q_BQND.device.type == "cpu" and keys.num_tokens < _MIN_CPU_KEYS):
        return attend_reference(q_BQND, keys, scale)
    # Keys of a narrower store are widened here: the operators want one dtype.
    q, k, v = (x.to(q_BQND.dtype).transpose(1, 2) for x in (q_BQND, keys.k_BKND, keys.v_BKND))
    bias = None
    if keys.log_mass_BNK is not None:
        bias = keys.log_mass_BNK.to(q.dtype)[:, :, None, :]
    if q.is_cuda:
        out, lse_BNQ = _attend_cuda(q, k, v, bias)
    else:
        out, lse_BNQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)[
            :2
        ]
    if bias is not None:
        # Where no key exists the operators report 0 for the log-sum-exp.
        lse_BNQ = lse_BNQ.masked_fill(bias.isneginf().all(-1), -torch.inf)
    return out.transpose(1, 2), lse_BNQ.transpose(1, 2)


def _attend_cuda(q_BNQD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    num_queries, head_dim = q_BNQD.shape[2:]
    if bias is None and q_BNQD.dtype in (torch.float16, torch.bfloat16) and head_dim <= _MAX_FLASH_HEAD_DIM:
        pad = -head_dim % 8  # flash wants a multiple of 8; zeros change no logit, and the scale is given
        q, k, v = (F.pad(x, (0, pad)) if pad else x for x in (q_BNQD, k_BNKD, v_BNKD))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=head_dim**-0.5)[:2]
        return out[..., :head_dim], lse[..., :num_queries]
    if bias is not None:
        # The kernel reads biases in aligned rows: give it room for a whole number of 16, and show it the true part.
        num_keys = k_BNKD.shape[2]
        room = torch.zeros(
            (*bias.shape[:2], num_queries, num_keys + -num_keys % 16), dtype=bias.dtype, device=bias.device
        )
        room[..., :num_keys] = bias
        bias = room[..., :num_keys]
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q_BNQD, k_BNKD, v_BNKD, bias, True)[:2]
    return out, lse[..., :num_queries]
