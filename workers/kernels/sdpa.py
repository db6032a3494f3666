"""Attention by torch's fused kernels, with the log-sum-exp that its public function drops.

CPU: the flash kernel of torch. CUDA: cuDNN from Hopper on (there nearly twice as fast as torch's flash attention,
which is FlashAttention-2), else flash attention; log m goes through flash in two more channels; float32 through the
memory-efficient kernel. The operators called are those that `scaled_dot_product_attention` dispatches to.
All routes were tested on an H200 (tests/gpu/test_sdpa.py).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import KernelPart, KeyValues, TiledKeys
from workers.kernels.lse import attend_parts
from workers.kernels.mass import through_channels
from workers.kernels.reference import attend_reference
from workers.kernels.tiled import GroupMemory, attend_tiled

HalfRoute = Literal["cudnn", "flash"]

_CUDNN_HEAD_DIMS = range(8, 129, 8)
_MAX_FLASH_HEAD_DIM = 256
_HALF = (torch.float16, torch.bfloat16)
_MIN_CPU_KEYS = 16
"""Fewer than a vector holds, and the CPU kernel takes a query that is NaN for one that sees nothing, which hides it."""

_HALVED_KEYS = 1024
"""A single row with fewer is not worth two."""


class SdpaKernel:
    """torch's own attention; every device and head dimension that it supports. Keys that tiles choose are gathered.

    Args:
        half_route: Who computes 16-bit numbers without log m on CUDA.
    """

    def __init__(self, half_route: HalfRoute = "flash") -> None:
        self._half_route: HalfRoute = half_route
        self._memory = GroupMemory()

    @property
    def version(self) -> str:
        if not torch.cuda.is_available():
            return f"sdpa (torch {torch.__version__})"
        route: str = self._half_route
        if route == "cudnn":
            route = f"cudnn {torch.backends.cudnn.version()}, flash for log m"
        return f"sdpa (torch {torch.__version__}, {route})"

    def attend(self, q_BQND: Tensor, parts: tuple[KernelPart, ...]) -> tuple[Tensor, Tensor]:
        return attend_parts(self._attend_dense, self._attend_tiled, q_BQND, parts)

    def _attend_tiled(self, q_BQND: Tensor, part: TiledKeys) -> tuple[Tensor, Tensor]:
        return attend_tiled(q_BQND, part, self._attend_dense, self._memory)

    def _attend_dense(self, q_BQND: Tensor, keys: KeyValues) -> tuple[Tensor, Tensor]:
        return attend_sdpa(q_BQND, keys, half_route=self._half_route)


def attend_sdpa(
    q_BQND: Tensor, keys: KeyValues, scale: float | None = None, half_route: HalfRoute = "flash"
) -> tuple[Tensor, Tensor]:
    """One dense call."""
    is_cuda, head_dim = q_BQND.is_cuda, q_BQND.shape[-1]
    if keys.num_tokens == 0 or (not is_cuda and keys.num_tokens < _MIN_CPU_KEYS):
        return attend_reference(q_BQND, keys, scale)
    is_half = is_cuda and q_BQND.dtype in _HALF and head_dim <= _MAX_FLASH_HEAD_DIM
    if is_half and keys.log_mass_BNK is not None and scale is None and head_dim + 16 <= _MAX_FLASH_HEAD_DIM:
        return through_channels(attend_sdpa, q_BQND, keys)
    # Keys of a narrower store are widened here: the operators want one dtype.
    q, k, v = (x.to(q_BQND.dtype).transpose(1, 2) for x in (q_BQND, keys.k_BKND, keys.v_BKND))
    scale = scale or head_dim**-0.5
    if keys.log_mass_BNK is None and is_half:
        attend = _attend_cudnn if half_route == "cudnn" and head_dim in _CUDNN_HEAD_DIMS else _attend_flash
        out, lse_BNQ = attend(q, k, v, scale)
    else:
        bias = None if keys.log_mass_BNK is None else keys.log_mass_BNK.to(q.dtype)[:, :, None, :]
        out, lse_BNQ = (_attend_efficient if is_cuda else _attend_cpu)(q, k, v, bias, scale)
        # Where no key exists the operators report 0 for the log-sum-exp. A CPU asks one key of each row first.
        if bias is not None and (is_cuda or bool(bias[..., 0].isneginf().any())):
            lse_BNQ = lse_BNQ.masked_fill(bias.isneginf().all(-1), -torch.inf)
    return out.transpose(1, 2), lse_BNQ.transpose(1, 2)


def _attend_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    num_keys = k.shape[2]
    if q.shape[:2] == (1, 1) and num_keys >= _HALVED_KEYS and num_keys % 2 == 0:
        return _attend_halves(q, k, v, bias, scale)
    return _call_cpu(q, k, v, bias, scale)


def _attend_halves(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One row over either half of its keys, and merged: the kernel shares out 64 queries of a row at a time, which
    leaves threads idle where a single row has few."""
    halves = [x[0, 0].unflatten(0, (2, -1))[:, None] for x in (k, v)]
    bias_half = None if bias is None else bias[0, 0].unflatten(-1, (2, -1)).transpose(0, 1)[:, None]
    out, lse = _call_cpu(q.expand(2, -1, -1, -1), halves[0], halves[1], bias_half, scale)
    if bias_half is not None and bool(bias_half[..., 0].isneginf().any()):  # a half without keys says nothing
        is_empty = bias_half.isneginf().all(-1)
        out, lse = out.masked_fill(is_empty[..., None], 0.0), lse.masked_fill(is_empty, -torch.inf)
    both = torch.logaddexp(lse[:1], lse[1:])
    share = (lse[1:] - both.clamp(min=torch.finfo(both.dtype).min)).exp_().to(out.dtype)
    return torch.lerp(out[:1], out[1:], share[..., None]), both


def _call_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse_BNQ = operator(q, k, v, attn_mask=bias, scale=scale)[:2]
    return out, lse_BNQ


def _attend_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    return out, lse.reshape(q.shape[:3])  # [B, N, Q, 1]


def _attend_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    num_queries, head_dim = q.shape[2:]
    pad = -head_dim % 8  # flash wants a multiple of 8; zeros change no logit, and the scale is given
    q, k, v = (F.pad(x, (0, pad)) if pad else x for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return out[..., :head_dim], lse[..., :num_queries]


def _attend_efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    num_queries, num_keys = q.shape[2], k.shape[2]
    if bias is not None:
        # The kernel reads biases in aligned rows: give it room for a whole number of 16, and show it the true part.
        room = torch.zeros(
            (*bias.shape[:2], num_queries, num_keys + -num_keys % 16), dtype=bias.dtype, device=bias.device
        )
        room[..., :num_keys] = bias
        bias = room[..., :num_keys]
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[:2]
    return out, lse[..., :num_queries]
