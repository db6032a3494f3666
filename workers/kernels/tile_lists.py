"""Tiles as the lists that GPU kernels read: for each query tile, which key tiles it sees."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from workers.contracts import Tiles


class TileList(NamedTuple):
    """Lists of one `Tiles`, int32 and contiguous."""

    index_BNIJ: Tensor
    """The first `count` entries of a row are the tiles seen, in rising order; the rest is to be ignored."""
    count_BNI: Tensor


def list_tiles(visible_BNIJ: Tensor) -> TileList:
    """Nothing waits for the device: a list has room for all tiles."""
    index_BNIJ = visible_BNIJ.int().argsort(dim=-1, descending=True, stable=True)
    return TileList(index_BNIJ.int().contiguous(), visible_BNIJ.sum(-1, dtype=torch.int32).contiguous())


def split_tiles(tiles: Tiles, query_tile: int, key_tile: int) -> Tensor | None:
    """visible_BNIJ in smaller tiles, or None where those do not divide the given ones."""
    if tiles.query_tile % query_tile or tiles.key_tile % key_tile:
        return None
    visible = tiles.visible_BNIJ.repeat_interleave(tiles.query_tile // query_tile, 2)
    return visible.repeat_interleave(tiles.key_tile // key_tile, 3)


class TileLists:
    """Lists made once for each `Tiles`, and dropped with it."""

    def __init__(self) -> None:
        self._lists: weakref.WeakKeyDictionary[Tiles, TileList] = weakref.WeakKeyDictionary()

    def of(self, tiles: Tiles) -> TileList:
        if tiles not in self._lists:
            self._lists[tiles] = list_tiles(tiles.visible_BNIJ)
        return self._lists[tiles]
