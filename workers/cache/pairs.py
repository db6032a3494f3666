"""Which key groups a full table merges: those that tell a query nearly the same.

Merging two groups loses m m' / (m + m') d^2, what it adds to the squared distances within groups (Ward, 1963). Distance
is that of keys, in logits of a query like them, and that of values, in their own length; but equal keys lose nothing,
whatever their values (lemma 5.1). The masses keep one group from swallowing a whole track while others stay single.
Each group has at most one partner, an older one, so pairs form chains. Neighbours in a chain are near but its ends are
not, so of two links that follow one another only one merges at a time.

Of a pair the heavier key stands for both (ours; FAST-AR keeps the newest). A key drifts as its thing moves through the
view, so the newest of a long track is far from most of it, and the key that has gathered most is near the middle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Merges(NamedTuple):
    """What becomes of the slots of a table, [B, N, C] of int64 both."""

    root: Tensor
    """Where each slot ends: the oldest slot of its group, itself where nothing merges."""
    keeper: Tensor
    """Whose key stands for the group that it ends in."""


def choose_merges(k_BNCD: Tensor, v_BNCD: Tensor, m_BNC: Tensor, partner_BNC: Tensor, num_BN: Tensor) -> Merges:
    """Let `num_BN` groups of each head join their partners, with the least loss.

    Args:
        k_BNCD, v_BNCD: Keys and values.
        m_BNC: How many keys a group holds; 0 where there is none.
        partner_BNC: An older slot, or -1.
        num_BN: No more than there are partners.
    """
    partner = partner_BNC.long()
    own = torch.arange(partner.shape[-1], device=partner.device).expand_as(partner)
    may = (partner >= 0) & (m_BNC > 0)
    toward = torch.where(may, partner, own)
    loss = merge_loss(k_BNCD, v_BNCD, m_BNC, toward).masked_fill(~may, torch.inf)
    order = loss.argsort(dim=-1, stable=True)
    # Where every other link is not enough the rest comes after them; what loses nothing need not wait.
    late = (~every_other(toward) & (loss > 0)).long() + ~may
    order = order.gather(-1, late.gather(-1, order).argsort(dim=-1, stable=True))
    rank = torch.empty_like(order).scatter_(-1, order, own)
    root = torch.where(rank < num_BN[..., None], toward, own)
    for _ in range(partner.shape[-1].bit_length()):  # a chain halves with each look
        root = root.gather(-1, root)
    # The heaviest; of equal ones the newest, which has the highest slot.
    weight = m_BNC.long() * partner.shape[-1] + own
    heaviest = torch.zeros_like(weight).scatter_reduce(-1, root, weight, "amax")
    return Merges(root, (heaviest % partner.shape[-1]).gather(-1, root))


def merge_loss(k_BNCD: Tensor, v_BNCD: Tensor, m_BNC: Tensor, other_BNC: Tensor) -> Tensor:
    """What merging each group with another one adds to the squared distances within groups, at least float32."""
    squared = _squared_distance(k_BNCD, other_BNC) / (2 * math.sqrt(k_BNCD.shape[-1]))
    m = m_BNC.to(squared.dtype)
    v = v_BNCD.to(squared.dtype)
    length = (v.square().sum(-1) * (m > 0)).sum(-1, keepdim=True) / (m > 0).sum(-1, keepdim=True).clamp(min=1)
    unlike = _squared_distance(v, other_BNC) / length.clamp(min=1e-30)
    squared = torch.where(squared > 0, squared + unlike, squared)
    there = m.gather(-1, other_BNC)
    return squared * (m * there / (m + there).clamp(min=1))


def _squared_distance(x_BNCD: Tensor, other_BNC: Tensor) -> Tensor:
    x = x_BNCD if x_BNCD.dtype == torch.float64 else x_BNCD.float()
    return (x - x.gather(2, other_BNC[..., None].expand_as(x))).square().sum(-1)


def every_other(toward_BNC: Tensor) -> Tensor:
    """The links of each tree that lie an odd number of steps from its root, or an even one where those are more.

    Args:
        toward_BNC: Slot that each slot is linked to; itself for a root.
    """
    jump = toward_BNC
    depth = (jump != torch.arange(jump.shape[-1], device=jump.device)).long()
    linked = depth > 0
    for _ in range(jump.shape[-1].bit_length()):
        depth, jump = depth + depth.gather(-1, jump), jump.gather(-1, jump)
    is_odd = depth % 2 == 1
    most_are_odd = 2 * is_odd.sum(-1, keepdim=True) >= linked.sum(-1, keepdim=True)
    return linked & (is_odd == most_are_odd)
