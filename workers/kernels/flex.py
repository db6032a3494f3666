"""torch's FlexAttention: log m as a score function, tiles as a block mask.

On CUDA it is compiled (the first call takes a while, and a new number of keys may compile again) and tiles must be
multiples of 128 x 128; others are gathered. On a CPU it runs uncompiled, which writes out all logits: for tests only.
Tested on an H200 (tests/gpu/test_flex.py); its speed there was not measured.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from workers.contracts import KernelPart, KeyValues, TiledKeys, Tiles
from workers.kernels.lse import attend_parts
from workers.kernels.tile_lists import list_tiles, split_tiles
from workers.kernels.tiled import GroupMemory, attend_tiled

_COMPILED_TILE = 128
"""The generated kernel wants its own tiles to divide ours."""

_Flex = Callable[..., Any]


class FlexKernel:
    """FlexAttention.

    Args:
        compiled: Generate a kernel; else the plain form.
    """

    def __init__(self, *, compiled: bool) -> None:
        self._compiled = compiled
        self._flex: _Flex = torch.compile(flex_attention) if compiled else _attend_eager
        self._masks: weakref.WeakKeyDictionary[Tiles, BlockMask] = weakref.WeakKeyDictionary()
        self._groups = GroupMemory()

    @property
    def version(self) -> str:
        return f"flex (torch {torch.__version__}{', compiled' if self._compiled else ''})"

    def attend(self, q_BQND: Tensor, parts: tuple[KernelPart, ...]) -> tuple[Tensor, Tensor]:
        return attend_parts(self._attend_dense, self._attend_tiled, q_BQND, parts)

    def _attend_dense(self, q_BQND: Tensor, keys: KeyValues) -> tuple[Tensor, Tensor]:
        q, k, v = (x.to(q_BQND.dtype).transpose(1, 2) for x in (q_BQND, keys.k_BKND, keys.v_BKND))
        out, lse_BNQ = self._call(q, k, v, keys.log_mass_BNK, None)
        return out.transpose(1, 2), lse_BNQ.transpose(1, 2)

    def _attend_tiled(self, q_BQND: Tensor, part: TiledKeys) -> tuple[Tensor, Tensor]:
        keys, tiles = part
        if self._compiled and (tiles.query_tile % _COMPILED_TILE or tiles.key_tile % _COMPILED_TILE):
            return attend_tiled(q_BQND, part, self._attend_dense, self._groups)
        if tiles not in self._masks:
            self._masks[tiles] = _block_mask(tiles, q_BQND.shape[1], keys.num_tokens, self._compiled)
        q = _in_order(q_BQND, tiles.query_order_BNQ)
        k, v = (_in_order(x.to(q.dtype), tiles.key_order_BNK) for x in (keys.k_BKND, keys.v_BKND))
        mass = keys.log_mass_BNK
        if mass is not None and tiles.key_order_BNK is not None:
            mass = mass.gather(2, tiles.key_order_BNK)
        out, lse_BNQ = self._call(q, k, v, mass, self._masks[tiles])
        if tiles.query_order_BNQ is not None:
            back_BNQ = tiles.query_order_BNQ.argsort(-1)
            out = out.gather(2, back_BNQ[..., None].expand_as(out))
            lse_BNQ = lse_BNQ.gather(2, back_BNQ)
        return out.transpose(1, 2), lse_BNQ.transpose(1, 2)

    def _call(
        self, q_BNQD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, mass_BNK: Tensor | None, mask: BlockMask | None
    ) -> tuple[Tensor, Tensor]:
        def add_mass(score: Tensor, batch: Tensor, head: Tensor, _: Tensor, key: Tensor) -> Tensor:
            assert mass_BNK is not None
            return score + mass_BNK[batch, head, key]

        score_mod = None if mass_BNK is None else add_mass
        out, aux = self._flex(
            q_BNQD, k_BNKD, v_BNKD, score_mod=score_mod, block_mask=mask, return_aux=AuxRequest(lse=True)
        )
        lse_BNQ: Tensor = aux.lse
        return out, lse_BNQ if q_BNQD.dtype == torch.float64 else lse_BNQ.float()


def _block_mask(tiles: Tiles, num_queries: int, num_keys: int, compiled: bool) -> BlockMask:
    """All tiles are whole: the function is read by the plain form alone, which does not read the lists."""
    query_tile, key_tile, visible = tiles.query_tile, tiles.key_tile, tiles.visible_BNIJ
    if compiled:
        smaller = split_tiles(tiles, _COMPILED_TILE, _COMPILED_TILE)
        assert smaller is not None, "asked only for multiples"
        query_tile = key_tile = _COMPILED_TILE
        visible = smaller[:, :, : -(-num_queries // query_tile), : -(-num_keys // key_tile)]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[batch, head, query // query_tile, key // key_tile]

    lists = list_tiles(visible)
    none = torch.zeros_like(lists.count_BNI)
    return BlockMask.from_kv_blocks(
        none,
        lists.index_BNIJ,
        lists.count_BNI,
        lists.index_BNIJ,
        BLOCK_SIZE=(query_tile, key_tile),
        mask_mod=sees,
        seq_lengths=(num_queries, num_keys),
    )


def _attend_eager(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **kwargs)


def _in_order(x_BQND: Tensor, order_BNQ: Tensor | None) -> Tensor:
    x_BNQD = x_BQND.transpose(1, 2)
    return x_BNQD if order_BNQ is None else x_BNQD.gather(2, order_BNQ[..., None].expand_as(x_BNQD))
