"""Tiles for kernels that read, for each query tile, the list of whole key tiles it sees, and know no bias.

Queries and keys are put in order here, keys are filled up to whole tiles with ones that do not exist, and log m
travels in more channels. What was made of the keys is kept for the steps of a chunk where there is room; a cache that
stands in the order of its tiles, in whole ones, and knows no log m is handed on as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import TiledKeys, Tiles
from workers.kernels.mass import clear_rows_without_keys, widen
from workers.kernels.memory import KeyMemory
from workers.kernels.tile_lists import TileList, list_tiles, split_tiles

AttendListed = Callable[[Tensor, Tensor, Tensor, float, TileList], tuple[Tensor, Tensor]]
"""(q_BQND, k_BKND, v_BKND, scale, lists) -> out_BQND, lse_BNQ. K is a whole number of tiles, Q need not be."""


class _Lists(NamedTuple):
    tiles: TileList
    empty_BNI: Tensor


class TileSkipper:
    """Runs a kernel that skips square tiles of one size.

    Args:
        attend_listed: The kernel.
        tile: Length of its tiles; `Tiles` of a multiple of it are taken.
    """

    def __init__(self, attend_listed: AttendListed, tile: int) -> None:
        self._attend_listed, self._tile = attend_listed, tile
        self._lists: weakref.WeakKeyDictionary[Tiles, _Lists] = weakref.WeakKeyDictionary()
        self._prepared: KeyMemory[tuple[Tensor, Tensor]] = KeyMemory()

    def takes(self, tiles: Tiles) -> bool:
        return tiles.query_tile % self._tile == 0 and tiles.key_tile % self._tile == 0

    def attend(self, q_BQND: Tensor, part: TiledKeys) -> tuple[Tensor, Tensor]:
        """out_BQND and lse_BQN over the tiles that each query sees."""
        keys, tiles = part
        head_dim, num_queries = q_BQND.shape[-1], q_BQND.shape[1]
        if tiles.query_order_BNQ is not None:
            order_BQN1 = tiles.query_order_BNQ.transpose(1, 2)[..., None]
            q_BQND = q_BQND.gather(1, order_BQN1.expand_as(q_BQND))
        k, v = self._prepare(part, q_BQND.dtype)
        widened = k.shape[-1] - head_dim
        if widened:
            q_wide = F.pad(q_BQND, (0, widened))
            q_wide[..., head_dim : head_dim + 2] = 1.0
        else:
            q_wide = q_BQND
        lists = self._list(tiles, num_queries, keys.num_tokens)
        out, lse_BNQ = self._attend_listed(q_wide.contiguous(), k, v, head_dim**-0.5, lists.tiles)
        out, lse_BQN = clear_rows_without_keys(out, lse_BNQ.transpose(1, 2), head_dim**-0.5)
        empty_BQN = lists.empty_BNI.repeat_interleave(self._tile, 2)[..., :num_queries].transpose(1, 2)
        out, lse_BQN = out.masked_fill(empty_BQN[..., None], 0.0), lse_BQN.masked_fill(empty_BQN, -torch.inf)
        if tiles.query_order_BNQ is not None:
            back_BQN = tiles.query_order_BNQ.argsort(-1).transpose(1, 2)
            out = out.gather(1, back_BQN[..., None].expand_as(out))
            lse_BQN = lse_BQN.gather(1, back_BQN)
        return out, lse_BQN

    def _prepare(self, part: TiledKeys, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys (with their channels) and values in order and in whole tiles; kept for the steps of a chunk."""
        keys, tiles = part
        kept = self._prepared.find(keys, tiles, dtype)
        if kept is not None:
            return kept
        k, v, mass = keys.k_BKND.to(dtype), keys.v_BKND.to(dtype), keys.log_mass_BNK
        if tiles.key_order_BNK is not None:
            order_BKN1 = tiles.key_order_BNK.transpose(1, 2)[..., None]
            k, v = (x.gather(1, order_BKN1.expand_as(x)) for x in (k, v))
            mass = None if mass is None else mass.gather(2, tiles.key_order_BNK)
        missing = -keys.num_tokens % self._tile
        if missing and mass is None:
            mass = k.new_zeros((k.shape[0], k.shape[2], k.shape[1]), dtype=torch.float32)
        if missing and mass is not None:
            k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (k, v))
            mass = F.pad(mass, (0, missing), value=-torch.inf)
        if mass is not None:
            k = widen(k[:, :0], k, mass).k_BKND
        prepared = k.contiguous(), v.contiguous()
        if prepared[0].data_ptr() != keys.k_BKND.data_ptr():  # nothing is kept that costs nothing to find again
            num_bytes = prepared[0].nbytes + prepared[1].nbytes
            self._prepared.keep(keys, tiles, dtype, prepared, num_bytes=num_bytes)
        return prepared

    def _list(self, tiles: Tiles, num_queries: int, num_keys: int) -> _Lists:
        if tiles not in self._lists:
            visible = split_tiles(tiles, self._tile, self._tile)
            assert visible is not None, "asked only for multiples"
            made = list_tiles(visible[:, :, : -(-num_queries // self._tile), : -(-num_keys // self._tile)])
            # A row of no tile is given one, and its result is cleared: how the package treats it is not documented.
            self._lists[tiles] = _Lists(made._replace(count_BNI=made.count_BNI.clamp(min=1)), made.count_BNI == 0)
        return self._lists[tiles]
