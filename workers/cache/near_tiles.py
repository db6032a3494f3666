"""Where a key looks for its group: among the newest slots, and in the tiles of older ones that resemble its own.

Slots are in the order of time, so a tile of them is a piece of a picture, and what comes back after a while is found by
the mean of its tile. To look through a long table costs more than the attention of a chunk; this costs the same however
long it is, but for the means. A table that is as short as what would be looked at is searched as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Nearest = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(queries_BNQD, keys_BNCD) -> index and cosine of each query's nearest key, [B, N, Q]; empty slots are zero keys."""

TILE = 64
"""Slots that are looked through together, by as many keys at once."""
_NUM_TILES = 8
"""Looked at for each tile of queries."""
_NEWEST_TILES = 16
"""Of slots: the keys that were absorbed last are the likeliest partners."""
_MEAN_DTYPE = torch.bfloat16
"""Of mean keys: they only say where to look."""


def nearest_in_tiles(nearest: Nearest, query_BNQD: Tensor, key_BNCD: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` among some of the keys.

    Args:
        nearest: Compares.
        query_BNQD: In the order of time and place.
        key_BNCD: In the order of their slots.
    """
    num_old = (key_BNCD.shape[2] // TILE - _NEWEST_TILES) * TILE
    if num_old <= _NUM_TILES * TILE:
        return nearest(query_BNQD, key_BNCD)
    index, cosine = nearest(query_BNQD, key_BNCD[:, :, num_old:])
    old_BNCD = key_BNCD[:, :, :num_old]

    def gather(slot_BNR: Tensor) -> Tensor:
        return old_BNCD.gather(2, slot_BNR[..., None].expand(*slot_BNR.shape, old_BNCD.shape[-1]))

    far_index, far_cosine = _in_old_tiles(nearest, query_BNQD, _mean_directions(old_BNCD), gather)
    return torch.where(far_cosine > cosine, far_index, index + num_old), torch.maximum(far_cosine, cosine)


class KeyStore(Protocol):
    """Keys that lie in slots and are unpacked as far as they are looked at."""

    @property
    def slots_at_once(self) -> int:
        """How many slots of all heads to go through at a time."""
        ...

    def read_run(self, start: int, stop: int) -> Tensor:
        """Slots from `start` up to `stop`, [B, N, K, D]."""
        ...

    def gather(self, slot_BNR: Tensor) -> Tensor:
        """The vectors of these slots, [B, N, R, D]."""
        ...


class TileMeans:
    """Directions of the mean keys of tiles that are full: kept, since a table mostly grows at its end.

    Args:
        shape_BNCD: Batch, heads, slots and channels of the table.
        device: Where it lies.
    """

    def __init__(self, shape_BNCD: tuple[int, int, int, int], device: torch.device) -> None:
        batch, heads, slots, dim = shape_BNCD
        self._mean_BNJD = torch.zeros((batch, heads, slots // TILE, dim), dtype=_MEAN_DTYPE, device=device)
        self._num_known = 0

    @staticmethod
    def bytes_per_tile(dim: int) -> int:
        """Of one head."""
        return dim * _MEAN_DTYPE.itemsize

    @property
    def num_bytes(self) -> int:
        """Reserved."""
        return self._mean_BNJD.nbytes

    def forget(self, slot: int = 0) -> None:
        """Keys from this slot on have changed."""
        self._num_known = min(self._num_known, slot // TILE)

    def read(self, store: KeyStore, num: int) -> Tensor:
        """Of the first `num` tiles, mean_BNJD; none of their slots is free in any head, or will be `forget` first."""
        step = max(1, store.slots_at_once // TILE)
        for first in range(self._num_known, num, step):
            stop = min(num, first + step)
            self._mean_BNJD[:, :, first:stop] = _mean_directions(store.read_run(first * TILE, stop * TILE))
        self._num_known = max(self._num_known, num)
        return self._mean_BNJD[:, :, :num]


def nearest_in_store(
    nearest: Nearest, query_BNQD: Tensor, store: KeyStore, num_slots: int, means: TileMeans
) -> tuple[Tensor, Tensor]:
    """`nearest_in_tiles` of the first slots of a store, of which it unpacks only what is looked at."""
    num_old = (num_slots // TILE - _NEWEST_TILES) * TILE
    if num_old <= _NUM_TILES * TILE:
        return nearest(query_BNQD, store.read_run(0, num_slots))
    index, cosine = nearest(query_BNQD, store.read_run(num_old, num_slots))
    mean_BNJD = means.read(store, num_old // TILE)
    far_index, far_cosine = _in_old_tiles(nearest, query_BNQD, mean_BNJD, store.gather)
    return torch.where(far_cosine > cosine, far_index, index + num_old), torch.maximum(far_cosine, cosine)


def _mean_directions(key_BNCD: Tensor) -> Tensor:
    return F.normalize(key_BNCD.unflatten(2, (-1, TILE)).mean(3), dim=-1).to(_MEAN_DTYPE)


def _in_old_tiles(
    nearest: Nearest, query_BNQD: Tensor, mean_BNJD: Tensor, gather: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    batch, heads, num, dim = query_BNQD.shape
    query_BNITD = F.pad(query_BNQD, (0, 0, 0, -num % TILE)).unflatten(2, (-1, TILE))
    chosen_BNIn = (query_BNITD.mean(3) @ mean_BNJD.to(query_BNITD.dtype).mT).topk(_NUM_TILES, dim=-1).indices
    slot_BNIL = (chosen_BNIn[..., None] * TILE + torch.arange(TILE, device=mean_BNJD.device)).flatten(3)
    keys = gather(slot_BNIL.flatten(2)).view(batch * heads, -1, slot_BNIL.shape[3], dim)
    index, cosine = nearest(query_BNITD.flatten(0, 1), keys)
    found = slot_BNIL.flatten(0, 1).gather(2, index)
    return found.view(batch, heads, -1)[..., :num], cosine.view(batch, heads, -1)[..., :num]
