"""Kernels that find what keys of a full history that are given up bring to their groups, and where the rest goes.

Each adds itself to its group by atomic sums of whole numbers, whose order does not matter, and is listed there if it is
among the first: what is found is as long as the list of who is given up, but for records of all slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.row_distances import compare_keys, fits
from workers.cache.shrink import Room
from workers.cache.triton_families import PIECE, Families, count_before, follow
from workers.cache.triton_pairs import KEYS_COMPARED, Members, list_members
from workers.cache.triton_rows import StoredHistory, compare_pairs
from workers.cache.unrotated import TurnBack

WEIGHT_UNITS = tl.constexpr(float(2**24))
"""As in `shrink.py`."""
_WEIGHED_AT_ONCE = 256
"""Keys of a program that are weighed where nothing is compared."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _place(  # type: ignore[no-untyped-def]
    m, head_of, num_survivors, rank, source, stride_mn, num_slots, num_keep, PIECES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Where each key goes."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    inside, at = slot < num_slots, row * num_slots + slot
    live = tl.load(m + row * stride_mn + slot, mask=inside, other=0) > 0
    keeps = live & (tl.load(head_of + at, mask=inside, other=-1) == slot)
    before, total = count_before(num_survivors, row, PIECES)
    nth = before + tl.cumsum(keeps.to(tl.int32), 0)
    tl.store(rank + at, nth, mask=inside)
    target = nth - 1 + num_keep - total
    tl.store(source + row * num_keep + target, slot, mask=keeps & (target >= 0))
    tl.store(source + row * num_keep + slot, tl.full([M], -1, tl.int32), mask=slot < num_keep - total)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _weigh(  # type: ignore[no-untyped-def]
    k, largest, position, m, weight, head_of, given_up_slot, num_given_up, share, added, joined,
    tally, member, number, of_group, rest, counts, axis, frequency,
    stride_kn, stride_kl, start_k, stride_pn, stride_mn, stride_wn, num_slots, num_most, rate,
    P: tl.constexpr, M: tl.constexpr, FALLS: tl.constexpr, KNOWN: tl.constexpr, LISTED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Weight of each key that is given up, added to its group, and lists; distances that are known stand in `share`."""
    listed = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    given_up = listed < tl.load(num_given_up + row)
    slot = tl.load(given_up_slot + row * num_most + listed, mask=given_up, other=0)
    at = row * num_slots + slot
    own_m = tl.load(m + row * stride_mn + slot, mask=given_up, other=0)
    newest = tl.load(head_of + at, mask=given_up, other=0)
    w = tl.load(weight + row * stride_wn + slot, mask=given_up, other=0.0)
    if KNOWN:
        w *= tl.exp(-rate * tl.load(share + at, mask=given_up, other=0.0))
    elif FALLS:
        at_k, at_p = row * stride_kn, row * stride_pn
        at_a, at_b = (start_k + slot).to(tl.int64) * stride_kl, (start_k + newest).to(tl.int64) * stride_kl
        inner, a, b = compare_pairs(
            k, largest, at_k + at_a, at_k + at_b, position, at_p + slot * 3, at_p + newest * 3, given_up,
            axis, frequency, P, M, BITS, GROUP, KIND,
        )  # fmt: skip
        w *= tl.exp(-rate * tl.maximum(a + b - 2 * inner, 0.0))
    tl.store(share + at, w, mask=given_up)
    group = row * num_slots + newest
    tl.atomic_add(added + group, tl.floor(w * WEIGHT_UNITS + 0.5).to(tl.int64), mask=given_up, sem="relaxed")
    tl.atomic_add(joined + group, own_m, mask=given_up, sem="relaxed")
    list_members(
        slot, newest, given_up, row, tally, member, number, of_group, rest, counts, num_slots, num_most,
        tl.num_programs(1), LISTED,
    )  # fmt: skip


class _Sums(NamedTuple):
    """What keys that are given up bring, [N, C]; at the one that stands for their group but for the first."""

    share: Tensor
    """Weight of each such key; anything for others."""
    added: Tensor
    """Weights in whole numbers, int64."""
    joined: Tensor
    """Sum of m, int32."""
    members: Members


class Found(NamedTuple):
    """What merges, and where the rest goes."""

    source: Tensor
    """Old slot of each new one, -1 where no key goes: int32 [N, num_keep]."""
    rank: Tensor
    """Of each slot, how many survive up to it, int32 [N, C]."""
    sums: _Sums
    families: Families


def find_sums(of: StoredHistory, turn_back: TurnBack, room: Room, link: Tensor) -> Found:
    """What merges; nothing of the history is written.

    Args:
        of: As it is stored, full.
        turn_back: RoPE of the model.
        room: How it is made.
        link: By `find_links`; written over.
    """
    m = of.m_NC
    heads, num = m.shape
    families = follow(link, m, room.num_merges, by_mass=room.rule == "pairs")
    source = torch.empty((heads, room.num_keep), dtype=torch.int32, device=m.device)
    rank = torch.empty_like(families.root)
    pieces = families.num_survivors.shape[1]
    _place[(pieces, heads)](
        m, families.head_of, families.num_survivors, rank, source, m.stride(0), num, room.num_keep,
        PIECES=triton.next_power_of_2(pieces), M=PIECE, num_warps=4,
    )  # fmt: skip
    return Found(source, rank, join_groups(of, turn_back, room, families), families)


def join_groups(of: StoredHistory, turn_back: TurnBack, room: Room, families: Families) -> _Sums:
    """What keys that are given up bring, and lists of so many of each group as the room says.

    Args:
        of: As it is stored.
        turn_back: RoPE of the model.
        room: How it is made.
        families: Nobody has joined them yet; written.
    """
    k, _, position, m, weight, _ = of
    (heads, num), to, given_up = m.shape, families, families.given_up
    share = torch.empty((heads, num), dtype=torch.float32, device=m.device)
    number, listed = torch.empty_like(to.head_of), to.head_of.new_empty((heads, num, room.num_listed))
    group, rest = torch.empty_like(given_up), torch.empty_like(given_up)
    known = room.rate > 0 and fits(k, turn_back)
    if known:
        compare_keys(k, turn_back, position, to.head_of, (given_up, to.num_given_up), share)
    at_once = _WEIGHED_AT_ONCE if known or not room.rate else KEYS_COMPARED
    _weigh[(triton.cdiv(given_up.shape[1], at_once), heads)](
        k.x, k.largest, position, m, weight, to.head_of, given_up, to.num_given_up, share, to.added, to.joined,
        to.tally, listed, number, group, rest, to.num_listed, turn_back.axis_int32_D, turn_back.frequency_D, *k.at,
        position.stride(0), m.stride(0), weight.stride(0), num, given_up.shape[1], room.rate,
        P=turn_back.head_dim // 2, M=at_once, FALLS=room.rate > 0, KNOWN=known, LISTED=room.num_listed,
        **k.form, num_warps=4,
    )  # fmt: skip
    num_group, num_rest, num_large = to.num_listed
    members = Members(to.tally, listed, number, group, num_group, rest, num_rest, num_large)
    return _Sums(share, to.added, to.joined, members)
