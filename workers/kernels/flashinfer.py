"""FlashInfer: dense attention, and tiles in BSR form planned once for each `Tiles` and run in every step.

Its kernels know no log m, so caches that merge keys are for other kernels. Heads (and the batch) stand as rows of one
large block-diagonal matrix, because a BSR pattern is common to all heads of a call. Tiles that do not divide the keys
go through the kernel for tiles of any size, which plans and runs more slowly.
Only prototypes of these calls have run on a GPU, this file has not: tests/gpu/test_flashinfer.py does it.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import flashinfer
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import Attended, KernelPart, KeyValues, TiledKeys, Tiles
from workers.kernels.lse import attend_parts

_WORKSPACE_BYTES = 128 * 2**20
"""What the library recommends; shared by all plans, since calls run one after the other."""


class _Plan(NamedTuple):
    wrapper: Any
    is_bsr: bool
    empty_RI: Tensor
    """Query tiles of each batch x head that see nothing: what the library returns there is not relied on."""


class FlashInferKernel:
    """FlashInfer with its kernels for this GPU.

    Args:
        backend: `fa3` on Hopper, else `fa2`.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._plans: weakref.WeakKeyDictionary[Tiles, _Plan] = weakref.WeakKeyDictionary()
        self._workspace: Tensor | None = None

    @property
    def version(self) -> str:
        return f"flashinfer ({flashinfer.__version__} {self._backend}, torch {torch.__version__})"

    def attend(self, q_BQND: Tensor, parts: tuple[KernelPart, ...]) -> tuple[Tensor, Tensor]:
        for part in parts:
            keys = part.keys if isinstance(part, TiledKeys) else part
            assert isinstance(keys, Attended) or keys.log_mass_BNK is None, "select_kernel asks for log m"
        return attend_parts(self._attend_dense, self._attend_tiled, q_BQND, parts)

    def _attend_dense(self, q_BQND: Tensor, keys: KeyValues) -> tuple[Tensor, Tensor]:
        batch, num_queries, heads, head_dim = q_BQND.shape
        # The batch stands among the heads; for a batch of one these are views.
        q, k, v = (
            x.to(q_BQND.dtype).transpose(0, 1).reshape(x.shape[1], batch * heads, head_dim)
            for x in (q_BQND, keys.k_BKND, keys.v_BKND)
        )
        out, lse = flashinfer.single_prefill_with_kv_cache(
            q, k, v, causal=False, sm_scale=head_dim**-0.5, backend=self._backend, return_lse=True
        )
        out_BQND = out.view(num_queries, batch, heads, head_dim).transpose(0, 1)
        return out_BQND, _natural(lse).view(num_queries, batch, heads).transpose(0, 1)

    def _attend_tiled(self, q_BQND: Tensor, part: TiledKeys) -> tuple[Tensor, Tensor]:
        keys, tiles = part
        batch, num_queries, heads, head_dim = q_BQND.shape
        if tiles not in self._plans:
            self._plans[tiles] = self._plan(tiles, q_BQND, keys.num_tokens)
        wrapper, is_bsr, empty_RI = self._plans[tiles]
        q_RQD = _in_order(q_BQND, tiles.query_order_BNQ)
        k_RKD, v_RKD = (_in_order(x.to(q_BQND.dtype), tiles.key_order_BNK) for x in (keys.k_BKND, keys.v_BKND))
        if is_bsr:
            q_RQD = F.pad(q_RQD, (0, 0, 0, -num_queries % tiles.query_tile))
            one_head = (x.reshape(-1, 1, head_dim) for x in (q_RQD, k_RKD, v_RKD))
            out, lse = wrapper.run(*one_head, return_lse=True)
        else:
            out, lse = wrapper.run(q_RQD, k_RKD, v_RKD, return_lse=True)
        out_BNQD = out.reshape(batch, heads, -1, head_dim)[:, :, :num_queries]
        lse_BNQ = _natural(lse).reshape(batch, heads, -1)[..., :num_queries]
        empty_RQ = empty_RI.repeat_interleave(tiles.query_tile, 1)[:, :num_queries]
        empty_BNQ = empty_RQ.view(batch, heads, num_queries)
        out_BNQD = out_BNQD.masked_fill(empty_BNQ[..., None], 0.0)
        lse_BNQ = lse_BNQ.masked_fill(empty_BNQ, -torch.inf)
        if tiles.query_order_BNQ is not None:
            back_BNQ = tiles.query_order_BNQ.argsort(-1)
            out_BNQD = out_BNQD.gather(2, back_BNQ[..., None].expand_as(out_BNQD))
            lse_BNQ = lse_BNQ.gather(2, back_BNQ)
        return out_BNQD.transpose(1, 2), lse_BNQ.transpose(1, 2)

    def _plan(self, tiles: Tiles, q_BQND: Tensor, num_keys: int) -> _Plan:
        """Waits for the device."""
        if self._workspace is None:
            self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q_BQND.device)
        visible_RIJ = tiles.visible_BNIJ.flatten(0, 1)
        num_rows, head_dim, dtype = visible_RIJ.shape[0], q_BQND.shape[-1], q_BQND.dtype
        empty_RI = ~visible_RIJ.any(-1)
        wrapper: Any
        if num_keys % tiles.key_tile == 0:
            wrapper = flashinfer.BlockSparseAttentionWrapper(self._workspace, backend=self._backend)
            indptr, indices = _bsr(visible_RIJ)
            size = (visible_RIJ.shape[:2].numel() * tiles.query_tile, num_rows * num_keys)
            shape = (*size, tiles.query_tile, tiles.key_tile, 1, 1, head_dim)
            wrapper.plan(indptr, indices, *shape, sm_scale=head_dim**-0.5, q_data_type=dtype, o_data_type=dtype)
            return _Plan(wrapper, True, empty_RI)
        wrapper = flashinfer.VariableBlockSparseAttentionWrapper(self._workspace, backend=self._backend)
        lengths = (
            _lengths(num, tile, visible_RIJ)
            for num, tile in ((q_BQND.shape[1], tiles.query_tile), (num_keys, tiles.key_tile))
        )
        wrapper.plan(visible_RIJ, *lengths, num_rows, num_rows, head_dim, sm_scale=head_dim**-0.5, q_data_type=dtype)
        return _Plan(wrapper, False, empty_RI)


def _bsr(visible_RIJ: Tensor) -> tuple[Tensor, Tensor]:
    """Row starts and columns of the block-diagonal matrix whose blocks are the heads; int32."""
    counts = visible_RIJ.flatten(0, 1).sum(-1)
    indptr = F.pad(counts.cumsum(0), (1, 0))
    row, _, column = visible_RIJ.nonzero(as_tuple=True)
    return indptr.int(), (row * visible_RIJ.shape[2] + column).int()


def _lengths(num: int, tile: int, visible_RIJ: Tensor) -> Tensor:
    """Length of each tile, for each head: all full but perhaps the last."""
    start = torch.arange(0, num, tile, device=visible_RIJ.device)
    return (num - start).clamp(max=tile).int().expand(visible_RIJ.shape[0], -1).contiguous()


def _in_order(x_BQND: Tensor, order_BNQ: Tensor | None) -> Tensor:
    """x_RQD with batch and heads as rows; a cache that stands in the order of its tiles spares the second copy."""
    x_BNQD = x_BQND.transpose(1, 2)
    if order_BNQ is not None:
        x_BNQD = x_BNQD.gather(2, order_BNQ[..., None].expand_as(x_BNQD))
    return x_BNQD.reshape(-1, *x_BNQD.shape[2:])


def _natural(lse: Tensor) -> Tensor:
    """The library's log-sum-exp is to base 2."""
    return lse * math.log(2.0)
