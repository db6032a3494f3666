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
    def k_NCW(self) -> Tensor:
        return self.k_NLW[:, self.start : self.start + self.m_NC.shape[1]]


def find_partners(
    history: History, turn_back: TurnBack, new: slice, frame_tokens: int, num_tiles: int | None, tile: int
) -> Found:
    """Partners of the keys in the slots `new`, which are the newest.

    Args:
        history: Means are those of before the new keys.
        turn_back: RoPE of the model.
        new: Slots, a whole number of latent frames in the order of time.
        frame_tokens: Tokens of a latent frame.
        num_tiles: Tiles to look in beside the latent frame before; None compares all pairs.
        tile: Slots of a tile.
    """
    if num_tiles is None:
        return _among_all(history, turn_back, new, frame_tokens)
    before = max(0, new.start - frame_tokens)
    unit = turn_back.unit(history.k_NCW[:, before : new.stop], history.position_NC3[:, before : new.stop])
    slot, cosine = _in_frame_before(unit, history.m_NC[:, before : new.stop], before, new.start, frame_tokens)
    if num_tiles == 0:
        return slot, cosine
    far_slot, far_cosine = _in_near_tiles(history, turn_back, unit[:, new.start - before :], new.start, num_tiles, tile)
    return torch.where(far_cosine > cosine, far_slot, slot), torch.maximum(far_cosine, cosine)


def _in_frame_before(unit_NKD: Tensor, m_NK: Tensor, first: int, start: int, frame_tokens: int) -> Found:
    """Among all keys of the latent frame before; `first` is the slot of the first unit key, `start` of the first new one.

    The latent frame before a chunk always stands whole at the end of the history: its keys have no newer one to join.
    """
    heads, num, dim = unit_NKD.shape
    frames = unit_NKD.view(heads, num // frame_tokens, frame_tokens, dim)
    cosine = (frames[:, 1:] @ frames[:, :-1].mT).float()
    there = m_NK.view(heads, -1, 1, frame_tokens)[:, :-1] > 0
    best, index = cosine.masked_fill(~there, -torch.inf).max(-1)
    begin_F1 = first + torch.arange(frames.shape[1] - 1, device=unit_NKD.device)[:, None] * frame_tokens
    slot, best = (index + begin_F1).flatten(1), best.flatten(1)
    missing = num - slot.shape[1] - (start - first)
    if missing:  # nothing is older than the very first latent frame
        slot = torch.cat((slot.new_zeros(heads, missing), slot), 1)
        best = torch.cat((best.new_full((heads, missing), -torch.inf), best), 1)
    return slot, best


def _in_near_tiles(
    history: History, turn_back: TurnBack, unit_NTD: Tensor, start: int, num_tiles: int, tile: int
) -> Found:
    """In the tiles whose mean key is nearest to that of each tile of new keys."""
    heads, num, dim = unit_NTD.shape
    pad = -num % tile
    queries = torch.nn.functional.pad(unit_NTD, (0, 0, 0, pad)).view(heads, -1, tile, dim)
    mean_NID = queries.float().sum(2)
    score_NIJ = mean_NID @ history.mean_NJD.float().mT
    is_older_J = (torch.arange(score_NIJ.shape[-1], device=unit_NTD.device) + 1) * tile <= start
    score_NIJ = score_NIJ.masked_fill(~is_older_J, -torch.inf)
    chosen_NIn = score_NIJ.topk(min(num_tiles, score_NIJ.shape[-1]), -1).indices
    slot = (chosen_NIn[..., None] * tile + torch.arange(tile, device=unit_NTD.device)).flatten(1)
    keys = turn_back.unit(
        take_rows(history.k_NLW, slot, history.start), take_rows(history.position_NC3, slot)
    )
    there = (take_rows(history.m_NC[..., None], slot)[..., 0] > 0) & (slot < start)
    shape = (heads, queries.shape[1], -1)
    cosine = (queries @ keys.view(*shape, dim).mT).float().masked_fill(~there.view(*shape)[:, :, None], -torch.inf)
    best, index = cosine.max(-1)
    found = slot.view(*shape).gather(2, index)
    return found.flatten(1)[:, :num], best.flatten(1)[:, :num]


def _among_all(history: History, turn_back: TurnBack, new: slice, frame_tokens: int) -> Found:
    unit = turn_back.unit(history.k_NCW, history.position_NC3)
    num = new.stop - new.start
    device = unit.device
    frame_start_T = new.start + torch.arange(num, device=device) // frame_tokens * frame_tokens
    is_older_TC = torch.arange(unit.shape[1], device=device) < frame_start_T[:, None]
    there = is_older_TC & (history.m_NC > 0)[:, None]
    cosine = (unit[:, new] @ unit.mT).float().masked_fill(~there, -torch.inf)
    best, index = cosine.max(-1)
    return index, best
