"""Kernels that compare each key of a table with its partner, as both are now, and follow and list who merges."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.row_distances import compare_keys, compare_values, fits
from workers.cache.table_pairs import Distances
from workers.cache.triton_rows import Rows, StoredHistory, add_up, compare_pairs, load_halves
from workers.cache.unrotated import TurnBack

_LIST_PROGRAMS = 256
"""Of a head, for lists whose length only the device knows: with 12 heads enough to fill a GPU."""
KEYS_COMPARED = 16
"""Pairs of keys that a program of 4 warps compares at a time: one with 32 takes registers of two."""
_VALUES_COMPARED = 32
_WALKED_AT_ONCE = 512
"""Slots that wait for the longest of their chains."""
_LISTED_AT_ONCE = 2048
"""Slots of a row of which a program lists those whose distance is not known."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pair_cosine(  # type: ignore[no-untyped-def]
    k, largest, position, m, partner, cosine, axis, frequency,
    stride_kn, stride_kl, start_k, stride_pn, stride_mn, stride_rn, num_slots,
    P: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Cosine of each key with its partner as both are now."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside = slot < num_slots
    other = tl.load(partner + row * stride_rn + slot, mask=inside, other=-1)
    live = (tl.load(m + row * stride_mn + slot, mask=inside, other=0) > 0) & (other >= 0)
    at_a, at_b = (start_k + slot).to(tl.int64) * stride_kl, (start_k + other).to(tl.int64) * stride_kl
    at_k, at_p = row * stride_kn, row * stride_pn
    inner, a, b = compare_pairs(
        k, largest, at_k + at_a, at_k + at_b, position, at_p + slot * 3, at_p + other * 3, live, axis, frequency, P, M,
        BITS, GROUP, KIND,
    )  # fmt: skip
    value = tl.where(live, inner / tl.sqrt(tl.maximum(a * b, 1e-30)), float("-inf"))
    tl.store(cosine + row * num_slots + slot, value, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def append(to, count, value, wanted):  # type: ignore[no-untyped-def]
    """Values that are wanted, behind the first `count` of a list, which grows; in any order."""
    place = tl.cumsum(wanted.to(tl.int32), 0)
    first = tl.atomic_add(count, tl.max(place, 0), sem="relaxed")
    tl.store(to + first + place - 1, value, mask=wanted)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _list_unknown(  # type: ignore[no-untyped-def]
    of_keys, m, partner, unknown, count, num_live, stride_on, stride_mn, stride_rn, num_slots, M: tl.constexpr,
):  # fmt: skip
    """Keys with a partner whose distance from it is not known; how many keys there are."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside = slot < num_slots
    live = tl.load(m + row * stride_mn + slot, mask=inside, other=0) > 0
    tl.atomic_add(num_live + row, tl.sum(live.to(tl.int32), 0), sem="relaxed")
    paired = live & (tl.load(partner + row * stride_rn + slot, mask=inside, other=-1) >= 0)
    wanted = paired & (tl.load(of_keys + row * stride_on + slot, mask=inside, other=0.0) < 0)
    append(unknown + row * num_slots, count + row, slot, wanted)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _key_distances(  # type: ignore[no-untyped-def]
    k, largest, position, partner, of_keys, unknown, count, axis, frequency,
    stride_kn, stride_kl, start_k, stride_pn, stride_rn, stride_on, num_slots,
    P: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Squared distances of listed keys from their partners' before RoPE; programs share a list of any length."""
    row = tl.program_id(1).to(tl.int64)
    num = tl.load(count + row)
    for first in range(tl.program_id(0) * M, num, tl.num_programs(0) * M):
        there = first + tl.arange(0, M) < num
        slot = tl.load(unknown + row * num_slots + first + tl.arange(0, M), mask=there, other=0)
        other = tl.load(partner + row * stride_rn + slot, mask=there, other=0)
        at_a, at_b = (start_k + slot).to(tl.int64), (start_k + other).to(tl.int64)
        at_k, at_p = row * stride_kn, row * stride_pn
        inner, a, b = compare_pairs(
            k, largest, at_k + at_a * stride_kl, at_k + at_b * stride_kl, position, at_p + slot * 3, at_p + other * 3,
            there, axis, frequency, P, M, BITS, GROUP, KIND,
        )  # fmt: skip
        tl.store(of_keys + row * stride_on + slot, tl.maximum(a + b - 2 * inner, 0.0), mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _value_distances(  # type: ignore[no-untyped-def]
    v, largest, m, partner, of_values, lengths, stride_vn, stride_vl, start_v, stride_mn, stride_rn, num_slots,
    P: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Squared distance of each value from that of the partner; its length."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside = slot < num_slots
    other = tl.load(partner + row * stride_rn + slot, mask=inside, other=-1)
    live = tl.load(m + row * stride_mn + slot, mask=inside, other=0) > 0
    at_a, at_b = (start_v + slot).to(tl.int64) * stride_vl, (start_v + other).to(tl.int64) * stride_vl
    at_v, has_other = row * stride_vn, live & (other >= 0)
    first_a, second_a = load_halves(v, largest, at_v + at_a, live, 2 * P, M, 2, BITS, GROUP, KIND)
    first_b, second_b = load_halves(v, largest, at_v + at_b, has_other, 2 * P, M, 2, BITS, GROUP, KIND)
    squares = tl.reshape(tl.fma(first_a, first_a, second_a * second_a), [M, P])
    tl.store(lengths + row * num_slots + slot, add_up(squares, M, P), mask=inside)
    first, second = first_a - first_b, second_a - second_b
    squares = tl.reshape(tl.fma(first, first, second * second), [M, P])
    tl.store(of_values + row * num_slots + slot, add_up(squares, M, P), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _walk_in_place(jumps, num_odd, num_linked, num_slots, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether the end of the chain of each slot is an odd number of links away; how many are, and how many linked.

    Each step is written at once, so that the steps of others become longer. A jump that another program has just made
    longer is as right as the one before: end and parity are the same whoever comes first. So a multiprocessor may look
    where its own cache has kept an older jump, which is faster than to ask for the newest. Programs that run at once
    have slots of all heads: chains of older slots then end before newer ones begin.
    """
    row = tl.program_id(0)
    slot = tl.program_id(1) * M + tl.arange(0, M)
    base = row.to(tl.int64) * num_slots
    inside = slot < num_slots
    jump = tl.load(jumps + base + slot, mask=inside, other=0)
    here, parity = tl.where(inside, jump >> 1, 0), jump & 1
    is_linked = (inside & (here != slot)).to(tl.int32)
    jump = tl.load(jumps + base + here, mask=is_linked > 0, other=0)
    goes_on = (is_linked > 0) & (jump >> 1 != here)
    while tl.max(goes_on.to(tl.int32), 0) > 0:
        # Who has arrived asks no more.
        parity = tl.where(goes_on, parity ^ (jump & 1), parity)
        here = tl.where(goes_on, jump >> 1, here)
        tl.store(jumps + base + slot, here * 2 + parity, mask=goes_on)
        jump = tl.load(jumps + base + here, mask=goes_on, other=0)
        goes_on = goes_on & (jump >> 1 != here)
    tl.atomic_add(num_odd + row, tl.sum(parity, 0), sem="relaxed")
    tl.atomic_add(num_linked + row, tl.sum(is_linked, 0), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def list_members(  # type: ignore[no-untyped-def]
    slot, newest, there, row, tally, member, number, group, rest, counts, num_slots, num_most, num_rows,
    LISTED: tl.constexpr,
):  # fmt: skip
    """Count who is given up to each group and list the first that come, the groups, and who is not listed."""
    at = row * num_slots + newest
    before = tl.atomic_add(tally + at, 1, mask=there, sem="relaxed")
    tl.store(member + at * LISTED + before, slot, mask=there & (before < LISTED))
    append(group + row * num_most, counts + row, newest, there & (before == 0))
    append(rest + row * num_most, counts + num_rows + row, slot, there & (before >= LISTED))
    is_large = there & (before == LISTED)
    nth = tl.cumsum(is_large.to(tl.int32), 0)
    first = tl.atomic_add(counts + 2 * num_rows + row, tl.max(nth, 0), sem="relaxed")
    tl.store(number + at, first + nth - 1, mask=is_large)


def walk(jumps: Tensor, num_odd: Tensor, num_linked: Tensor) -> None:
    """Find whether each slot is an odd number of links from where its chain ends.

    Args:
        jumps: Of each slot, twice the one that it is linked to and 1, or twice its own where its chain ends: int32,
            contiguous [N, C], C below 2^30. Written: twice where its chain ends, and 1 where that is an odd number of
            links away.
        num_odd, num_linked: 0, [N], int32. Written: how many slots of a row are, and how many are linked.
    """
    heads, num = jumps.shape
    _walk_in_place[(heads, triton.cdiv(num, _WALKED_AT_ONCE))](
        jumps, num_odd, num_linked, num, M=_WALKED_AT_ONCE, num_warps=4
    )


class Members(NamedTuple):
    """Who is given up to each group; [N, C] at the slot that stands for it, or lists in any order, int32 all."""

    tally: Tensor
    """How many [N, C]."""
    listed: Tensor
    """The first of them: [N, C, listed], anything behind their number."""
    number: Tensor
    """Of each group that has more than are listed, from 0, [N, C]; anything for others."""
    group: Tensor
    """Who stands for a group that somebody is given up to, [N, most]."""
    num_group: Tensor
    """Of those, [N]."""
    rest: Tensor
    """Who is given up and not listed, [N, most]."""
    num_rest: Tensor
    """Of those, [N]."""
    num_large: Tensor
    """Groups that have more members than are listed, [N]."""


def find_cosines(k: Rows, position: Tensor, m: Tensor, partner: Tensor, turn_back: TurnBack) -> Tensor:
    """Cosine of each key with its partner before RoPE, float32 [N, C]; -inf without one."""
    cosine = torch.empty(m.shape, dtype=torch.float32, device=m.device)
    _pair_cosine[(triton.cdiv(m.shape[1], KEYS_COMPARED), m.shape[0])](
        k.x, k.largest, position, m, partner, cosine, turn_back.axis_int32_D, turn_back.frequency_D, *k.at,
        position.stride(0), m.stride(0), partner.stride(0), m.shape[1],
        P=turn_back.head_dim // 2, M=KEYS_COMPARED, **k.form, num_warps=4,
    )  # fmt: skip
    return cosine


def find_distances(of: StoredHistory, turn_back: TurnBack, known: Tensor | None = None) -> Distances:
    """What `table_pairs.find_distances` gives; of slots without a key the length is 0.

    Args:
        of: As it is stored, full.
        turn_back: RoPE of the model.
        known: Distances of keys that are known, -1 elsewhere, [N, C] of float32: what is missing is written.
    """
    k, v, position, m, _, partner = of
    (heads, num), pairs = m.shape, turn_back.head_dim // 2
    if known is None:
        known = torch.full(m.shape, -1.0, device=m.device)
    unknown, counts = torch.empty_like(m, memory_format=torch.contiguous_format), m.new_zeros((2, heads))
    count, num_live = counts
    _list_unknown[(triton.cdiv(num, _LISTED_AT_ONCE), heads)](
        known, m, partner, unknown, count, num_live, known.stride(0), m.stride(0), partner.stride(0), num,
        M=_LISTED_AT_ONCE, num_warps=8,
    )  # fmt: skip
    if fits(k, turn_back):
        compare_keys(k, turn_back, position, partner, (unknown, count), known)
        return Distances(known, *compare_values(v, turn_back, m, partner), num_live)
    _key_distances[(min(_LIST_PROGRAMS, triton.cdiv(num, KEYS_COMPARED)), heads)](
        k.x, k.largest, position, partner, known, unknown, count, turn_back.axis_int32_D, turn_back.frequency_D,
        *k.at, position.stride(0), partner.stride(0), known.stride(0), num,
        P=pairs, M=KEYS_COMPARED, **k.form, num_warps=4,
    )  # fmt: skip
    of_values, lengths = (torch.empty(m.shape, dtype=torch.float32, device=m.device) for _ in range(2))
    _value_distances[(triton.cdiv(num, _VALUES_COMPARED), heads)](
        v.x, v.largest, m, partner, of_values, lengths, *v.at, m.stride(0), partner.stride(0), num,
        P=pairs, M=_VALUES_COMPARED, **v.form, num_warps=4,
    )  # fmt: skip
    return Distances(known, of_values, lengths, num_live)
