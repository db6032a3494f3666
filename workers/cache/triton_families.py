"""Who merges with whom in a full table, by kernels: links that are chosen, followed to where they end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workers.cache.partners import History
from workers.cache.shrink import Room
from workers.cache.triton_links import choose_links, follow
from workers.cache.triton_pairs import find_cosines, find_distances
from workers.cache.triton_ranks import running_sum
from workers.cache.unrotated import TurnBack


class Families(NamedTuple):
    """See `shrink.py`; int32 [N, C] but for the last."""

    root: Tensor
    head_of: Tensor
    num_survivors: Tensor
    """In each piece of `PIECE` slots."""


def find_families(
    history: History, records: tuple[Tensor, Tensor, Tensor], turn_back: TurnBack, room: Room, known: Tensor | None
) -> Families:
    """By the rule of the room.

    Args:
        history: Full.
        records: v_NLD in the slots of the keys; m_NC and partner_NC of each slot of the history.
        turn_back: RoPE of the model.
        room: How it is made.
        known: See `find_distances`.
    """
    v, m, partner = records
    if room.rule == "pairs":
        found = find_distances(history, v, partner, turn_back, known)
        link = choose_links(found, m, partner, turn_back.head_dim, room.num_merges)
        return Families(*follow(link, m, by_mass=True))
    link = _join_nearest(find_cosines(history, partner, turn_back), partner, room.num_merges)
    return Families(*follow(link, m, by_mass=False))


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
