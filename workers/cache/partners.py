"""Whom a key would join: the nearest older key by cosine before RoPE, of those that are looked at.

`all` compares every pair, which is the reference. Otherwise a key looks at all keys of the latent frame before its own,
and at those of a few tiles of the history whose mean is nearest to the mean of its own tile: what comes back after
a while is found there. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.cache.unrotated import TurnBack, take_rows
from workers.search.nearest_rows import NearestRows, nearest_rows

Found = tuple[Tensor, Tensor]
"""Slot of the nearest older key, int64 [N, T], and its cosine, float32; -inf where there is none."""


@dataclass(frozen=True, eq=False)
class History:
    """The history of one layer, its newest chunk included. Views."""

    k_NLW: Tensor
    """The whole row of slots."""
    start: int
    """Where the history begins in it."""
    position_NC3: Tensor
    m_NC: Tensor
    """0 where there is no key."""
    mean_NJD: Tensor
    """Mean of the unit keys before RoPE, tile by tile."""

    @property
    def keys(self) -> Tensor:
        """[N, C, W]."""
        return self.k_NLW[:, self.start : self.start + self.m_NC.shape[1]]


@dataclass(frozen=True)
class Look:
    """Where a key looks for its partner."""

    frame_tokens: int
    """Of a latent frame."""
    num_tiles: int | None
    """Tiles to look in beside the latent frame before; None compares all pairs."""
    tile: int
    nearest: NearestRows = nearest_rows


def find_partners(history: History, turn_back: TurnBack, new: slice, look: Look) -> Found:
    """Partners of the keys in the slots `new`, which are the newest.

    Args:
        history: Its means know the new keys.
        turn_back: RoPE of the model.
        new: Slots, a whole number of latent frames in the order of time.
        look: Where to look, and how.
    """
    if look.num_tiles is None:
        return _among_all(history, turn_back, new, look.frame_tokens)
    before = max(0, new.start - look.frame_tokens)
    unit = turn_back.unit(history.keys[:, before : new.stop], history.position_NC3[:, before : new.stop])
    slot, cosine = _in_frame_before(unit, history.m_NC[:, before : new.stop], before, new.start, look)
    if look.num_tiles == 0:
        return slot, cosine
    far_slot, far_cosine = _in_near_tiles(history, turn_back, unit[:, new.start - before :], new.start, look)
    return torch.where(far_cosine > cosine, far_slot, slot), torch.maximum(far_cosine, cosine)


def _in_frame_before(unit_NKD: Tensor, m_NK: Tensor, first: int, start: int, look: Look) -> Found:
    """Among all keys of the latent frame before. Unit keys begin with slot `first`, new ones with `start`.

    The latent frame before a chunk always stands whole at the end of the history: its keys have no newer one to join.
    """
    heads, num, dim = unit_NKD.shape
    frames = unit_NKD.view(heads, num // look.frame_tokens, look.frame_tokens, dim)
    there = (m_NK > 0).view(heads, -1, look.frame_tokens)[:, :-1]
    index, best = look.nearest(frames[:, 1:].flatten(0, 1), frames[:, :-1].flatten(0, 1), there.flatten(0, 1))
    index, best = (x.view(heads, -1, look.frame_tokens) for x in (index, best))
    begin_F1 = first + torch.arange(frames.shape[1] - 1, device=unit_NKD.device)[:, None] * look.frame_tokens
    slot, best = (index + begin_F1).flatten(1), best.flatten(1)
    missing = num - slot.shape[1] - (start - first)
    if missing:  # nothing is older than the very first latent frame
        slot = torch.cat((slot.new_zeros(heads, missing), slot), 1)
        best = torch.cat((best.new_full((heads, missing), -torch.inf), best), 1)
    return slot, best


def _in_near_tiles(history: History, turn_back: TurnBack, unit_NTD: Tensor, start: int, look: Look) -> Found:
    """In the tiles whose mean key is nearest to that of the tile in which the new key is."""
    assert look.num_tiles is not None
    (heads, num, dim), tile = unit_NTD.shape, look.tile
    first, skip = start // tile, start % tile
    queries = torch.nn.functional.pad(unit_NTD, (0, 0, skip, -(skip + num) % tile)).view(heads, -1, tile, dim)
    score_NIJ = history.mean_NJD[:, first : first + queries.shape[1]] @ history.mean_NJD.mT
    score_NIJ = score_NIJ[..., : max(look.num_tiles, first)]  # whole tiles of older keys
    chosen_NIn = score_NIJ.topk(min(look.num_tiles, score_NIJ.shape[-1]), -1).indices
    slot = (chosen_NIn[..., None] * tile + torch.arange(tile, device=unit_NTD.device)).flatten(1)
    keys = turn_back.unit(take_rows(history.k_NLW, slot, history.start), take_rows(history.position_NC3, slot))
    there = (history.m_NC.gather(1, slot) > 0) & (slot < start)
    sets = heads * queries.shape[1]
    index, best = look.nearest(queries.flatten(0, 1), keys.view(sets, -1, dim), there.view(sets, -1))
    found = slot.view(sets, -1).gather(1, index).view(heads, -1)
    return found[:, skip : skip + num], best.view(heads, -1)[:, skip : skip + num]


def _among_all(history: History, turn_back: TurnBack, new: slice, frame_tokens: int) -> Found:
    unit = turn_back.unit(history.keys, history.position_NC3)
    num = new.stop - new.start
    device = unit.device
    frame_start_T = new.start + torch.arange(num, device=device) // frame_tokens * frame_tokens
    is_older_TC = torch.arange(unit.shape[1], device=device) < frame_start_T[:, None]
    there = is_older_TC & (history.m_NC > 0)[:, None]
    cosine = (unit[:, new] @ unit.mT).float().masked_fill(~there, -torch.inf)
    best, index = cosine.max(-1)
    return index, best
