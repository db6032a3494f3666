"""Which pairs of a full tile table merge: the rule of `pairs.py`, made of steps that a GPU takes for all slots at once.

Pairs with the least loss merge, and of two links of a chain that follow one another only one at a time: every other
link comes first (`pairs.every_other`, which follows pointers), then the rest. Letting each link go first that loses
less than its neighbours needs no count along the chain, but lost twice as much on the one world that it was tried on.
The heavier key of a pair stands for both, in its own place: a partner need not be an older slot then, but links still
form trees, for merging what a link connects makes no circle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from workers.cache.pairs import every_other
from workers.cache.partners import History
from workers.cache.unrotated import TurnBack

SLOT_BITS = 24
EARLY, NO_LINK = -(1 << 31), (1 << 31) - 1
"""The sign of what comes first, and what comes behind every loss: those are not negative and have 31 bits."""


class Distances(NamedTuple):
    """Of each key of a history from its partner, float32 [N, C]; anything where there is none."""

    of_keys: Tensor
    """Squared, before RoPE."""
    of_values: Tensor
    """Squared."""
    lengths: Tensor
    """Squared length of its own value."""
    num_live: Tensor | None = None
    """Of slots with a key, int32 [N]; None where nobody has counted."""


def find_distances(history: History, v_NCD: Tensor, partner_NC: Tensor, turn_back: TurnBack) -> Distances:
    """The reference; values are those of the slots of the history."""
    partner = partner_NC.long().clamp(min=0)
    inner, own, other = turn_back.products(history.keys, history.position_NC3, None, partner)
    head_N1 = torch.arange(partner.shape[0], device=partner.device)[:, None]
    v = v_NCD.float()
    return Distances(
        (own + other - 2 * inner).clamp(min=0), (v - v[head_N1, partner]).square().sum(-1), v.square().sum(-1)
    )


def pair_loss(found: Distances, m_NC: Tensor, partner_NC: Tensor, head_dim: int) -> Tensor:
    """What merging each key with its partner adds to the squared distances within groups, float32; inf without one.

    Args:
        found: Distances.
        m_NC: How many keys a slot holds; 0 where there is none.
        partner_NC: -1 for none.
        head_dim: Of a key: distances count in logits of a query like it, and those of values in their own length.
    """
    live, m = m_NC > 0, m_NC.float()
    length = (found.lengths * live).sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
    loss = found.of_keys * (1 / (2 * math.sqrt(head_dim)))
    # Equal keys lose nothing, whatever their values (FAST-AR, lemma 5.1).
    loss = torch.where(loss > 0, loss + found.of_values / length.clamp(min=1e-30), loss)
    there = m.gather(1, partner_NC.long().clamp(min=0))
    loss = loss * (m * there / (m + there).clamp(min=1))
    return loss.masked_fill((partner_NC < 0) | ~live, torch.inf)


def choose_links(loss_NC: Tensor, partner_NC: Tensor, num_merges: int) -> Tensor:
    """Let so many keys of each head join their partners: the slot that each slot is linked to, itself where it is not.

    Args:
        loss_NC: float32; inf where there is no link.
        partner_NC: int32; -1 for none.
        num_merges: As many at most.
    Returns:
        int32 [N, C].
    """
    own = torch.arange(loss_NC.shape[1], dtype=torch.int32, device=loss_NC.device).expand_as(loss_NC)
    if num_merges == 0:
        return own.contiguous()
    is_link = ~loss_NC.isinf()
    toward = torch.where(is_link, partner_NC, own)
    is_early = every_other(toward.long())
    # Losses are not negative, so their bits are in their order.
    bits = loss_NC.view(torch.int32) & NO_LINK
    rank = torch.where(is_early | (bits == 0), bits | EARLY, bits).masked_fill(~is_link, NO_LINK)
    last = rank.kthvalue(num_merges, dim=-1, keepdim=True).values
    # Of equal ones the first slot's comes first.
    before, equal = rank < last, rank == last
    room = num_merges - before.sum(-1, keepdim=True)
    chosen = before | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    return torch.where(chosen & is_link, toward, own)


def heaviest(root_NC: Tensor, m_NC: Tensor) -> Tensor:
    """The slot of the heaviest key of each slot's group, of equally heavy ones the last; int64."""
    assert root_NC.shape[1] < 1 << SLOT_BITS
    weight = m_NC.long() << SLOT_BITS | torch.arange(root_NC.shape[1], device=root_NC.device)
    most = torch.zeros_like(weight).scatter_reduce_(1, root_NC, weight, "amax")
    return (most & ((1 << SLOT_BITS) - 1)).gather(1, root_NC)
