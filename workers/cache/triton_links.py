"""Kernels that choose which links of a full table merge: `table_pairs.pair_loss` and `choose_links`, a few launches.

Losses are compared by their bits, `NO_LINK` where there is none. Links of several layers are chosen in one go, each in
rows of its own: kernels that follow each other find little to do for the rows of one layer.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.table_pairs import NO_LINK, Distances
from workers.cache.triton_pairs import walk
from workers.cache.triton_ranks import (
    NEAR_AT_ONCE,
    Links,
    digits_of,
    equal_before,
    find_last,
    last_of_row,
    room_to_count,
)

_PRICED_AT_ONCE, _TAKEN_AT_ONCE = 1024, 2048
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
def _take_links(  # type: ignore[no-untyped-def]
    rank, counts, begin, wanted, near, num_near, partner, link, stride_rn, num_slots, rows, most_digits, no_link,
    NTH: tl.constexpr, BITS: tl.constexpr, NEAR: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Links up to the last one that is chosen; of equal ones the first slots'."""
    first = tl.program_id(0) * M
    slot = first + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside, at = slot < num_slots, row * num_slots + slot
    value = tl.load(rank + at, mask=inside, other=no_link)
    last, nth = last_of_row(counts, begin, wanted, row, rows, most_digits, NTH, BITS)
    is_equal = inside & (value == last)
    before = equal_before(rank, near, num_near, row, first, last, num_slots, NEAR)
    place = before + tl.cumsum(is_equal.to(tl.int32), 0)
    is_chosen = ((value < last) | (is_equal & (place <= nth))) & (value != no_link)
    other = tl.load(partner + row * stride_rn + slot, mask=is_chosen, other=0)
    tl.store(link + at, tl.where(is_chosen, other, slot), mask=inside)


def choose_links(
    found: Distances, m: Tensor, partner: Tensor, head_dim: int, num_merges: int, summed_at_once: int | None = None
) -> Tensor:
    """What `table_pairs.choose_links` chooses by `table_pairs.pair_loss`; all as there.

    Args:
        found: Of a slot without a key, the length is 0. Values' distances and lengths are written over.
        m, partner: int32, of a history that is full.
        head_dim: Of a key.
        num_merges: As many at most.
        summed_at_once: Heads whose lengths are summed in a launch; the sums depend on that in their last bits.
    """
    (heads, num), device = m.shape, m.device
    link = torch.empty(m.shape, dtype=torch.int32, device=device)
    if num_merges == 0:
        return link.copy_(torch.arange(num, dtype=torch.int32, device=device))
    num_live = (m > 0).sum(-1) if found.num_live is None else found.num_live
    lengths = torch.cat([some.sum(-1) for some in found.lengths.split(summed_at_once or heads)])
    # Each slot's are read before they are written, and by nobody else.
    bits, jumps = (x.view(torch.int32) for x in (found.of_values, found.lengths))
    assert bits.is_contiguous()
    assert jumps.is_contiguous()
    _price_links[(triton.cdiv(num, _PRICED_AT_ONCE), heads)](
        found.of_keys, found.of_values, lengths, num_live, m, partner, bits, jumps,
        found.of_keys.stride(0), m.stride(0), partner.stride(0), num, 1 / (2 * math.sqrt(head_dim)), NO_LINK,
        M=_PRICED_AT_ONCE, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    zeros = torch.zeros(2 * heads + room_to_count(heads, device), dtype=torch.int32, device=device)
    num_odd, num_linked = zeros[: 2 * heads].view(2, heads)
    walk(jumps, num_odd, num_linked)
    links = Links(jumps, num_odd, num_linked)
    last = find_last(bits, num_merges, zeros[2 * heads :], jumps, links)
    _take_links[(triton.cdiv(num, _TAKEN_AT_ONCE), heads)](
        bits, last.counts, last.begin, last.wanted, last.near, last.num_near, partner, link, partner.stride(0), num,
        heads, last.counts.shape[2], NO_LINK, **digits_of(last), NEAR=NEAR_AT_ONCE, M=_TAKEN_AT_ONCE, num_warps=8,
    )  # fmt: skip
    return link
