"""Who merges with whom in a full table, by kernels: links that are chosen, followed to where they end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workers.cache.shrink import Room
from workers.cache.triton_links import choose_links, follow
from workers.cache.triton_pairs import find_cosines, find_distances
from workers.cache.triton_ranks import running_sum
from workers.cache.triton_rows import StoredHistory
from workers.cache.unrotated import TurnBack


class Families(NamedTuple):
    """See `shrink.py`; int32 [N, C] but for the last."""

    root: Tensor
    head_of: Tensor
    num_survivors: Tensor
    """In each piece of `PIECE` slots."""


def find_families(of: StoredHistory, turn_back: TurnBack, room: Room, known: Tensor | None) -> Families:
    """By the rule of the room.

    Args:
        of: As it is stored, full.
        turn_back: RoPE of the model.
        room: How it is made.
        known: See `find_distances`.
    """
    if room.rule == "pairs":
        found = find_distances(of, turn_back, known)
        link = choose_links(found, of.m_NC, of.partner_NC, turn_back.head_dim, room.num_merges)
        return Families(*follow(link, of.m_NC, by_mass=True))
    cosine = find_cosines(of.k, of.position_NC3, of.m_NC, of.partner_NC, turn_back)
    return Families(*follow(_join_nearest(cosine, of.partner_NC, room.num_merges), of.m_NC, by_mass=False))


def _join_nearest(cosine: Tensor, partner: Tensor, num_merges: int) -> Tensor:
    """The slot that each slot is linked to, itself where it is not."""
    heads, num = cosine.shape
    own = torch.arange(num, dtype=torch.int32, device=cosine.device).expand(heads, num)
    if num_merges == 0:
        return own.contiguous()
    least = cosine.kthvalue(num - num_merges + 1, dim=-1, keepdim=True).values
    above, equal = cosine > least, cosine == least
    room = num_merges - above.sum(-1, keepdim=True, dtype=torch.int32)
    merged = (above | (equal & (running_sum(equal) <= room))) & ~cosine.isneginf()
    return torch.where(merged, partner, own)
