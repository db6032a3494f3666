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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from workers.rows import take_slots, wide


class Merges(NamedTuple):
    """What becomes of the slots of a table, [B, N, C] of int64 both."""

    root: Tensor
    """Where each slot ends: the oldest slot of its group, itself where nothing merges."""
    keeper: Tensor
    """Whose key stands for the group that it ends in."""


class Vectors(Protocol):
    """Vectors that lie in slots and are unpacked as far as they are looked at, to memory that is given."""

    dtype: torch.dtype
    dim: int

    @property
    def slots_at_once(self) -> int:
        """How many slots of all heads to go through at a time."""
        ...

    def read_run(self, start: int, stop: int, out_BNKD: Tensor) -> Tensor:
        """Slots from `start` up to `stop`, [B, N, K, D]."""
        ...

    def gather(self, slot_BNR: Tensor, out_BNRD: Tensor) -> Tensor:
        """The vectors of these slots, [B, N, R, D]."""
        ...


def toward_partners(m_BNC: Tensor, partner_BNC: Tensor) -> Tensor:
    """The slot that each slot may join, itself where there is none.

    Args:
        m_BNC: How many keys a group holds; 0 where there is none.
        partner_BNC: An older slot, or -1.
    """
    own = torch.arange(partner_BNC.shape[-1], device=partner_BNC.device)
    return torch.where((partner_BNC >= 0) & (m_BNC > 0), partner_BNC.long(), own)


def choose_merges(loss_BNC: Tensor, toward_BNC: Tensor, m_BNC: Tensor, num_BN: Tensor) -> Merges:
    """Let `num_BN` groups of each head join their partners, with the least loss.

    Args:
        loss_BNC: Of each slot's merge with its partner.
        toward_BNC: See `toward_partners`.
        m_BNC: How many keys a group holds; 0 where there is none.
        num_BN: No more than there are partners.
    """
    toward, own = toward_BNC, torch.arange(toward_BNC.shape[-1], device=toward_BNC.device).expand_as(toward_BNC)
    may = toward != own
    loss = loss_BNC.masked_fill(~may, torch.inf)
    order = loss.argsort(dim=-1, stable=True)
    # Where every other link is not enough the rest comes after them; what loses nothing need not wait.
    late = (~every_other(toward) & (loss > 0)).long() + ~may
    order = order.gather(-1, late.gather(-1, order).argsort(dim=-1, stable=True))
    rank = torch.empty_like(order).scatter_(-1, order, own)
    root = _follow(torch.where(rank < num_BN[..., None], toward, own))
    # The heaviest; of equal ones the newest, which has the highest slot.
    weight = m_BNC.long() * own.shape[-1] + own
    heaviest = torch.zeros_like(weight).scatter_reduce(-1, root, weight, "amax")
    return Merges(root, (heaviest % own.shape[-1]).gather(-1, root))


def merge_loss(k_BNCD: Tensor, v_BNCD: Tensor, m_BNC: Tensor, other_BNC: Tensor) -> Tensor:
    """What merging each group with another one adds to the squared distances within groups, at least float32."""
    of_keys, of_values = (_squared_distance(x, take_slots(x, other_BNC)) for x in (k_BNCD, v_BNCD))
    return _loss(of_keys / _logits(k_BNCD.shape[-1]), of_values, wide(v_BNCD).square().sum(-1), m_BNC, other_BNC)


def loss_in_stores(keys: Vectors, values: Vectors, m_BNC: Tensor, other_BNC: Tensor) -> Tensor:
    """`merge_loss` of the first slots of stores, of which a run at a time is unpacked: it stays in a CPU's cache."""
    batch, heads, num = m_BNC.shape
    step = min(num, keys.slots_at_once)
    room = torch.empty((2, batch * heads * step * keys.dim), dtype=keys.dtype, device=m_BNC.device)
    found = []
    for start in range(0, num, step):
        other = other_BNC[:, :, start : start + step]
        own_BNRD, other_BNRD = (x[: other.numel() * keys.dim].view(*other.shape, keys.dim) for x in room)
        distances = []
        for x in (keys, values):
            x.read_run(start, start + other.shape[2], own_BNRD)
            distances.append(_squared_distance(own_BNRD, x.gather(other, other_BNRD)))
        found.append((*distances, wide(own_BNRD).square().sum(-1)))
    of_keys, of_values, lengths = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    return _loss(of_keys / _logits(keys.dim), of_values, lengths, m_BNC, other_BNC)


def _loss(of_keys: Tensor, of_values: Tensor, lengths: Tensor, m_BNC: Tensor, other_BNC: Tensor) -> Tensor:
    """From squared distances and the squared lengths of values, [B, N, C] all."""
    m = m_BNC.to(of_keys.dtype)
    length = (lengths * (m > 0)).sum(-1, keepdim=True) / (m > 0).sum(-1, keepdim=True).clamp(min=1)
    unlike = of_values / length.clamp(min=1e-30)
    squared = torch.where(of_keys > 0, of_keys + unlike, of_keys)
    there = m.gather(-1, other_BNC)
    return squared * (m * there / (m + there).clamp(min=1))


def _squared_distance(x_BNRD: Tensor, other_BNRD: Tensor) -> Tensor:
    """The other ones may be written over."""
    return wide(other_BNRD).sub_(wide(x_BNRD)).square_().sum(-1)


def _logits(dim: int) -> float:
    """Squared distance of keys of so many channels that counts as one logit of a query like them."""
    return 2 * math.sqrt(dim)


def _follow(root_BNC: Tensor) -> Tensor:
    """Where chains end, if each slot names the next one."""
    for _ in range(root_BNC.shape[-1].bit_length()):  # a chain halves with each look
        before, root_BNC = root_BNC, root_BNC.gather(-1, root_BNC)
        if root_BNC.is_cpu and torch.equal(before, root_BNC):  # elsewhere to ask costs more than to look again
            break
    return root_BNC


def every_other(toward_BNC: Tensor) -> Tensor:
    """The links of each tree that lie an odd number of steps from its root, or an even one where those are more.

    Args:
        toward_BNC: Slot that each slot is linked to; itself for a root.
    """
    jump = toward_BNC
    depth = (jump != torch.arange(jump.shape[-1], device=jump.device)).long()
    linked = depth > 0
    for _ in range(jump.shape[-1].bit_length()):
        if jump.is_cpu and not bool(depth.gather(-1, jump).any()):  # all have come to their root
            break
        depth, jump = depth + depth.gather(-1, jump), jump.gather(-1, jump)
    return most_common_parity(depth % 2 == 1, linked)


def most_common_parity(is_odd: Tensor, linked: Tensor) -> Tensor:
    """Of the links of each head those whose distance from their root is odd, or even where those are more."""
    most_are_odd = 2 * is_odd.sum(-1, keepdim=True) >= linked.sum(-1, keepdim=True)
    return linked & (is_odd == most_are_odd)
