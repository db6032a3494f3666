"""Kernels that choose which links of a full table merge: `table_pairs.pair_loss` and `choose_links`, a few launches.

Losses are compared by their bits, `NO_LINK` where there is none; numbers along a row are counted piece by piece.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.table_pairs import EARLY, NO_LINK, SLOT_BITS, Distances
from workers.cache.triton_pairs import walk
from workers.cache.triton_ranks import kth_smallest

PIECE = 1024
"""Slots of a row that a program takes."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _price_links(  # type: ignore[no-untyped-def]
    of_keys, of_values, all_lengths, num_live, m, partner, bits, jumps, stride_on, stride_mn, stride_rn, num_slots,
    per_distance, no_link, M: tl.constexpr,
):  # fmt: skip
    """Bits of what each link loses, and where it leads, as `walk` takes it. Compiled to fuse nothing."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside, at = slot < num_slots, row * num_slots + slot
    other = tl.load(partner + row * stride_rn + slot, mask=inside, other=-1)
    own = tl.load(m + row * stride_mn + slot, mask=inside, other=0)
    is_link = (own > 0) & (other >= 0)
    nothing = tl.zeros([M], tl.float32)
    live = tl.maximum(tl.load(num_live + row), 1).to(tl.float32) + nothing
    length = tl.maximum(tl.div_rn(tl.load(all_lengths + row) + nothing, live), 1e-30)
    loss = tl.load(of_keys + row * stride_on + slot, mask=is_link, other=0.0) * per_distance
    unlike = tl.div_rn(tl.load(of_values + at, mask=is_link, other=0.0), length)
    loss = tl.where(loss > 0, loss + unlike, loss)
    a = own.to(tl.float32)
    b = tl.load(m + row * stride_mn + other, mask=is_link, other=0).to(tl.float32)
    loss = loss * tl.div_rn(a * b, tl.maximum(a + b, 1.0))
    is_link = is_link & (loss != float("inf"))
    tl.store(bits + at, tl.where(is_link, loss.to(tl.int32, bitcast=True) & no_link, no_link), mask=inside)
    leads = is_link & (other != slot)
    tl.store(jumps + at, tl.where(leads, other * 2 + 1, slot * 2), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rank_links(bits, is_odd, num_odd, num_linked, num_slots, early, no_link, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Every other link comes first, and what loses nothing; written over the bits."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside, at = slot < num_slots, row * num_slots + slot
    loss = tl.load(bits + at, mask=inside, other=0)
    most_are_odd = (2 * tl.load(num_odd + row) >= tl.load(num_linked + row)).to(tl.int32)
    is_early = tl.load(is_odd + at, mask=inside, other=0).to(tl.int32) == most_are_odd
    rank = tl.where(is_early | (loss == 0), loss | early, loss)
    tl.store(bits + at, tl.where(loss == no_link, no_link, rank), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _count_equal(rank, last, counts, num_slots, M: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    value = tl.load(rank + row * num_slots + slot, mask=slot < num_slots, other=0)
    is_equal = (slot < num_slots) & (value == tl.load(last + row))
    tl.store(counts + row * tl.num_programs(0) + tl.program_id(0), tl.sum(is_equal.to(tl.int32), 0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def count_before(counts, row, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of the counts of pieces of this row before the program's own, and of all."""
    piece = tl.arange(0, PIECES)
    count = tl.load(counts + row * tl.num_programs(0) + piece, mask=piece < tl.num_programs(0), other=0)
    return tl.sum(tl.where(piece < tl.program_id(0), count, 0), 0), tl.sum(count, 0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _take_links(  # type: ignore[no-untyped-def]
    rank, last, nth, counts, partner, link, stride_rn, num_slots, no_link, PIECES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Links up to the last one that is chosen; of equal ones the first slots'."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside, at = slot < num_slots, row * num_slots + slot
    value, most = tl.load(rank + at, mask=inside, other=no_link), tl.load(last + row)
    is_equal = inside & (value == most)
    before, _ = count_before(counts, row, PIECES)
    place = before + tl.cumsum(is_equal.to(tl.int32), 0)
    is_chosen = ((value < most) | (is_equal & (place <= tl.load(nth + row)))) & (value != no_link)
    other = tl.load(partner + row * stride_rn + slot, mask=is_chosen, other=0)
    tl.store(link + at, tl.where(is_chosen, other, slot), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _weigh_slots(m, weight, stride_mn, num_slots, M: tl.constexpr, BITS: tl.constexpr, BY_MASS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a slot stands for its group by: its mass, then its place; or its place alone."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside = slot < num_slots
    own = slot.to(tl.int64)
    if BY_MASS:
        own += tl.load(m + row * stride_mn + slot, mask=inside, other=0).to(tl.int64) << BITS
    tl.store(weight + row * num_slots + slot, own, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find_roots(link, root, weight, num_slots, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the chain of merged pairs of each slot ends, and the largest weight of each such end."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    base = tl.program_id(1).to(tl.int64) * num_slots
    inside = slot < num_slots
    here = tl.load(link + base + slot, mask=inside, other=0)
    beyond = tl.load(link + base + here, mask=inside, other=0)
    while tl.max((beyond != here).to(tl.int32), 0) > 0:
        here = beyond
        beyond = tl.load(link + base + here, mask=inside, other=0)
    tl.store(root + base + slot, here, mask=inside)
    is_linked = inside & (here != slot)
    # That of a slot which is linked to another one is nobody's largest, so it does not change meanwhile.
    own = tl.load(weight + base + slot, mask=is_linked, other=0)
    tl.atomic_max(weight + base + here, own, mask=is_linked, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find_survivors(  # type: ignore[no-untyped-def]
    root, weight, m, head_of, counts, stride_mn, num_slots, M: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Who stands for the group of each slot, and how many of a piece stand for one: they survive."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside, at = slot < num_slots, row * num_slots + slot
    end = tl.load(root + at, mask=inside, other=0)
    head = (tl.load(weight + row * num_slots + end, mask=inside, other=0) & ((1 << BITS) - 1)).to(tl.int32)
    live = tl.load(m + row * stride_mn + slot, mask=inside, other=0) > 0
    tl.store(head_of + at, head, mask=inside)
    tl.store(counts + row * tl.num_programs(0) + tl.program_id(0), tl.sum((live & (head == slot)).to(tl.int32), 0))


def choose_links(found: Distances, m: Tensor, partner: Tensor, head_dim: int, num_merges: int) -> Tensor:
    """What `table_pairs.choose_links` chooses by `table_pairs.pair_loss`; all as there.

    Args:
        found: Of a slot without a key, the length is 0.
        m, partner: int32, of a history that is full.
        head_dim: Of a key.
        num_merges: As many at most.
    """
    heads, num = m.shape
    grid, device = (triton.cdiv(num, PIECE), heads), m.device
    bits, jumps, link = (torch.empty(m.shape, dtype=torch.int32, device=device) for _ in range(3))
    if num_merges == 0:
        return link.copy_(torch.arange(num, dtype=torch.int32, device=device))
    num_live = (m > 0).sum(-1) if found.num_live is None else found.num_live
    _price_links[grid](
        found.of_keys, found.of_values, found.lengths.sum(-1), num_live, m, partner, bits, jumps,
        found.of_keys.stride(0), m.stride(0), partner.stride(0), num, 1 / (2 * math.sqrt(head_dim)), NO_LINK,
        M=PIECE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    is_odd, num_odd, num_linked = walk(jumps)
    _rank_links[grid](bits, is_odd, num_odd, num_linked, num, EARLY, NO_LINK, M=PIECE, num_warps=4)
    last, nth = kth_smallest(bits, num_merges)
    counts = torch.empty(heads, grid[0], dtype=torch.int32, device=device)
    _count_equal[grid](bits, last, counts, num, M=PIECE, num_warps=4)
    _take_links[grid](
        bits, last, nth, counts, partner, link, partner.stride(0), num, NO_LINK,
        PIECES=triton.next_power_of_2(grid[0]), M=PIECE, num_warps=4,
    )  # fmt: skip
    return link


def follow(link: Tensor, m: Tensor, *, by_mass: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where each chain ends, who stands for each group, and survivors in each piece of `PIECE` slots; int32.

    Args:
        link: int32, contiguous: the slot that each one is linked to, itself where it is not.
        m: int32.
        by_mass: The heaviest key of a group stands for it, of equal ones the newest; or simply the newest.
    """
    (heads, num), device = link.shape, link.device
    assert num < 1 << SLOT_BITS
    grid = triton.cdiv(num, PIECE), heads
    root, head_of = torch.empty_like(link), torch.empty_like(link)
    weight = torch.empty(link.shape, dtype=torch.int64, device=device)
    counts = torch.empty(heads, grid[0], dtype=torch.int32, device=device)
    _weigh_slots[grid](m, weight, m.stride(0), num, M=PIECE, BITS=SLOT_BITS, BY_MASS=by_mass, num_warps=4)
    _find_roots[grid](link, root, weight, num, M=PIECE, num_warps=4)
    _find_survivors[grid](root, weight, m, head_of, counts, m.stride(0), num, M=PIECE, BITS=SLOT_BITS, num_warps=4)
    return root, head_of, counts
