"""Attention over listed tiles of a table that already lies as kernels read it: nothing is gathered, widened or merged.

Keys carry log m in channels behind their own (`mass.py`), queries a one there; every query tile has a list of equally
many whole key tiles. Three ways: FlashAttention-4 on Hopper, Triton, and plain torch as the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

ListedName = Literal["flash-attn-4", "triton", "torch"]

AttendTable = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q_QNW, k_NLW, v_NLD, index_NIJ) -> out_QND. index is int32: tiles that a tile of queries sees, in any order."""
AttendLse = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""The same with the natural log-sum-exp lse_QN in float32 (float64 for float64 inputs), perhaps not contiguous."""

AttendInto = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]], None]
"""The same, written to out_QND, contiguous, and lse_QN, whose transpose is."""

_Attend = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""With lse_QN, where True asks for it."""


def make_attend(name: ListedName, tile: int) -> AttendTable:
    """That way of computing.

    Raises:
        ImportError: Its package is not installed.
    """
    attend = _load(name, tile)
    return lambda q, k, v, index: attend(q, k, v, index, False)[0]


def make_attend_lse(name: ListedName, tile: int) -> AttendLse:
    """The same way with the log-sum-exp, so that what it gives can be merged with attention over other keys.

    Raises:
        ImportError: Its package is not installed.
    """
    attend = _load(name, tile)

    def attend_lse(q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor) -> tuple[Tensor, Tensor]:
        out, lse_QN = attend(q_QNW, k_NLW, v_NLD, index_NIJ, True)
        assert lse_QN is not None
        return out, lse_QN

    return attend_lse


def make_attend_into(name: ListedName, tile: int) -> AttendInto:
    """The same way into buffers: FlashAttention-4 writes there itself, what others give is copied.

    Raises:
        ImportError: Its package is not installed.
    """
    return _make_flash_into(tile) if name == "flash-attn-4" else copied(make_attend_lse(name, tile))


def copied(attend: AttendLse) -> AttendInto:
    """That way, its results copied to where they are wanted."""

    def attend_into(
        q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, into: tuple[Tensor, Tensor]
    ) -> None:
        for buffer, values in zip(into, attend(q_QNW, k_NLW, v_NLD, index_NIJ), strict=True):
            buffer.copy_(values)

    return attend_into


def _load(name: ListedName, tile: int) -> _Attend:
    if name == "flash-attn-4":
        return _make_flash(tile)
    if name == "triton":
        return _make_hopper(tile) if _is_hopper() and tile >= 16 else _make_triton(tile)
    return lambda q, k, v, index, with_lse: attend_listed_plain_lse(q, k, v, index, tile)


def attend_listed_plain(q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, tile: int) -> Tensor:
    """The reference: one product over all keys, in float32 or wider."""
    return attend_listed_plain_lse(q_QNW, k_NLW, v_NLD, index_NIJ, tile)[0]


def attend_listed_plain_lse(
    q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, tile: int
) -> tuple[Tensor, Tensor]:
    """The reference with its log-sum-exp."""
    num_queries, heads = q_QNW.shape[:2]
    dtype = torch.promote_types(q_QNW.dtype, torch.float32)
    seen = torch.zeros(heads, index_NIJ.shape[1], k_NLW.shape[1] // tile, dtype=torch.bool, device=k_NLW.device)
    seen.scatter_(2, index_NIJ.long(), True)
    mask = seen.repeat_interleave(tile, 1)[:, :num_queries].repeat_interleave(tile, 2)
    logit = q_QNW.to(dtype).transpose(0, 1) @ k_NLW.to(dtype).mT / math.sqrt(v_NLD.shape[-1])
    logit = logit.masked_fill(~mask, -torch.inf)
    out_NQD = logit.softmax(-1) @ v_NLD.to(dtype)
    return out_NQD.transpose(0, 1).to(q_QNW.dtype), logit.logsumexp(-1).T


def _make_flash(tile: int) -> _Attend:
    run = _make_flash_run(tile)

    def attend(
        q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = run(q_QNW, k_NLW, v_NLD, index_NIJ, {"return_lse": with_lse})
        return out[0], lse[0].T if with_lse else None

    return attend


def _make_flash_into(tile: int) -> AttendInto:
    run = _make_flash_run(tile)

    def attend_into(
        q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, into: tuple[Tensor, Tensor]
    ) -> None:
        out_QND, lse_QN = into
        run(q_QNW, k_NLW, v_NLD, index_NIJ, {"return_lse": True, "out": out_QND[None], "lse": lse_QN.T[None]})

    return attend_into


def _make_flash_run(tile: int) -> Callable[[Tensor, Tensor, Tensor, Tensor, dict[str, Any]], Any]:
    """With more arguments; out_BQND and lse_BNQ."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    fixed: dict[torch.Size, tuple[Tensor, Tensor, Tensor]] = {}

    def run(q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, more: dict[str, Any]) -> Any:
        if index_NIJ.shape not in fixed:
            none = index_NIJ.new_zeros((1, *index_NIJ.shape[:2]))
            fixed[index_NIJ.shape] = none, none[..., None], torch.full_like(none, index_NIJ.shape[2])
        none, nothing, count = fixed[index_NIJ.shape]
        lists = BlockSparseTensorsTorch(
            mask_block_cnt=none,
            mask_block_idx=nothing,
            full_block_cnt=count,
            full_block_idx=index_NIJ[None],
            block_size=(tile, tile),
        )
        k, v = k_NLW.transpose(0, 1)[None], v_NLD.transpose(0, 1)[None]
        scale = v_NLD.shape[-1] ** -0.5
        return _flash_attn_fwd(
            q_QNW[None], k, v, softmax_scale=scale, num_splits=1, block_sparse_tensors=lists, **more
        )[:2]

    return run


def _is_hopper() -> bool:
    """Where the kernel made for such tables was measured: 1.16 ms where the general one takes 1.72."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def _make_hopper(tile: int) -> _Attend:
    """Its steps are too large for channels of four bytes, which go the general way."""
    from workers.kernels.triton_listed import HOPPER, make_triton_listed, make_triton_listed_lse

    narrow, narrow_lse, wide = (
        make_triton_listed(tile, HOPPER),
        make_triton_listed_lse(tile, HOPPER),
        _make_triton(tile),
    )

    def attend(
        q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        if q_QNW.dtype.itemsize != 2:
            return wide(q_QNW, k_NLW, v_NLD, index_NIJ, with_lse)
        if with_lse:
            return narrow_lse(q_QNW, k_NLW, v_NLD, index_NIJ)
        return narrow(q_QNW, k_NLW, v_NLD, index_NIJ), None

    return attend


def _make_triton(tile: int) -> _Attend:
    import triton

    from workers.kernels.triton_bias import attend_rows

    def attend(q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        num_queries, heads = q_QNW.shape[:2]
        num_keys, head_dim = v_NLD.shape[1:]
        mass = k_NLW[..., head_dim : head_dim + 2].float().sum(-1) / math.sqrt(head_dim)
        count = torch.full(index_NIJ.shape[:2], index_NIJ.shape[2], dtype=torch.int32, device=k_NLW.device)
        out = torch.empty((num_queries, heads, head_dim), dtype=q_QNW.dtype, device=q_QNW.device)
        lse = torch.empty((num_queries, heads), dtype=torch.float32, device=q_QNW.device)
        block_m = min(128, max(16, triton.next_power_of_2(tile)))
        attend_rows[(index_NIJ.shape[1] * triton.cdiv(tile, block_m), heads)](
            q_QNW, k_NLW, v_NLD, mass, out, lse, index_NIJ, count, lse, lse,
            0, q_QNW.stride(0), q_QNW.stride(1), 0, k_NLW.stride(1), k_NLW.stride(0),
            0, v_NLD.stride(1), v_NLD.stride(0),
            head_dim**-0.5 * math.log2(math.e), heads, num_queries, num_keys, index_NIJ.shape[2],
            tile, tile, triton.cdiv(tile, block_m), head_dim,
            HAS_TILES=True, HAS_MASS=True, HAS_QUERY_ORDER=False, HAS_KEY_ORDER=False,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_M=block_m,
            BLOCK_N=min(64, max(16, triton.next_power_of_2(tile))),
            PRECISION="ieee" if q_QNW.dtype == torch.float32 else "tf32",
            num_warps=8 if block_m == 128 else 4, num_stages=2,
        )  # fmt: skip
        return out, lse

    return attend
