"""Who merges with whom in a full table, by kernels: links that are chosen, followed to where they end.

Few slots are linked, so what follows links works on a list of them; all other keys stand for themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.shrink import Room
from workers.cache.table_pairs import SLOT_BITS
from workers.cache.triton_links import choose_links
from workers.cache.triton_pairs import append, find_cosines, find_distances
from workers.cache.triton_ranks import running_sum
from workers.cache.triton_rows import StoredHistory
from workers.cache.unrotated import TurnBack

PIECE = 1024
"""Slots of a row that a program takes, and whose survivors are counted."""
_FOLLOWED_AT_ONCE = 256


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _begin_groups(  # type: ignore[no-untyped-def]
    link, m, head_of, weight, joined, added, tally, linked, num_linked, counts, stride_mn, num_slots, num_most,
    M: tl.constexpr, BITS: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """Each key stands for itself and nobody joins it yet; who is linked is listed, in any order.

    What a slot stands for its group by is its mass, then its place, or its place alone. It is written of slots that
    others are linked to, by each of those: the end of a chain is one of them.
    """
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside, at = slot < num_slots, row * num_slots + slot
    other = tl.load(link + at, mask=inside, other=0)
    live = tl.load(m + row * stride_mn + slot, mask=inside, other=0) > 0
    tl.store(counts + row * tl.num_programs(0) + tl.program_id(0), tl.sum(live.to(tl.int32), 0))
    tl.store(head_of + at, slot, mask=inside)
    nothing = tl.zeros([M], tl.int32)
    tl.store(tally + at, nothing, mask=inside)
    tl.store(joined + at, nothing, mask=inside)
    tl.store(added + at, nothing.to(tl.int64), mask=inside)
    is_linked = inside & (other != slot)
    by = other.to(tl.int64)
    if BY_MASS:
        by += tl.load(m + row * stride_mn + other, mask=is_linked, other=0).to(tl.int64) << BITS
    tl.store(weight + row * num_slots + other, by, mask=is_linked)
    append(linked + row * num_most, num_linked + row, slot, is_linked)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find_roots(  # type: ignore[no-untyped-def]
    root, m, weight, linked, num_linked, stride_mn, num_slots, num_most,
    M: tl.constexpr, BITS: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """Where the chain of links of each listed slot ends, written over its link, and the largest weight of such an end.

    A link that another program has made longer leads to the same end.
    """
    place = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    num = tl.load(num_linked + row)
    if tl.program_id(0) * M < num:
        there, base = place < num, row * num_slots
        slot = tl.load(linked + row * num_most + place, mask=there, other=0)
        here = tl.load(root + base + slot, mask=there, other=0)
        beyond = tl.load(root + base + here, mask=there, other=0)
        while tl.max((beyond != here).to(tl.int32), 0) > 0:
            here = beyond
            beyond = tl.load(root + base + here, mask=there, other=0)
        tl.store(root + base + slot, here, mask=there)
        own = slot.to(tl.int64)
        if BY_MASS:
            own += tl.load(m + row * stride_mn + slot, mask=there, other=0).to(tl.int64) << BITS
        tl.atomic_max(weight + base + here, own, mask=there, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find_heads(  # type: ignore[no-untyped-def]
    root, weight, head_of, listed, num_listed, counts, num_slots, num_pieces, num_most,
    PIECE: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Who stands for the groups of listed slots and of where their chains end, and who is given up, over the list.

    Each link gives up one key: its own, or for the one that stands for all of them where their chains end.
    """
    place = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    num = tl.load(num_listed + row)
    if tl.program_id(0) * M < num:
        there, base = place < num, row * num_slots
        slot = tl.load(listed + row * num_most + place, mask=there, other=0)
        end = tl.load(root + base + slot, mask=there, other=0)
        head = (tl.load(weight + base + end, mask=there, other=0) & ((1 << BITS) - 1)).to(tl.int32)
        tl.store(head_of + base + slot, head, mask=there)
        tl.store(head_of + base + end, head, mask=there)
        given_up = tl.where(slot == head, end, slot)
        tl.store(listed + row * num_most + place, given_up, mask=there)
        tl.atomic_add(counts + row * num_pieces + given_up // PIECE, -1, mask=there, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def count_before(counts, row, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of the counts of pieces of this row before the program's own, and of all."""
    piece = tl.arange(0, PIECES)
    count = tl.load(counts + row * tl.num_programs(0) + piece, mask=piece < tl.num_programs(0), other=0)
    return tl.sum(tl.where(piece < tl.program_id(0), count, 0), 0), tl.sum(count, 0)


class Families(NamedTuple):
    """See `shrink.py`; int32."""

    root: Tensor
    head_of: Tensor
    """[N, C]."""
    num_survivors: Tensor
    """In each piece of `PIECE` slots."""
    given_up: Tensor
    """Slots whose keys join others, in any order, [N, merges]."""
    num_given_up: Tensor
    """[N]."""
    num_listed: Tensor
    """Nothing yet, [3, N], for lists of who joins groups."""
    joined: Tensor
    added: Tensor
    tally: Tensor
    """Nothing yet, [N, C], for what joins each group: mass, weight in int64, how many."""


def find_links(of: StoredHistory, turn_back: TurnBack, room: Room, known: Tensor | None, heads_at_once: int) -> Tensor:
    """The slot that each slot is linked to, itself where it is not, int32 [N, C], by the rule of the room.

    Args:
        of: As it is stored, full.
        turn_back: RoPE of the model.
        room: How it is made.
        known: See `find_distances`.
        heads_at_once: See `choose_links`; those of a layer.
    """
    if room.rule == "pairs":
        found = find_distances(of, turn_back, known)
        return choose_links(found, of.m_NC, of.partner_NC, turn_back.head_dim, room.num_merges, heads_at_once)
    cosine = find_cosines(of.k, of.position_NC3, of.m_NC, of.partner_NC, turn_back)
    return _join_nearest(cosine, of.partner_NC, room.num_merges)


def follow(link: Tensor, m: Tensor, num_merges: int, *, by_mass: bool) -> Families:
    """Where each chain of links ends, and who stands for each group.

    Args:
        link: int32, contiguous: the slot that each one is linked to, itself where it is not; written over.
        m: int32.
        num_merges: Slots of a head that are linked at most.
        by_mass: The heaviest key of a group stands for it, of equal ones the newest; or simply the newest.
    """
    (heads, num), device = link.shape, link.device
    assert num < 1 << SLOT_BITS
    pieces, most = triton.cdiv(num, PIECE), max(1, num_merges)
    head_of, joined, tally = (torch.empty_like(link) for _ in range(3))
    weight, added = (torch.empty(link.shape, dtype=torch.int64, device=device) for _ in range(2))
    counts, linked = link.new_empty((heads, pieces)), link.new_empty((heads, most))
    num_linked, *_ = zeros = link.new_zeros((4, heads))
    _begin_groups[(pieces, heads)](
        link, m, head_of, weight, joined, added, tally, linked, num_linked, counts, m.stride(0), num, most,
        M=PIECE, BITS=SLOT_BITS, BY_MASS=by_mass, num_warps=4,
    )  # fmt: skip
    grid = triton.cdiv(most, _FOLLOWED_AT_ONCE), heads
    _find_roots[grid](
        link, m, weight, linked, num_linked, m.stride(0), num, most,
        M=_FOLLOWED_AT_ONCE, BITS=SLOT_BITS, BY_MASS=by_mass, num_warps=4,
    )  # fmt: skip
    _find_heads[grid](
        link, weight, head_of, linked, num_linked, counts, num, pieces, most,
        PIECE=PIECE, M=_FOLLOWED_AT_ONCE, BITS=SLOT_BITS, num_warps=4,
    )  # fmt: skip
    return Families(link, head_of, counts, linked, num_linked, zeros[1:], joined, added, tally)


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
