"""Who merges with whom in a full table, by kernels: links that are chosen, followed to where they end."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.partners import History
from workers.cache.shrink import Room
from workers.cache.table_pairs import LinkWays, choose_links, heaviest_of_root, pair_loss
from workers.cache.triton_pairs import find_cosines, find_distances, walk_every_other
from workers.cache.triton_ranks import kth_smallest, running_sum
from workers.cache.unrotated import TurnBack

_DOUBLING = LinkWays(kth_smallest=kth_smallest, running_sum=running_sum)
_WALKING = LinkWays(walk_every_other, kth_smallest, running_sum)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find_roots(link, root, head, num_slots, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the chain of merged pairs of each slot ends, and the newest slot of each such end."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    base = tl.program_id(1).to(tl.int64) * num_slots
    inside = slot < num_slots
    here = tl.load(link + base + slot, mask=inside, other=0)
    beyond = tl.load(link + base + here, mask=inside, other=0)
    while tl.max((beyond != here).to(tl.int32), 0) > 0:
        here = beyond
        beyond = tl.load(link + base + here, mask=inside, other=0)
    tl.store(root + base + slot, here, mask=inside)
    tl.atomic_max(head + base + here, slot, mask=inside & (here != slot), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find_survivors(root, head, m, head_of, survives, stride_mn, num_slots, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Who stands for a group survives."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside = slot < num_slots
    end = tl.load(root + row * num_slots + slot, mask=inside, other=0)
    newest = tl.load(head + row * num_slots + end, mask=inside, other=0)
    live = tl.load(m + row * stride_mn + slot, mask=inside, other=0) > 0
    tl.store(head_of + row * num_slots + slot, newest, mask=inside)
    tl.store(survives + row * num_slots + slot, (live & (newest == slot)).to(tl.int32), mask=inside)


class Families(NamedTuple):
    """See `shrink.py`; int32 [N, C]."""

    root: Tensor
    head_of: Tensor
    survives: Tensor
    rank: Tensor


def find_families(
    history: History, records: tuple[Tensor, Tensor, Tensor], turn_back: TurnBack, room: Room
) -> Families:
    """By the rule of the room.

    Args:
        history: Full.
        records: v_NLD in the slots of the keys; m_NC and partner_NC of each slot of the history.
        turn_back: RoPE of the model.
        room: How it is made.
    """
    v, m, partner = records
    if room.rule == "pairs":
        loss = pair_loss(find_distances(history, v, partner, turn_back), m, partner, turn_back.head_dim)
        link = choose_links(loss, partner, room.num_merges, _WALKING if room.num_listed else _DOUBLING)
        return _follow(link, m, by_mass=True)
    link = _join_nearest(find_cosines(history, partner, turn_back), partner, room.num_merges)
    return _follow(link, m, by_mass=False)


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


def _follow(link: Tensor, m: Tensor, *, by_mass: bool) -> Families:
    """Groups are stood for by their newest key, or by their heaviest."""
    heads, num = link.shape
    root, head, head_of, survives = (torch.empty_like(link) for _ in range(4))
    head.copy_(torch.arange(num, dtype=torch.int32, device=link.device))
    grid = (triton.cdiv(num, 1024), heads)
    _find_roots[grid](link, root, head, num, M=1024, num_warps=4)
    if by_mass:
        head = heaviest_of_root(root.long(), m).int()
    _find_survivors[grid](root, head, m, head_of, survives, m.stride(0), num, M=1024, num_warps=4)
    return Families(root, head_of, survives, running_sum(survives))
