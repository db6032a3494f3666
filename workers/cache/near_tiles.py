"""Where a key looks for its group: among the newest slots, and in the tiles of older ones that resemble its own.

Slots are in the order of time, so a tile of them is a piece of a picture, and what comes back after a while is found by
the mean of its tile. To look through a long table costs more than the attention of a chunk; this costs the same however
long it is, but for the means. A table that is as short as what would be looked at is searched as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Nearest = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(queries_BNQD, keys_BNCD) -> index and cosine of each query's nearest key, [B, N, Q]; empty slots are zero keys."""

_TILE = 64
"""Slots that are looked through together, by as many keys at once."""
_NUM_TILES = 8
"""Looked at for each tile of queries."""
_NEWEST_TILES = 16
"""Of slots: the keys that were absorbed last are the likeliest partners."""


def nearest_in_tiles(nearest: Nearest, query_BNQD: Tensor, key_BNCD: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` among some of the keys.

    Args:
        nearest: Compares.
        query_BNQD: In the order of time and place.
        key_BNCD: In the order of their slots.
    """
    num_old = (key_BNCD.shape[2] // _TILE - _NEWEST_TILES) * _TILE
    if num_old <= _NUM_TILES * _TILE:
        return nearest(query_BNQD, key_BNCD)
    index, cosine = nearest(query_BNQD, key_BNCD[:, :, num_old:])
    far_index, far_cosine = _in_old_tiles(nearest, query_BNQD, key_BNCD[:, :, :num_old])
    return torch.where(far_cosine > cosine, far_index, index + num_old), torch.maximum(far_cosine, cosine)


def _in_old_tiles(nearest: Nearest, query_BNQD: Tensor, key_BNCD: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, num, dim = query_BNQD.shape
    mean_BNJD = F.normalize(key_BNCD.unflatten(2, (-1, _TILE)).mean(3), dim=-1)
    query_BNITD = F.pad(query_BNQD, (0, 0, 0, -num % _TILE)).unflatten(2, (-1, _TILE))
    chosen_BNIn = (query_BNITD.mean(3) @ mean_BNJD.mT).topk(_NUM_TILES, dim=-1).indices
    slot_BNIL = (chosen_BNIn[..., None] * _TILE + torch.arange(_TILE, device=key_BNCD.device)).flatten(3)
    flat = slot_BNIL.flatten(2)
    keys = key_BNCD.gather(2, flat[..., None].expand(*flat.shape, dim)).view(batch * heads, -1, slot_BNIL.shape[3], dim)
    index, cosine = nearest(query_BNITD.flatten(0, 1), keys)
    found = slot_BNIL.flatten(0, 1).gather(2, index)
    return found.view(batch, heads, -1)[..., :num], cosine.view(batch, heads, -1)[..., :num]
